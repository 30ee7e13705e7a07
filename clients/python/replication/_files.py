"""Files into and out of workers, as streams of the wire."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

from hayflick.v1 import orchestrator_pb2 as pb
from replication import _checks
from replication.errors import ServiceUnavailable

PIECE_BYTES = 512 * 1024
MAX_FILE_BYTES = 1024 * 1024 * 1024
DEFAULT_GET_BYTES = 64 * 1024 * 1024
MAX_PATH_CHARS = 4_095


@dataclass(frozen=True)
class FileSummary:
    """What was transferred.

    Attributes:
        size_bytes: How many bytes.
        sha256: Their SHA-256, in hexadecimal.
    """

    size_bytes: int
    sha256: str


def readable(data: object) -> BinaryIO:
    """Return *data* as something to read.

    Raises:
        ValueError: It is neither bytes nor a file opened for reading bytes.
    """
    if isinstance(data, bytes | bytearray | memoryview):
        return io.BytesIO(data)
    if isinstance(data, io.TextIOBase) or not hasattr(data, "read"):
        raise ValueError(f"data: must be bytes or a file opened in binary mode, not {type(data).__name__}")
    return cast("BinaryIO", data)


def checked_path(path: str) -> str:
    """Return *path* when it is text; whether it is good the service says."""
    return _checks.text("path", path, MAX_PATH_CHARS, min_chars=1)


def requests(worker_id: str, path: str, data: BinaryIO, *, executable: bool) -> Iterator[pb.PutFileRequest]:
    """Yield what ``PutFile`` wants to hear of *data*."""
    header = pb.PutFileHeader(worker_id=worker_id, path=path, executable=executable)
    yield pb.PutFileRequest(header=header)
    digest, size = hashlib.sha256(), 0
    while piece := data.read(PIECE_BYTES):
        digest.update(piece)
        size += len(piece)
        yield pb.PutFileRequest(data=piece)
    yield pb.PutFileRequest(summary=pb.FileSummary(size_bytes=size, sha256=digest.hexdigest()))


def receive(responses: Iterable[pb.GetFileResponse], into: BinaryIO) -> FileSummary:
    """Write what ``GetFile`` sends to *into*; return what it was.

    Raises:
        ServiceUnavailable: The stream broke off, or is not what its summary says.
    """
    digest, size, summary = hashlib.sha256(), 0, None
    for response in responses:
        if response.HasField("summary"):
            summary = response.summary
        else:
            digest.update(response.data)
            size += len(response.data)
            into.write(response.data)
    if summary is None or (summary.size_bytes, summary.sha256) != (size, digest.hexdigest()):
        raise ServiceUnavailable("the file broke off before its end; what came of it is not all")
    return FileSummary(size, digest.hexdigest())
