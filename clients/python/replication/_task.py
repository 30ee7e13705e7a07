"""A task as it travels, what it prints, and what came of it."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from replication import _checks, _error_table, errors
from replication._callables import MAX_TASK_BYTES, PYTHON_VERSION, pickle_callable
from replication._printer import Printer, visible
from replication._wire import Json, duration, end_reason

if TYPE_CHECKING:
    from replication._records import EndReason

MAX_TIMEOUT_SECONDS = 7 * 86_400.0
MAX_ARGUMENTS = 1_024
MAX_COMMAND_BYTES = 24 * 1024

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


@dataclass(frozen=True)
class Output:
    """A piece of what a task printed, cut anywhere."""

    stream: Literal["stdout", "stderr"]
    data: bytes


@dataclass(frozen=True)
class Result:
    """How a task ended: all of it text and numbers made inside the sandbox.

    Attributes:
        outcome: The ``TASK_OUTCOME_…``, without its prefix.
        value_json: What a callable returned.
        exception: What it raised: ``type``, ``message``, ``traceback``.
        exit_code: Of a program.
        signal: That ended it, or 0.
        end_reason: Why its worker ended, when it did.
    """

    outcome: str
    value_json: str = ""
    exception: Mapping[str, str] | None = None
    exit_code: int = 0
    signal: int = 0
    end_reason: EndReason | None = None


Event: TypeAlias = Output | Result


@dataclass(frozen=True)
class Task:
    """Something for a worker to do.

    Attributes:
        pickled: A callable, pickled by value; empty for a program.
        argv: A program and its arguments; empty for a callable.
        environment: Added to the program's environment.
        timeout_seconds: How long it may run; ``None``: as long as its worker lives.
        keep_worker_on_error: Whether the worker lives on when the task fails.
    """

    pickled: bytes = b""
    argv: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    timeout_seconds: float | None = None
    keep_worker_on_error: bool = False

    def __post_init__(self) -> None:
        if self.timeout_seconds is not None:
            _checks.number("timeout_seconds", self.timeout_seconds, 0.000001, MAX_TIMEOUT_SECONDS)
        _checks.flag("keep_worker_on_error", self.keep_worker_on_error)

    def to_json(self, worker_id: str) -> dict[str, Any]:
        """Return the task as a ``RunTaskRequest`` or ``RunDescendantTaskRequest``; they look alike."""
        task: dict[str, Any] = {}
        if self.argv:
            task["command"] = {"argv": list(self.argv), "environment": dict(self.environment)}
        else:
            pickled = base64.b64encode(self.pickled).decode()
            task["python"] = {"pickled": pickled, "pythonVersion": PYTHON_VERSION}
        if self.timeout_seconds is not None:
            task["timeout"] = duration(self.timeout_seconds)
        return {"workerId": worker_id, "task": task, "keepWorkerOnError": self.keep_worker_on_error}


def call_task(function: object, *, timeout_seconds: float | None, keep_worker_on_error: bool) -> Task:
    """Return the task of calling *function* with the worker.

    Raises:
        NotPicklable, TooLarge: The function cannot travel.
        ValueError: A setting is not valid.
    """
    return Task(
        pickled=pickle_callable(function, "task", MAX_TASK_BYTES),
        timeout_seconds=timeout_seconds,
        keep_worker_on_error=keep_worker_on_error,
    )


def command_task(
    argv: Sequence[str],
    *,
    environment: Mapping[str, str] | None,
    timeout_seconds: float | None,
    keep_worker_on_error: bool,
) -> Task:
    """Return the task of running a program.

    Raises:
        ValueError: An argument, a variable or a setting is not valid.
    """
    if isinstance(argv, str) or not isinstance(argv, Sequence) or not 1 <= len(argv) <= MAX_ARGUMENTS:
        raise ValueError(f"argv: must be a list of 1 to {MAX_ARGUMENTS:,} strings, not {argv!r:.80}")
    for position, argument in enumerate(argv):
        _require_c_string(f"argv[{position}]", argument)
    if not argv[0]:
        raise ValueError("argv[0]: must name a program")
    for name, value in (environment or {}).items():
        _require_c_string(f"environment[{name!r}]", value)
        if not isinstance(name, str) or not _VARIABLE.fullmatch(name):
            raise ValueError(f"environment: {name!r} cannot be the name of a variable")
    texts = [*argv, *(environment or {}), *(environment or {}).values()]
    if sum(len(text.encode()) for text in texts) > MAX_COMMAND_BYTES:
        raise ValueError(f"argv: with its environment, must be at most {MAX_COMMAND_BYTES:,} bytes")
    return Task(
        argv=tuple(argv),
        environment=dict(environment or {}),
        timeout_seconds=timeout_seconds,
        keep_worker_on_error=keep_worker_on_error,
    )


def event_from_json(event: Json) -> Event | None:
    """Return a ``hayflick.v1.RunTaskResponse``; ``None`` for one that needs no action."""
    if "output" in event:
        output = event["output"]
        stream: Literal["stdout", "stderr"] = (
            "stderr" if output.get("stream") == "STREAM_STDERR" else "stdout"
        )
        return Output(stream, base64.b64decode(output.get("data", "")))
    if "result" in event:
        result = event["result"]
        return Result(
            outcome=result.get("outcome", "").removeprefix("TASK_OUTCOME_"),
            value_json=result.get("valueJson", ""),
            exception=result.get("exception"),
            exit_code=result.get("exitCode", 0),
            signal=result.get("signal", 0),
            end_reason=end_reason(result.get("endReason", "")),
        )
    return None


def finish(run: Callable[[Callable[[Event], None]], None], worker_id: str) -> Any:  # noqa: ANN401 -- any JSON value
    """Print what a task prints as it comes; return what the task returned.

    Args:
        run: Runs the task to its end and hands over each event as it comes.
        worker_id: Names the worker in messages.

    Raises:
        TaskError, TaskTimeout, TaskKilled: The task did not succeed.
        ReplicationDenied, WorkerEnded: Its worker ended under it.
        ServiceUnavailable: The events broke off.
    """
    printers = {"stdout": Printer("stdout"), "stderr": Printer("stderr")}
    result: Result | None = None

    def take(event: Event) -> None:
        nonlocal result
        if isinstance(event, Output):
            printers[event.stream].write(event.data)
        else:
            result = event

    try:
        run(take)
    finally:
        for printer in printers.values():
            printer.close()
    if result is None:
        raise errors.ServiceUnavailable(f"worker {worker_id}: the task's events broke off without a result")
    return value_of(result, worker_id)


def value_of(result: Result, worker_id: str) -> Any:  # noqa: ANN401 -- any JSON value
    """Return the value in *result*, or raise what it says went wrong."""
    match result.outcome:
        case "SUCCEEDED":
            return _loads(result.value_json)
        case "FAILED":
            raise _task_error(result)
        case "TIMED_OUT":
            raise errors.TaskTimeout(f"worker {worker_id}: the task ran out of its time and was killed")
        case "WORKER_ENDED":
            raise _error_table.ended(worker_id, result.end_reason)
    words = {
        "OOM_KILLED": "the kernel killed the task for want of memory",
        "CPU_EXCEEDED": "the task used up its CPU time",
        "OUTPUT_EXCEEDED": "the task printed more than its output limit",
        "MEMORY_EXCEEDED": "the task ran into its memory limit",
        "CANCELLED": "the task was cancelled",
        "SIGNALED": f"signal {result.signal} ended the task",
    }.get(result.outcome, f"the task ended as {result.outcome or 'unknown'}")
    raise errors.TaskKilled(f"worker {worker_id}: {words}", reason=result.outcome, signal=result.signal)


def _task_error(result: Result) -> errors.TaskError:
    exception = result.exception
    if exception is None:
        return errors.TaskError(f"the task exited with code {result.exit_code}", exit_code=result.exit_code)
    kind, message = exception.get("type", ""), exception.get("message", "")
    error = errors.TaskError(
        visible(f"{kind}: {message}" if message else kind),
        type=kind,
        message=message,
        traceback=exception.get("traceback", ""),
        exit_code=result.exit_code,
    )
    if error.traceback:
        error.add_note(visible(f"Inside the sandbox:\n{error.traceback}".rstrip()))
    return error


def _loads(value_json: str) -> Any:  # noqa: ANN401 -- any JSON value
    """Return what the sandbox says a task returned; it may say anything."""
    try:
        return json.loads(value_json) if value_json else None
    except (ValueError, RecursionError):
        raise errors.TaskError(
            "the task's value is not JSON that can be read here", type="replication.TaskResultError"
        ) from None


def _require_c_string(name: str, value: object) -> None:
    if "\0" in _checks.text(name, value, MAX_COMMAND_BYTES):
        raise ValueError(f"{name}: must not contain NUL")
