"""One tree of errors, one table into it."""

from __future__ import annotations

import pickle
import re

import grpc
import pytest

import replication
from hayflick.v1.errors_pb2 import ErrorReason
from replication import _error_table, errors
from replication._records import EndReason


def test_every_reason_of_the_wire_has_its_exception() -> None:
    """A reason added to the proto cannot be forgotten in the table, nor one be made up."""
    reasons = {name.removeprefix("ERROR_REASON_") for name in ErrorReason.keys()} - {"UNSPECIFIED"}  # noqa: SIM118
    assert _error_table.BY_REASON.keys() == reasons


def test_every_status_code_has_its_exception() -> None:
    """All sixteen codes that mean an error are in the table."""
    assert _error_table.BY_CODE.keys() == {code.name for code in grpc.StatusCode} - {"OK"}


def test_every_exception_is_exported_drawn_and_part_of_the_tree() -> None:
    """The picture in the docstring shows every class, and every class derives from the root."""
    classes = {
        value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)
    }
    assert {cls.__name__ for cls in classes} == set(errors.__all__)
    assert all(issubclass(cls, errors.HayflickError) for cls in classes)
    assert all(hasattr(replication, cls.__name__) for cls in classes)
    drawn = set(re.findall(r"(?:├──|└──|    )\s*([A-Z]\w+) ", errors.__doc__ or ""))
    assert drawn >= set(errors.__all__)


@pytest.mark.parametrize(("reason", "cls"), _error_table.BY_REASON.items())
def test_an_error_tells_what_the_wire_said(reason: str, cls: type[errors.HayflickError]) -> None:
    """Reason, facts and the time to retry arrive as attributes, and survive a process boundary."""
    error = _error_table.error(reason, "words", {"fact": "x"}, retry_after_seconds=0.5)
    for seen in (error, pickle.loads(pickle.dumps(error))):
        assert type(seen) is cls
        assert (seen.reason, seen.details, seen.retry_after_seconds) == (reason, {"fact": "x"}, 0.5)
        assert "words" in str(seen)


def test_an_unknown_reason_is_known_by_its_status_code() -> None:
    """A newer service's refusal is still a refusal to an older client."""
    error = _error_table.error("FROM_THE_FUTURE", "no", code="UNAVAILABLE")
    assert isinstance(error, errors.ServiceUnavailable)
    assert error.reason == "FROM_THE_FUTURE"


def test_a_limit_that_cannot_be_enforced_says_which_and_what_to_do() -> None:
    """The text itself names the layer and the remedy, for whoever only sees a traceback."""
    error = _error_table.error(
        "LIMIT_NOT_ENFORCEABLE", "refused", {"layer": "cgroups", "remedy": "mount cgroup2"}
    )
    assert "cgroups" in str(error)
    assert "mount cgroup2" in str(error)


@pytest.mark.parametrize("reason", EndReason)
def test_a_worker_that_policy_ended_was_denied_and_any_other_has_ended(reason: EndReason) -> None:
    """Expiry and kill switch are denials with their own reasons; the rest is WorkerEnded."""
    error = _error_table.ended("w", reason)
    if reason in _error_table.DENIED_BY_END:
        assert isinstance(error, errors.ReplicationDenied)
        assert error.reason == _error_table.DENIED_BY_END[reason]
    else:
        assert isinstance(error, errors.WorkerEnded)
    assert error.details == {"worker_id": "w", "end_reason": reason.value}


@pytest.mark.parametrize(
    ("cls", "builtin"),
    [
        (errors.TaskTimeout, TimeoutError),
        (errors.ServiceUnavailable, ConnectionError),
        (errors.NotAllowed, PermissionError),
        (errors.InvalidField, ValueError),
        (errors.NotFound, LookupError),
        (errors.NotPicklable, TypeError),
    ],
)
def test_errors_are_caught_by_the_builtin_one_would_expect(
    cls: type[errors.HayflickError], builtin: type[Exception]
) -> None:
    """Code that knows only Python's own exceptions catches ours too."""
    with pytest.raises(builtin, match="words"):
        raise cls("words")
