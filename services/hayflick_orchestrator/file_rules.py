"""Files into and out of workers: what may be asked, and what the kernel's answer means. Pure."""

from __future__ import annotations

import errno
import math
from typing import TYPE_CHECKING

from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_rpc.errors import HayflickError, invalid_field

if TYPE_CHECKING:
    from hayflick.v1.orchestrator_pb2 import FileSummary

_MIB = 1024 * 1024
# linux/limits.h: PATH_MAX less its NUL, NAME_MAX.
MAX_PATH_BYTES = 4_095
MAX_NAME_BYTES = 255
MAX_FILE_BYTES = 1024 * _MIB
DEFAULT_GET_BYTES = 64 * _MIB
MAX_PIECE_BYTES = _MIB
# A transfer in all, however fast it goes.
TRANSFER_SECONDS = 900.0

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def file_path(path: str) -> str:
    """Return *path* when it names something within a workspace.

    Raises:
        HayflickError: INVALID_FIELD.
    """
    if not path or path.startswith("/"):
        raise invalid_field("path", "must be relative to the workspace")
    if "\0" in path or len(path.encode()) > MAX_PATH_BYTES:
        raise invalid_field("path", f"must be at most {MAX_PATH_BYTES} bytes without NUL")
    for name in path.split("/"):
        if name in ("", ".", ".."):
            raise invalid_field("path", "no component may be empty, '.' or '..'")
        if len(name.encode()) > MAX_NAME_BYTES:
            raise invalid_field("path", f"no component may be longer than {MAX_NAME_BYTES} bytes")
    return path


def get_limit(max_bytes: int) -> int:
    """Return how large a file may be that is asked for with *max_bytes*.

    Raises:
        HayflickError: INVALID_FIELD.
    """
    if max_bytes > MAX_FILE_BYTES:
        raise invalid_field("max_bytes", f"must be at most {MAX_FILE_BYTES}")
    return max_bytes or DEFAULT_GET_BYTES


def check_summary(summary: FileSummary | None, size_bytes: int, sha256: str) -> None:
    """Check that what came is what the sender says it sent.

    Raises:
        HayflickError: INVALID_FIELD.
    """
    if summary is None:
        raise invalid_field("summary", "must come last: without it nothing is written")
    if summary.size_bytes != size_bytes:
        raise invalid_field("summary.size_bytes", f"is {summary.size_bytes}, but {size_bytes} bytes came")
    if summary.sha256 and summary.sha256.lower() != sha256:
        raise invalid_field("summary.sha256", f"is not that of the bytes that came, {sha256}")


def refusal(worker_id: str, path: str, number: int, limit_bytes: int) -> HayflickError:
    """Return what the errno *number*, by which a transfer ended, means to its caller.

    Args:
        worker_id: Whose file.
        path: Which.
        number: From the process that tried, by way of init.
        limit_bytes: How large the file might be.
    """
    name = errno.errorcode.get(number, str(number))
    metadata = {"worker_id": worker_id, "path": path, "errno": name}
    if number == errno.ENOENT:
        return HayflickError(
            ErrorReason.ERROR_REASON_FILE_UNKNOWN,
            f"worker {worker_id} has no file {path!r}",
            metadata=metadata,
        )
    if number in _NO_ROOM:
        return HayflickError(
            ErrorReason.ERROR_REASON_TOO_LARGE,
            f"{path!r} is over the limit of {limit_bytes} bytes"
            if number == errno.EFBIG
            else f"{path!r} finds no room in the workspace, which is bounded in bytes and in files",
            metadata={**metadata, "limit_bytes": str(limit_bytes)},
        )
    if number in (errno.EAGAIN, errno.ENOMEM):
        limit = "pids" if number == errno.EAGAIN else "memory"
        return HayflickError(
            ErrorReason.ERROR_REASON_NODE_FULL,
            f"worker {worker_id} used up its {limit}: nothing is left to transfer a file with",
            metadata={**metadata, "limit": limit},
        )
    return refused(worker_id, path, name)


def refused(worker_id: str, path: str, cause: str) -> HayflickError:
    """Return the refusal of a file that is none, or of a worker that keeps it to itself."""
    return HayflickError(
        ErrorReason.ERROR_REASON_FILE_REFUSED,
        f"worker {worker_id}: {path!r} is not a file that can be had or written ({cause})",
        metadata={"worker_id": worker_id, "path": path, "errno": cause},
    )


def too_large(path: str, limit_bytes: int) -> HayflickError:
    """Return the refusal of a file over *limit_bytes*."""
    return HayflickError(
        ErrorReason.ERROR_REASON_TOO_LARGE,
        f"{path!r} is over the limit of {limit_bytes} bytes",
        metadata={"path": path, "limit_bytes": str(limit_bytes)},
    )


class Patience:
    """How long a transfer may go on: while it moves, and not for ever.

    Args:
        path: Of the file, for the refusal.
        now_monotonic: When the transfer began.
    """

    def __init__(self, path: str, now_monotonic: float) -> None:
        self._path = path
        self._deadline = now_monotonic + TRANSFER_SECONDS
        self._moved_at = now_monotonic

    def moved(self, now_monotonic: float) -> None:
        """Note that something went through."""
        self._moved_at = now_monotonic

    def require(self, now_monotonic: float, stall_seconds: float = math.inf, who: str = "") -> None:
        """Go on.

        Raises:
            HayflickError: TASK_TIMEOUT: *who* did nothing for *stall_seconds*, or the transfer
                took too long in all, however steadily it drips.
        """
        if now_monotonic > self._deadline:
            raise _timed_out(self._path, "the transfer was not done", TRANSFER_SECONDS)
        if now_monotonic - self._moved_at > stall_seconds:
            raise _timed_out(self._path, f"{who} did nothing", stall_seconds)


def _timed_out(path: str, what: str, seconds: float) -> HayflickError:
    return HayflickError(
        ErrorReason.ERROR_REASON_TASK_TIMEOUT,
        f"{path!r}: {what} for {seconds:g} s",
        metadata={"path": path, "timeout_seconds": f"{seconds:g}"},
    )
