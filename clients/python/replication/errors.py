"""Everything this package raises on purpose, as one tree.

::

    HayflickError                  has .reason, .details, .retry_after_seconds
    ├── ReplicationDenied          policy said no; reason says which rule
    ├── TaskFailed                 a task did not succeed
    │   ├── TaskError              it raised, or its program exited with a code
    │   ├── TaskTimeout            it ran longer than you allowed   (TimeoutError)
    │   └── TaskKilled             a signal or one of its limits ended it
    ├── WorkerEnded                the worker does not run any more
    ├── InvalidField               a value is not valid             (ValueError)
    ├── NotFound                   no such worker, contract or file (LookupError)
    ├── NotAllowed                 not yours to do                  (PermissionError)
    ├── NotPicklable               the callable cannot travel       (TypeError)
    ├── TooLarge                   over a size limit                (ValueError)
    ├── PythonVersionMismatch      the node runs another Python
    ├── LimitNotEnforceable        this machine lacks a layer of the sandbox
    ├── SandboxFailed              the sandbox could not be built
    ├── NodeFull                   the node has no room
    ├── ServiceUnavailable         a service is not there; try again  (ConnectionError)
    ├── JournalCorrupt             the record was tampered with
    └── InternalError              a fault of Hayflick's own

Programs react to the class and to ``reason``, a stable word such as
``"COOLDOWN_NOT_SATISFIED"``. Messages are for people and may change.

Cheap to import, inside a sandbox as well: the standard library alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

__all__ = [
    "HayflickError",
    "InternalError",
    "InvalidField",
    "JournalCorrupt",
    "LimitNotEnforceable",
    "NodeFull",
    "NotAllowed",
    "NotFound",
    "NotPicklable",
    "PythonVersionMismatch",
    "ReplicationDenied",
    "SandboxFailed",
    "ServiceUnavailable",
    "TaskError",
    "TaskFailed",
    "TaskKilled",
    "TaskTimeout",
    "TooLarge",
    "WorkerEnded",
]


class HayflickError(Exception):
    """The root of the tree.

    Attributes:
        reason: Why, for programs: the name of a ``hayflick.v1.ErrorReason``.
        details: The facts that the reason names, as text.
        retry_after_seconds: When trying again can help; ``None`` when unknown.
    """

    default_reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        details: Mapping[str, str] = MappingProxyType({}),
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason or self.default_reason
        self.details = dict(details)
        self.retry_after_seconds = retry_after_seconds


class ReplicationDenied(HayflickError):
    """Policy said no: the birth, or the task of a worker whose life is over.

    Nothing is broken. ``reason`` says which rule: ``KILL_SWITCH_ENGAGED``,
    ``QUARANTINED``, ``REPLICA_QUOTA_EXCEEDED``, ``PARENT_UNKNOWN``,
    ``COOLDOWN_NOT_SATISFIED`` (with ``retry_after_seconds``), ``DEPTH_EXCEEDED``,
    ``ROOT_DEPTH_NOT_ZERO``, ``MANIFEST_SIGNATURE_INVALID``,
    ``MANIFEST_ALREADY_USED``, ``MANIFEST_EXPIRED``, ``STOP_CONDITION_TRIGGERED``
    (``details["condition"]`` names it), ``WORKER_EXPIRED``,
    ``CONTROLLER_NOT_ALLOWED``, ``EXCEEDS_PARENT`` (``details["field"]`` names the
    limit), ``FAMILY_BUDGET_EXCEEDED``, ``ISOLATION_INSUFFICIENT`` or ``HELD_BY_KERNEL``.
    """


class TaskFailed(HayflickError):
    """A task did not succeed, for a reason of its own. Its worker ended with it
    under the limit's own name, or as ``task_error``, unless you asked to keep it.
    """  # noqa: D205 -- one thought

    default_reason = "TASK_FAILED"


class TaskError(TaskFailed):
    """Your task raised, or its program exited with a code other than zero.

    All of it is data that was made inside the sandbox; nothing was unpickled.

    Attributes:
        type: The exception's class, qualified by its module; ``""`` for a program.
        message: Its text.
        traceback: Its traceback inside the sandbox, as Python prints it.
        exit_code: The exit code of a program, or of a task that left early.
    """

    default_reason = "TASK_ERROR"

    def __init__(
        self,
        text: str,
        *,
        type: str = "",  # noqa: A002 -- the name that the wire and users have for it
        message: str = "",
        traceback: str = "",
        exit_code: int = 0,
    ) -> None:
        super().__init__(text)
        self.type = type
        self.message = message
        self.traceback = traceback
        self.exit_code = exit_code


class TaskTimeout(TaskFailed, TimeoutError):
    """Your task ran longer than the ``timeout_seconds`` you gave; it was killed."""

    default_reason = "TASK_TIMEOUT"


class TaskKilled(TaskFailed):
    """Something ended the task from outside of it.

    ``reason`` is ``OOM_KILLED``, ``MEMORY_EXCEEDED``, ``CPU_EXCEEDED``,
    ``OUTPUT_EXCEEDED``, ``CANCELLED`` or ``SIGNALED``.

    Attributes:
        signal: The signal that ended it, or 0.
    """

    default_reason = "SIGNALED"

    def __init__(self, message: str, *, reason: str = "", signal: int = 0) -> None:
        super().__init__(message, reason=reason)
        self.signal = signal


class WorkerEnded(HayflickError):
    """The worker does not run any more; ``details`` has its ``end_reason``. Make another.

    A worker that ended by its expiry or by the kill switch is a
    :class:`ReplicationDenied` instead.
    """

    default_reason = "WORKER_NOT_RUNNING"


class InvalidField(HayflickError, ValueError):
    """A value you gave is not valid; ``details["field"]`` names it. Change it."""

    default_reason = "INVALID_FIELD"


class NotFound(HayflickError, LookupError):
    """There is no such worker, contract or file: the name is wrong, or of other services."""

    default_reason = "WORKER_UNKNOWN"


class NotAllowed(HayflickError, PermissionError):
    """It is not yours to do: a worker acts on itself and its descendants only, and
    what is no regular file of its workspace is not handed over (``FILE_REFUSED``).
    """  # noqa: D205 -- one thought

    default_reason = "CALLER_NOT_ALLOWED"


class NotPicklable(HayflickError, TypeError):
    """Your callable holds something that cannot travel; the message names it.

    Make it inside the task, or pass plain values.
    """

    default_reason = "CALLABLE_NOT_PICKLABLE"


class TooLarge(HayflickError, ValueError):
    """What you sent is over a size limit; ``details["limit_bytes"]`` has it."""

    default_reason = "TOO_LARGE"


class PythonVersionMismatch(HayflickError):
    """The node runs another Python than you do; run a command, or use the same."""

    default_reason = "PYTHON_VERSION_MISMATCH"


class LimitNotEnforceable(HayflickError):
    """This machine cannot enforce a limit, so nothing was started.

    ``details`` has the ``layer`` of the sandbox that is missing and the
    ``remedy``. An operator who accepts the loss names the layer in
    ``HAYFLICK_ALLOW_DEGRADED``, which embedded services read; an orchestrator
    started by hand takes ``--allow-degraded``.
    """

    default_reason = "LIMIT_NOT_ENFORCEABLE"


class SandboxFailed(HayflickError):
    """The sandbox could not be built; ``details`` has the ``step`` and ``errno``."""

    default_reason = "SANDBOX_FAILED"


class NodeFull(HayflickError):
    """The node has no room; ``details["limit"]`` says of what. End some workers."""

    default_reason = "NODE_FULL"


class ServiceUnavailable(HayflickError, ConnectionError):
    """A service is not there, or cannot record what it decides. Nothing was done
    half; try again.
    """  # noqa: D205 -- one thought

    default_reason = "SERVICE_UNAVAILABLE"


class JournalCorrupt(HayflickError):
    """Recorded entries do not follow from one another: the journal was changed."""

    default_reason = "JOURNAL_CORRUPT"


class InternalError(HayflickError):
    """A fault of Hayflick's own; ``details["error_id"]`` finds it in the service's log."""
