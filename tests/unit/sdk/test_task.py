"""What a task prints and what comes of it, as the caller sees it."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replication import (
    ReplicationDenied,
    ServiceUnavailable,
    TaskError,
    TaskKilled,
    TaskTimeout,
    WorkerEnded,
)
from replication._printer import Printer, visible
from replication._records import EndReason
from replication._task import Event, Output, Result, command_task, event_from_json, finish, value_of


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def events(*given_events: Event) -> Callable[[Callable[[Event], None]], None]:
    """Return something that runs a task of these events."""

    def run(on_event: Callable[[Event], None]) -> None:
        for event in given_events:
            on_event(event)

    return run


def test_output_goes_to_the_streams_that_are_there_at_that_moment(capsys: pytest.CaptureFixture[str]) -> None:
    """Print inside a task appears on the caller's own streams, replaced or not."""
    value = finish(
        events(Output("stdout", b"one\n"), Output("stderr", b"two\n"), Result("SUCCEEDED", "[1]")), "w"
    )
    assert value == [1]
    assert capsys.readouterr() == ("one\n", "two\n")


@given(st.text(st.characters(exclude_categories=["Cs"])), st.data())
def test_text_is_whole_however_it_was_cut(text: str, data: st.DataObject) -> None:
    """Pieces that end within a character are put together again."""
    octets = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(octets)), max_size=5)))
    stream = io.StringIO(newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        printer = Printer("stdout")
        for start, end in zip([0, *cuts], [*cuts, len(octets)], strict=True):
            printer.write(octets[start:end])
        printer.close()
    assert stream.getvalue() == text


def test_bytes_that_are_no_text_are_shown_and_do_not_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task may print anything; the caller sees it, in an encoding the caller has."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    finish(events(Output("stdout", b"\xff\xc3\xa9 cut \xc3"), Result("SUCCEEDED")), "w")
    assert stream.buffer.getvalue() == b"\\xff\\xe9 cut \\xc3"  # type: ignore[attr-defined]


def test_a_program_without_streams_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Python has no console, output goes nowhere."""
    monkeypatch.setattr(sys, "stdout", None)
    assert finish(events(Output("stdout", b"x"), Result("SUCCEEDED", "null")), "w") is None


def test_a_worker_cannot_command_the_users_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, escape sequences are pictures; in a file they are what they were."""
    attack = b"\x1b]52;c;ZXZpbA==\x07 tab\t\n"
    for stream, seen in (
        (Terminal(), "\u241b]52;c;ZXZpbA==\u2407 tab\t\n"),
        (io.StringIO(), attack.decode()),
    ):
        monkeypatch.setattr(sys, "stdout", stream)
        finish(events(Output("stdout", attack), Result("SUCCEEDED")), "w")
        assert stream.getvalue() == seen


@given(st.text())
def test_visible_text_has_nothing_that_commands_a_terminal(text: str) -> None:
    """No control character is left but tab and line ends."""
    assert not {code for code in map(ord, visible(text)) if code < 0x20 or 0x7F <= code < 0xA0} - {9, 10, 13}


def test_an_exception_arrives_as_data() -> None:
    """Type, message and traceback are text; the traceback is shown as a note."""
    exception = {"type": "builtins.ValueError", "message": "no\x1b[2J", "traceback": "Traceback…\n"}
    with pytest.raises(TaskError) as raised:
        value_of(Result("FAILED", exception=exception), "w")
    error = raised.value
    assert (error.type, error.message, error.traceback) == tuple(exception.values())
    assert str(error) == "builtins.ValueError: no\u241b[2J"
    assert error.__notes__ == ["Inside the sandbox:\nTraceback…"]


@pytest.mark.parametrize(
    ("result", "cls", "attributes"),
    [
        (Result("FAILED", exit_code=3), TaskError, {"exit_code": 3}),
        (Result("TIMED_OUT"), TaskTimeout, {"reason": "TASK_TIMEOUT"}),
        (Result("SIGNALED", signal=11), TaskKilled, {"reason": "SIGNALED", "signal": 11}),
        (Result("OOM_KILLED", signal=9), TaskKilled, {"reason": "OOM_KILLED"}),
        (Result("CPU_EXCEEDED"), TaskKilled, {"reason": "CPU_EXCEEDED"}),
        (Result("CANCELLED"), TaskKilled, {"reason": "CANCELLED"}),
        (Result("FROM_THE_FUTURE"), TaskKilled, {"reason": "FROM_THE_FUTURE"}),
        (
            Result("WORKER_ENDED", end_reason=EndReason.EXPIRED),
            ReplicationDenied,
            {"reason": "WORKER_EXPIRED"},
        ),
        (
            Result("WORKER_ENDED", end_reason=EndReason.KILL_SWITCH),
            ReplicationDenied,
            {"reason": "KILL_SWITCH_ENGAGED"},
        ),
        (Result("WORKER_ENDED", end_reason=EndReason.KILLED), WorkerEnded, {"reason": "WORKER_NOT_RUNNING"}),
        (Result("SUCCEEDED", "{"), TaskError, {"type": "replication.TaskResultError"}),
        (Result("SUCCEEDED", "[" * 100_000), TaskError, {"type": "replication.TaskResultError"}),
    ],
)
def test_each_outcome_has_its_exception(
    result: Result, cls: type[Exception], attributes: dict[str, Any]
) -> None:
    """How a task ended is told by the class and its attributes, also for an outcome yet unknown."""
    with pytest.raises(cls) as raised:
        value_of(result, "w")
    assert {name: getattr(raised.value, name) for name in attributes} == attributes


def test_events_that_break_off_are_an_error() -> None:
    """Without a result nothing is taken for a success."""
    with pytest.raises(ServiceUnavailable):
        finish(events(Output("stdout", b"")), "w")


def test_both_ways_into_a_task_read_the_same_events() -> None:
    """Events in proto3 JSON, as they come inside a sandbox, are those that come by gRPC."""
    assert event_from_json({"started": {"task_id": "1"}}) is None
    assert event_from_json({"output": {"stream": "STREAM_STDERR", "data": "aGk="}}) == Output("stderr", b"hi")
    assert event_from_json({"result": {"outcome": "TASK_OUTCOME_TIMED_OUT"}}) == Result("TIMED_OUT")


@pytest.mark.parametrize(
    ("argv", "environment", "field"),
    [
        ("ls", None, "argv"),
        ([], None, "argv"),
        ([""], None, r"argv\[0\]"),
        (["ls", 3], None, r"argv\[1\]"),
        (["ls", "a\0b"], None, r"argv\[1\]"),
        (["ls"], {"A=B": "c"}, "environment"),
        (["ls"], {"A": "\0"}, r"environment\['A'\]"),
        (["ls"], {"": "x"}, "environment"),
    ],
)
def test_a_command_that_no_kernel_would_take_is_refused(
    argv: Any, environment: dict[str, str] | None, field: str
) -> None:
    """Bad arguments are a ValueError that names the place, before anything is sent."""
    with pytest.raises(ValueError, match=f"^{field}: "):
        command_task(argv, environment=environment, timeout_seconds=None, keep_worker_on_error=False)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), True])
def test_a_bad_timeout_is_refused(seconds: float) -> None:
    """A task's time limit is a positive number."""
    with pytest.raises(ValueError, match=r"^timeout_seconds: "):
        command_task(["ls"], environment=None, timeout_seconds=seconds, keep_worker_on_error=False)
