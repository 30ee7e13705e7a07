"""A task's own process: from init's fork to the user's code.

A task is a program (exec) or a Python entry point (call). An entry point is a
``module:function`` that takes the payload, a :class:`Channel` and a dict of
facts, and returns something that JSON can say. Nothing here unpickles; what
the payload means is the entry point's business.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from hayflick_sandbox import families, forks, frames, syscalls
from hayflick_sandbox.messages import RunTask

CONTROL_FD = 3
EXIT_FAILED = 1
EXIT_CANNOT_EXECUTE = 126
EXIT_NOT_FOUND = 127
MAX_TRACEBACK_CHARS = 64 * 1024
MAX_VALUE_BYTES = 16 * 1024 * 1024


class CallError(Exception):
    """The orchestrator refused what the task asked for."""

    def __init__(self, error: Mapping[str, Any]) -> None:
        super().__init__(str(error.get("message", "")))
        self.reason = str(error.get("reason", ""))
        self.message = str(error.get("message", ""))
        self.metadata: dict[str, str] = dict(error.get("metadata") or {})
        self.retry_after_seconds: float | None = error.get("retry_after_seconds")


class Channel:
    """A task's line to its orchestrator; one call at a time, from any thread."""

    CallError = CallError

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._ids = itertools.count(1)
        import threading  # not with this module: see forks

        self._lock = threading.Lock()

    def call(
        self,
        method: str,
        request: dict[str, Any],
        on_event: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """Call *method* of the worker's WorkerService; messages are proto3 JSON.

        Raises:
            CallError: it was refused; its reason says why.
            ConnectionError: the orchestrator is gone.
        """
        with self._lock:
            number = next(self._ids)
            header = {"type": "call", "id": number, "method": method, "request": request}
            frames.write_frame(self._sock, header)
            while True:
                frame = frames.read_frame(self._sock)
                if frame is None:
                    raise ConnectionError("the orchestrator is gone")
                answer, _ = frame
                if answer["type"] == "event" and on_event is not None:
                    on_event(answer["event"])
                elif answer["type"] == "reply":
                    response: dict[str, Any] = answer["response"]
                    return response
                elif answer["type"] == "error":
                    raise CallError(answer)


def run(
    task: RunTask,
    descriptors: list[int],
    environment: Mapping[str, str],
    *,
    serial: int,
    cpu_time: int | None,
) -> NoReturn:
    """Become the task, in a process just forked from init. Never returns."""
    status = EXIT_FAILED
    try:
        arrange(descriptors, serial, cpu_time)
        environment = {**environment, **(task.environment or {})}
        if task.kind == "exec":
            status = _execute(task.argv, environment)
        else:
            os.environ.clear()
            os.environ.update(environment)
            status = _call(task.entry)
    except BaseException:  # noqa: BLE001 -- nothing may return into init's loop
        _last_words(traceback.format_exc(limit=-3))
    finally:
        os._exit(status)


def arrange(descriptors: list[int], serial: int, cpu_time: int | None) -> None:
    """Take init's place: own session, own mark, own stdio, default signals, nothing of init's."""
    forks.catch_up()
    os.setsid()
    families.mark(serial)
    signal.set_wakeup_fd(-1)
    # The zygote and init ignore some, Python others, and an exec would hand that down.
    for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    # All copies lie above the targets, whatever numbers came in.
    copies = [_above(descriptor, CONTROL_FD + 1) for descriptor in (0, *descriptors)]
    for target, descriptor in enumerate(copies):
        os.dup2(descriptor, target, inheritable=target < CONTROL_FD)
    syscalls.close_range(len(copies))
    if cpu_time is not None:
        # Soft below hard: SIGXCPU tells this limit from any other SIGKILL.
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_time, cpu_time + 1))


def _above(descriptor: int, floor: int) -> int:
    import fcntl  # rarely needed elsewhere; init has it loaded already

    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, floor)


def _execute(argv: tuple[str, ...], environment: Mapping[str, str]) -> int:
    try:
        os.execvpe(argv[0], argv, environment)
    except FileNotFoundError:
        _last_words(f"{argv[0]}: not found in the sandbox\n")
        return EXIT_NOT_FOUND
    except OSError as error:
        _last_words(f"{argv[0]}: {error.strerror}\n")
        return EXIT_CANNOT_EXECUTE


def _call(entry: str) -> int:
    # Python turns these into BrokenPipeError and EFBIG; a callable expects Python.
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    gc.enable()
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 -- lives as long as the process
    sys.stdout = open(1, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.argv = [""]
    with socket.socket(fileno=CONTROL_FD) as control:
        frame = frames.read_frame(control)
        if frame is None:
            return EXIT_FAILED
        header, payload = frame
        try:
            module, _, name = entry.partition(":")
            function = getattr(importlib.import_module(module), name)
            body = _as_json(function(payload, Channel(control), header["info"]))
        except BaseException as error:  # noqa: BLE001 -- whatever user code raises is data
            _flush()
            frames.write_frame(control, {"type": "exception", "exception": _describe(error)})
            return EXIT_FAILED
        _flush()
        frames.write_frame(control, {"type": "result"}, body)
        return 0


class TaskResultError(Exception):
    """What a callable returned is not something that JSON can say."""


def _as_json(value: object) -> bytes:
    try:
        body = json.dumps(value, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise TaskResultError(f"a task must return what JSON can say: {error}") from None
    if len(body) > MAX_VALUE_BYTES:
        raise TaskResultError(f"a task may return at most {MAX_VALUE_BYTES} bytes of JSON, not {len(body)}")
    return body


def _describe(error: BaseException) -> dict[str, str]:
    kind = type(error)
    name = (
        "replication.TaskResultError" if kind is TaskResultError else f"{kind.__module__}.{kind.__qualname__}"
    )
    try:
        message = str(error)
    except Exception:  # noqa: BLE001 -- a __str__ of the user's may do anything
        message = "(its __str__ failed)"
    try:
        text = "".join(traceback.format_exception(error))
    except Exception:  # noqa: BLE001
        text = ""
    return {
        "type": name[:1024],
        "message": message[:MAX_TRACEBACK_CHARS],
        "traceback": text[-MAX_TRACEBACK_CHARS:],
    }


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue  # its reader is gone, or the task closed it


def _last_words(text: str) -> None:
    try:
        os.write(2, text.encode(errors="backslashreplace"))
    except OSError:
        return
