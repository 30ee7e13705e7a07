"""Reasons and gRPC statuses: one table, both directions."""

from __future__ import annotations

from collections.abc import Mapping

import grpc
from google.protobuf.any_pb2 import Any as AnyProto
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from hayflick.v1.errors_pb2 import ErrorReason as R
from hayflick_rpc import wire
from hayflick_rpc.errors import HayflickError, reason_from_name

DOMAIN = "hayflick"

CODES: Mapping[R.ValueType, grpc.StatusCode] = {
    R.ERROR_REASON_UNSPECIFIED: grpc.StatusCode.UNKNOWN,
    R.ERROR_REASON_INVALID_FIELD: grpc.StatusCode.INVALID_ARGUMENT,
    R.ERROR_REASON_REQUEST_ID_REUSED: grpc.StatusCode.ALREADY_EXISTS,
    R.ERROR_REASON_CONTRACT_UNKNOWN: grpc.StatusCode.NOT_FOUND,
    R.ERROR_REASON_WORKER_UNKNOWN: grpc.StatusCode.NOT_FOUND,
    R.ERROR_REASON_KILL_SWITCH_ENGAGED: grpc.StatusCode.FAILED_PRECONDITION,
    R.ERROR_REASON_QUARANTINED: grpc.StatusCode.FAILED_PRECONDITION,
    R.ERROR_REASON_REPLICA_QUOTA_EXCEEDED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    R.ERROR_REASON_PARENT_UNKNOWN: grpc.StatusCode.FAILED_PRECONDITION,
    R.ERROR_REASON_COOLDOWN_NOT_SATISFIED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    R.ERROR_REASON_DEPTH_EXCEEDED: grpc.StatusCode.FAILED_PRECONDITION,
    R.ERROR_REASON_ROOT_DEPTH_NOT_ZERO: grpc.StatusCode.INVALID_ARGUMENT,
    R.ERROR_REASON_MANIFEST_SIGNATURE_INVALID: grpc.StatusCode.PERMISSION_DENIED,
    R.ERROR_REASON_MANIFEST_ALREADY_USED: grpc.StatusCode.FAILED_PRECONDITION,
    R.ERROR_REASON_MANIFEST_EXPIRED: grpc.StatusCode.FAILED_PRECONDITION,
    R.ERROR_REASON_STOP_CONDITION_TRIGGERED: grpc.StatusCode.FAILED_PRECONDITION,
    R.ERROR_REASON_WORKER_EXPIRED: grpc.StatusCode.FAILED_PRECONDITION,
    R.ERROR_REASON_WORKER_NOT_RUNNING: grpc.StatusCode.FAILED_PRECONDITION,
    R.ERROR_REASON_LIMIT_NOT_ENFORCEABLE: grpc.StatusCode.FAILED_PRECONDITION,
    R.ERROR_REASON_SANDBOX_FAILED: grpc.StatusCode.INTERNAL,
    R.ERROR_REASON_AUDIT_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    R.ERROR_REASON_NODE_ALREADY_CONNECTED: grpc.StatusCode.ALREADY_EXISTS,
    R.ERROR_REASON_NODE_SESSION_INVALID: grpc.StatusCode.UNAUTHENTICATED,
    R.ERROR_REASON_PYTHON_VERSION_MISMATCH: grpc.StatusCode.INVALID_ARGUMENT,
    R.ERROR_REASON_NOT_A_DESCENDANT: grpc.StatusCode.PERMISSION_DENIED,
    R.ERROR_REASON_TASK_TIMEOUT: grpc.StatusCode.DEADLINE_EXCEEDED,
    R.ERROR_REASON_CONTROLLER_NOT_ALLOWED: grpc.StatusCode.PERMISSION_DENIED,
    R.ERROR_REASON_NODE_FULL: grpc.StatusCode.RESOURCE_EXHAUSTED,
    R.ERROR_REASON_SERVICE_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    R.ERROR_REASON_TOO_LARGE: grpc.StatusCode.INVALID_ARGUMENT,
    R.ERROR_REASON_INTERNAL: grpc.StatusCode.INTERNAL,
    R.ERROR_REASON_PAGE_TOKEN_INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    R.ERROR_REASON_CALLER_NOT_ALLOWED: grpc.StatusCode.PERMISSION_DENIED,
    R.ERROR_REASON_SHUTTING_DOWN: grpc.StatusCode.UNAVAILABLE,
    R.ERROR_REASON_JOURNAL_CORRUPT: grpc.StatusCode.DATA_LOSS,
    R.ERROR_REASON_EXCEEDS_PARENT: grpc.StatusCode.PERMISSION_DENIED,
    R.ERROR_REASON_FAMILY_BUDGET_EXCEEDED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    R.ERROR_REASON_ISOLATION_INSUFFICIENT: grpc.StatusCode.FAILED_PRECONDITION,
    R.ERROR_REASON_HELD_BY_KERNEL: grpc.StatusCode.RESOURCE_EXHAUSTED,
    R.ERROR_REASON_FILE_UNKNOWN: grpc.StatusCode.NOT_FOUND,
    R.ERROR_REASON_FILE_REFUSED: grpc.StatusCode.FAILED_PRECONDITION,
    R.ERROR_REASON_NOT_NARROWER: grpc.StatusCode.FAILED_PRECONDITION,
    R.ERROR_REASON_EVIDENCE_UNKNOWN: grpc.StatusCode.NOT_FOUND,
    R.ERROR_REASON_KEY_REVOKED: grpc.StatusCode.PERMISSION_DENIED,
    R.ERROR_REASON_KEY_UNKNOWN: grpc.StatusCode.NOT_FOUND,
    R.ERROR_REASON_BEYOND_THE_LOG: grpc.StatusCode.OUT_OF_RANGE,
}

