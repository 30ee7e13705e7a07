"""Functions that travel by value to where their modules are not."""

from __future__ import annotations

import functools
import json
import pickle
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import cloudpickle
import pytest

from replication import Controller, NotPicklable, ReplicationContext, TooLarge
from replication._callables import MAX_TASK_BYTES, pickle_callable

if TYPE_CHECKING:
    from pathlib import Path

LOAD = """
import base64, json, sys
import cloudpickle
function = cloudpickle.loads(base64.b64decode(sys.stdin.read()))
print(json.dumps([function(20), sorted(set(sys.modules) & {"my_helpers", "my_package.deep"})]))
"""


def run_elsewhere(payload: bytes) -> list[object]:
    """Call a pickled function with 20 in an interpreter that has none of our modules."""
    import base64

    ran = subprocess.run(
        [sys.executable, "-I", "-c", LOAD],
        input=base64.b64encode(payload).decode(),
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    result: list[object] = json.loads(ran.stdout)
    return result


@pytest.fixture
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put modules of a user's own on the path, for one test."""
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").write_text("from my_package.deep import twice\n")
    (tmp_path / "my_package" / "deep.py").write_text("def twice(x):\n    return 2 * x\n")
    (tmp_path / "my_helpers.py").write_text(
        "import my_package.deep\nOFFSET = 2\n\ndef work(x):\n    return my_package.deep.twice(x) + OFFSET\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path  # type: ignore[misc]
    for name in ("my_helpers", "my_package", "my_package.deep"):
        sys.modules.pop(name, None)


def test_a_function_of_the_users_own_modules_runs_where_they_are_not(own_modules: Path) -> None:
    """What a function needs of the user's own modules goes along by value."""
    import my_helpers  # type: ignore[import-not-found]

    assert run_elsewhere(pickle_callable(my_helpers.work, "task", MAX_TASK_BYTES)) == [42, []]
    assert run_elsewhere(pickle_callable(lambda x: 1 * my_helpers.work(x), "task", MAX_TASK_BYTES)) == [
        42,
        [],
    ]


def test_pickling_leaves_cloudpickle_as_it_was(own_modules: Path) -> None:
    """Modules are taken by value for one pickle, and the user's own choices stay."""
    import my_helpers
    import my_package

    cloudpickle.register_pickle_by_value(my_package)
    try:
        pickle_callable(my_helpers.work, "task", MAX_TASK_BYTES)
        with pytest.raises(NotPicklable):
            pickle_callable(lambda: threading.Lock, "task", 0) if False else pickle_callable(
                functools.partial(my_helpers.work, threading.Lock()), "task", MAX_TASK_BYTES
            )
        assert cloudpickle.list_registry_pickle_by_value() == {"my_package"}
    finally:
        cloudpickle.unregister_pickle_by_value(my_package)


def test_what_is_installed_travels_by_name() -> None:
    """The sandbox has the interpreter's own packages and this one: they are not copied."""
    payload = pickle_callable(lambda context: isinstance(context, ReplicationContext), "task", MAX_TASK_BYTES)
    assert b"replication._contract" in payload
    assert len(payload) < 2_000
    assert pickle.loads(payload)(3) is False


def test_what_cannot_travel_is_named() -> None:
    """The message says which variable holds the thing, and what it is."""
    lock = threading.Lock()
    with pytest.raises(NotPicklable, match=r"task: .*'lock' \(lock\)") as refused:
        pickle_callable(lambda worker: lock, "task", MAX_TASK_BYTES)
    assert isinstance(refused.value, TypeError)


def test_the_outside_does_not_travel_inside() -> None:
    """A task that holds on to its controller is told to use the worker it is given."""
    controller = Controller.__new__(Controller)
    with pytest.raises(NotPicklable, match=r"'controller'.*by the worker it is given"):
        pickle_callable(lambda worker: controller, "task", MAX_TASK_BYTES)


@pytest.mark.parametrize("value", [None, "print", 3, b"x"])
def test_what_cannot_be_called_is_refused(value: object) -> None:
    """Only a callable is a task."""
    with pytest.raises(NotPicklable, match=r"^task: must be a function"):
        pickle_callable(value, "task", MAX_TASK_BYTES)


def test_a_callable_over_the_limit_is_refused_with_both_sizes() -> None:
    """Sixteen MiB of captured data do not leave this process."""
    ballast = b"x" * MAX_TASK_BYTES
    with pytest.raises(TooLarge, match="16,777,216") as refused:
        pickle_callable(lambda worker: ballast, "task", MAX_TASK_BYTES)
    assert refused.value.details["limit_bytes"] == str(MAX_TASK_BYTES)
