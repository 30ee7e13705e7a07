"""From what the wire says to what this package raises: one table."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from replication import errors
from replication._records import EndReason

# By the reason in google.rpc.ErrorInfo.
BY_REASON: Mapping[str, type[errors.HayflickError]] = {
    "INVALID_FIELD": errors.InvalidField,
    "REQUEST_ID_REUSED": errors.InternalError,
    "CONTRACT_UNKNOWN": errors.NotFound,
    "WORKER_UNKNOWN": errors.NotFound,
    "KILL_SWITCH_ENGAGED": errors.ReplicationDenied,
    "QUARANTINED": errors.ReplicationDenied,
    "REPLICA_QUOTA_EXCEEDED": errors.ReplicationDenied,
    "PARENT_UNKNOWN": errors.ReplicationDenied,
    "COOLDOWN_NOT_SATISFIED": errors.ReplicationDenied,
    "DEPTH_EXCEEDED": errors.ReplicationDenied,
    "ROOT_DEPTH_NOT_ZERO": errors.ReplicationDenied,
    "MANIFEST_SIGNATURE_INVALID": errors.ReplicationDenied,
    "MANIFEST_ALREADY_USED": errors.ReplicationDenied,
    "MANIFEST_EXPIRED": errors.ReplicationDenied,
    "STOP_CONDITION_TRIGGERED": errors.ReplicationDenied,
    "WORKER_EXPIRED": errors.ReplicationDenied,
    "WORKER_NOT_RUNNING": errors.WorkerEnded,
    "LIMIT_NOT_ENFORCEABLE": errors.LimitNotEnforceable,
    "SANDBOX_FAILED": errors.SandboxFailed,
    "AUDIT_UNAVAILABLE": errors.ServiceUnavailable,
    "NODE_ALREADY_CONNECTED": errors.ServiceUnavailable,
    "NODE_SESSION_INVALID": errors.ServiceUnavailable,
    "PYTHON_VERSION_MISMATCH": errors.PythonVersionMismatch,
    "NOT_A_DESCENDANT": errors.NotAllowed,
    "TASK_TIMEOUT": errors.TaskTimeout,
    "CONTROLLER_NOT_ALLOWED": errors.ReplicationDenied,
    "NODE_FULL": errors.NodeFull,
    "SERVICE_UNAVAILABLE": errors.ServiceUnavailable,
    "TOO_LARGE": errors.TooLarge,
    "INTERNAL": errors.InternalError,
    "PAGE_TOKEN_INVALID": errors.InternalError,
    "CALLER_NOT_ALLOWED": errors.NotAllowed,
    "SHUTTING_DOWN": errors.ServiceUnavailable,
    "JOURNAL_CORRUPT": errors.JournalCorrupt,
    "EXCEEDS_PARENT": errors.ReplicationDenied,
    "FAMILY_BUDGET_EXCEEDED": errors.ReplicationDenied,
    "ISOLATION_INSUFFICIENT": errors.ReplicationDenied,
    "HELD_BY_KERNEL": errors.ReplicationDenied,
    "FILE_UNKNOWN": errors.NotFound,
    "FILE_REFUSED": errors.NotAllowed,
    "NOT_NARROWER": errors.NotAllowed,
    "EVIDENCE_UNKNOWN": errors.NotFound,
    "KEY_REVOKED": errors.ReplicationDenied,
    "KEY_UNKNOWN": errors.NotFound,
    "BEYOND_THE_LOG": errors.NotFound,
}

# By the status code, where gRPC itself made the status or a newer service
# sent a reason that is unknown here.
BY_CODE: Mapping[str, type[errors.HayflickError]] = {
    "CANCELLED": errors.ServiceUnavailable,
    "UNKNOWN": errors.InternalError,
    "INVALID_ARGUMENT": errors.InvalidField,
    "DEADLINE_EXCEEDED": errors.ServiceUnavailable,
    "NOT_FOUND": errors.NotFound,
    "ALREADY_EXISTS": errors.InternalError,
    "PERMISSION_DENIED": errors.NotAllowed,
    "RESOURCE_EXHAUSTED": errors.TooLarge,
    "FAILED_PRECONDITION": errors.ReplicationDenied,
    "ABORTED": errors.ServiceUnavailable,
    "OUT_OF_RANGE": errors.InvalidField,
    "UNIMPLEMENTED": errors.InternalError,
    "INTERNAL": errors.InternalError,
    "UNAVAILABLE": errors.ServiceUnavailable,
    "DATA_LOSS": errors.JournalCorrupt,
    "UNAUTHENTICATED": errors.NotAllowed,
}

# A worker whose life is over by policy was denied; any other merely ended.
DENIED_BY_END: Mapping[EndReason, str] = {
    EndReason.EXPIRED: "WORKER_EXPIRED",
    EndReason.KILL_SWITCH: "KILL_SWITCH_ENGAGED",
}


def error(
    reason: str,
    message: str,
    details: Mapping[str, str] = MappingProxyType({}),
    *,
    retry_after_seconds: float | None = None,
    code: str = "UNKNOWN",
) -> errors.HayflickError:
    """Return the exception for a *reason*, or for the status *code* where it is not known."""
    cls = BY_REASON.get(reason) or BY_CODE.get(code, errors.InternalError)
    if cls is errors.WorkerEnded:
        word = details.get("end_reason", "").upper().removeprefix("END_REASON_")
        end = EndReason.__members__.get(word)
        if end is not None and end in DENIED_BY_END:
            return errors.ReplicationDenied(message, reason=DENIED_BY_END[end], details=details)
        if end is not None:
            message += f" ({end.value})"
    if issubclass(cls, errors.LimitNotEnforceable):
        message = _with_remedy(message, details)
    return cls(message, reason=reason, details=details, retry_after_seconds=retry_after_seconds)


def ended(worker_id: str, reason: EndReason | None, detail: str = "") -> errors.HayflickError:
    """Return the exception for a task that a worker can no longer do."""
    word = reason.value if reason is not None else "unknown"
    message = f"worker {worker_id} has ended: {word}" + (f" ({detail})" if detail else "")
    details = {"worker_id": worker_id, "end_reason": word}
    if reason is not None and reason in DENIED_BY_END:
        return errors.ReplicationDenied(message, reason=DENIED_BY_END[reason], details=details)
    return errors.WorkerEnded(message, details=details)


def _with_remedy(message: str, details: Mapping[str, str]) -> str:
    """Return *message* with the layer and the remedy, where it does not name them itself."""
    for name in ("layer", "remedy"):
        fact = details.get(name, "")
        if fact and fact not in message:
            message += f"; {name}: {fact}"
    return message