# What a status without our ErrorInfo means: it was made by gRPC itself.
_BARE: Mapping[grpc.StatusCode, R.ValueType] = {
    grpc.StatusCode.UNAVAILABLE: R.ERROR_REASON_SERVICE_UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: R.ERROR_REASON_SERVICE_UNAVAILABLE,
    grpc.StatusCode.CANCELLED: R.ERROR_REASON_SERVICE_UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED: R.ERROR_REASON_TOO_LARGE,
}


def _pack(message: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo) -> AnyProto:
    packed = AnyProto()
    packed.Pack(message)
    return packed


def to_status(error: HayflickError) -> grpc.Status:
    """Return *error* as a status for ``context.abort_with_status``."""
    details = [
        _pack(error_details_pb2.ErrorInfo(reason=error.reason_name, domain=DOMAIN, metadata=error.metadata))
    ]
    if error.retry_after_seconds is not None:
        delay = wire.duration(error.retry_after_seconds)
        details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
    code: int = CODES[error.reason].value[0]
    return rpc_status.to_status(status_pb2.Status(code=code, message=error.message, details=details))


def from_rpc_error(error: grpc.RpcError) -> HayflickError:
    """Return the :class:`HayflickError` that *error* carries over the wire."""
    code = error.code() if isinstance(error, grpc.Call | grpc.aio.AioRpcError) else grpc.StatusCode.UNKNOWN
    text = (error.details() if isinstance(error, grpc.Call | grpc.aio.AioRpcError) else "") or str(code)
    retry_after_seconds: float | None = None
    info = error_details_pb2.ErrorInfo()
    try:
        # The stubs know only the sync call; at run time the aio error has the
        # same two methods that from_call reads.
        rich = rpc_status.from_call(error)  # type: ignore[arg-type]
    except (ValueError, AttributeError):
        rich = None  # details that contradict the status: not ours
    for detail in rich.details if rich is not None else ():
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            detail.Unpack(info)
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            retry_after_seconds = wire.seconds(retry.retry_delay)
    if info.domain == DOMAIN:
        reason = reason_from_name(info.reason)
        return HayflickError(
            reason, text, metadata=dict(info.metadata), retry_after_seconds=retry_after_seconds
        )
    return HayflickError(_BARE.get(code, R.ERROR_REASON_INTERNAL), text, metadata={"code": code.name})
