"""Where a log is read from: a directory of its files, or a running logger."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from hayflick.v1 import logger_pb2, logger_pb2_grpc
from hayflick_cli.failure import Failure, words_of
from hayflick_tlog.note import BadNote, Verifier

CALL_SECONDS = 60.0
MAX_MESSAGE_BYTES = 24 * 1024 * 1024


@dataclass(frozen=True)
class LogSource:
    """A log that can be read.

    Attributes:
        read: Returns a file by its path; raises OSError when there is none.
        checkpoint: The signed head.
        stated_key: The key that the source itself names; ``None`` when it names none.
        prove: Returns the hashes that prove an entry's place in a tree of a size, in this
            order; raises OSError when there are none. ``None`` where no logger runs.
        data_dir: The logger's own directory, where the log lies in one.
    """

    read: Callable[[str], bytes]
    checkpoint: str
    stated_key: str | None
    prove: Callable[[int, int], tuple[bytes, ...]] | None = None
    data_dir: Path | None = None


@contextmanager
def open_source(where: str) -> Iterator[LogSource]:
    """Open the log at *where*: a directory, or the ``unix:`` address of a logger.

    Raises:
        Failure: there is no log.
    """
    if not where.startswith("unix:"):
        yield _directory(Path(where))
        return
    options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(where, options=options) as channel:
        stub = logger_pb2_grpc.LoggerServiceStub(channel)
        try:
            head = stub.GetCheckpoint(logger_pb2.GetCheckpointRequest(), timeout=CALL_SECONDS)
        except grpc.RpcError as error:
            raise Failure(f"no logger answers at {where}: {words_of(error)}") from None

        def read(path: str) -> bytes:
            try:
                return bytes(stub.GetTile(logger_pb2.GetTileRequest(path=path), timeout=CALL_SECONDS).data)
            except grpc.RpcError as error:
                raise OSError(words_of(error)) from None

        def prove(index: int, tree_size: int) -> tuple[bytes, ...]:
            request = logger_pb2.GetInclusionProofRequest(index=index, tree_size=tree_size)
            try:
                return tuple(stub.GetInclusionProof(request, timeout=CALL_SECONDS).hashes)
            except grpc.RpcError as error:
                raise OSError(words_of(error)) from None

        yield LogSource(read, head.checkpoint, head.verifier_key, prove)


def load_key(key: str) -> Verifier:
    """Return the verifier key in *key*: the key itself, or a file that holds it.

    Raises:
        Failure: it is neither.
    """
    path = Path(key)
    try:
        text = read_text(path) if "+" not in key or path.is_file() else key
        return Verifier.parse(text)
    except BadNote as error:
        raise Failure(f"--key: {error}") from None


def _directory(directory: Path) -> LogSource:
    # A logger's own directory holds the log in one of this name.
    own = (directory / "log" / "checkpoint").exists()
    root = directory / "log" if own else directory
    public = directory / "log.pub"
    return LogSource(
        lambda path: (root / path).read_bytes(),
        read_text(root / "checkpoint"),
        read_text(public) if public.is_file() else None,
        data_dir=directory if own else None,
    )


def read_text(path: Path) -> str:
    """Return what is in the file at *path*.

    Raises:
        Failure: it cannot be read, or is no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"{path} cannot be read: {error}") from None
