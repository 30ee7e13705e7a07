"""Events on disk until the logger has them, for a sender that keeps no database.

What a sender noted survives its own death: a write is in the kernel's hands when
it returns, and the next process of that sender delivers what the last one could
not, under the last one's name, so that the logger knows what it already has.
A power cut may take what was not synced; the sender's processes died with it.

One file holds the events of one boot of a sender. It is emptied whenever all in it is
acknowledged, rid of what is when there is much of it, and gone when its sender ended
with nothing left to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import secrets
import struct
import zlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from hayflick.v1 import logger_pb2
from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_rpc.audit import AuditClient
from hayflick_rpc.errors import HayflickError

SUFFIX = ".events"
FRESH_SUFFIX = ".fresh"
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
# Sequence, length and CRC-32 of what follows.
_HEAD = struct.Struct(">QII")
MAX_SPOOL_BYTES = 64 * 1024 * 1024
"""What a sender may keep that is not acknowledged: some 300,000 events."""
RID_BYTES = 1024 * 1024
"""How much must be acknowledged before the file is rid of it."""
MARK_EVENTS = 64
"""Of how many events one place in the file is remembered."""
READ_BYTES = 1024 * 1024
"""Read at once; more than a record has."""
DELIVERY_TIMEOUT_SECONDS = 60.0
RETRY_SECONDS = 1.0

log = logging.getLogger(__name__)


class Spool:
    """The file of one boot of a sender; this process alone writes it.

    Args:
        directory: Of the sender's spools; made with mode 0700 when missing.
        source: The sender's name in this boot.
        max_bytes: What may wait in it.

    Raises:
        OSError: the file cannot be made.
    """

    def __init__(self, directory: Path, source: str, *, max_bytes: int = MAX_SPOOL_BYTES) -> None:
        self._max_bytes = max_bytes
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = directory / f"{secrets.token_hex(8)}{SUFFIX}"
        self._descriptor = os.open(self._path, _FLAGS | os.O_EXCL, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        self._last = self._acknowledged = 0
        self._write(0, source.encode())
        self._start_bytes = self._read_bytes = self._done_bytes = os.fstat(self._descriptor).st_size
        self._marks: deque[tuple[int, int]] = deque()

    def append(self, sequence: int, event: logger_pb2.Event) -> None:
        """Keep *event*, whose sequence is higher than any before.

        Raises:
            OSError: the disk refused, or the file is full; the event is not kept.
        """
        self._write(sequence, event.SerializeToString())
        self._last = sequence
        if sequence % MARK_EVENTS == 0:
            self._marks.append((sequence, os.fstat(self._descriptor).st_size))

    def acknowledged(self, sequence: int) -> None:
        """Note that all up to *sequence* is recorded."""
        self._acknowledged = max(self._acknowledged, sequence)
        size_bytes = os.fstat(self._descriptor).st_size
        if self._acknowledged >= self._last and size_bytes > self._start_bytes:
            os.ftruncate(self._descriptor, self._start_bytes)
            self._read_bytes = self._done_bytes = self._start_bytes
            self._marks.clear()
            return
        while self._marks and self._marks[0][0] <= self._acknowledged:
            self._done_bytes = self._marks.popleft()[1]
        if self._done_bytes - self._start_bytes >= max(RID_BYTES, size_bytes - self._done_bytes):
            self._get_rid(size_bytes)

    def _get_rid(self, size_bytes: int) -> None:
        """Go on with a file that holds only what is not acknowledged; a death leaves one of the two whole."""
        fresh = self._path.with_suffix(FRESH_SUFFIX)
        try:
            descriptor = os.open(fresh, _FLAGS | os.O_TRUNC, 0o600)
        except OSError as error:
            log.warning("what is recorded cannot be dropped from %s: %s", self._path, error)
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            for start, end in ((0, self._start_bytes), (self._done_bytes, size_bytes)):
                content = os.pread(self._descriptor, end - start, start)
                if os.write(descriptor, content) != len(content):
                    raise OSError(errno.ENOSPC, "the disk is full", str(fresh))
            fresh.rename(self._path)
        except OSError as error:
            log.warning("what is recorded cannot be dropped from %s: %s", self._path, error)
            os.close(descriptor)
            return
        os.close(self._descriptor)
        self._descriptor = descriptor
        moved_bytes = self._done_bytes - self._start_bytes
        self._marks = deque((sequence, at - moved_bytes) for sequence, at in self._marks)
        self._read_bytes = max(self._start_bytes, self._read_bytes - moved_bytes)
        self._done_bytes = self._start_bytes

    @property
    def fullness(self) -> float:
        """How much of what may wait does, from 0 to 1."""
        return self._waiting_bytes / self._max_bytes

    @property
    def _waiting_bytes(self) -> int:
        return os.fstat(self._descriptor).st_size - self._done_bytes

    def read(self, after: int, count: int) -> list[tuple[int, logger_pb2.Event]]:
        """Return the next *count* events whose sequence is above *after*, which never falls.

        Raises:
            OSError: the disk refused.
        """
        found: list[tuple[int, logger_pb2.Event]] = []
        while len(found) < count:
            content = os.pread(self._descriptor, READ_BYTES, self._read_bytes)
            at = 0
            for sequence, body, end in _records(content):
                if len(found) == count:
                    break
                if sequence > after:
                    found.append((sequence, logger_pb2.Event.FromString(body)))
                at = end
            self._read_bytes += at
            if not at:
                break
        return found

    def close(self) -> None:
        """Let go of the file; it stays when something in it is not recorded."""
        if self._acknowledged >= self._last:
            self._path.with_suffix(FRESH_SUFFIX).unlink(missing_ok=True)
            self._path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def _write(self, sequence: int, body: bytes) -> None:
        record = _HEAD.pack(sequence, len(body), zlib.crc32(body)) + body
        before = os.fstat(self._descriptor).st_size
        if self._last and self._waiting_bytes + len(record) > self._max_bytes:
            raise OSError(errno.EDQUOT, "so many events wait already", str(self._path))
        try:
            written = os.write(self._descriptor, record)
            if written != len(record):
                raise OSError(errno.ENOSPC, "the disk is full", str(self._path))
        except OSError:
            os.ftruncate(self._descriptor, before)
            raise


async def deliver_leftovers(directory: Path, logger_address: str) -> None:
    """Deliver what earlier boots kept in *directory*, until nothing is left; then return.

    Files of senders that live are theirs, and left alone.
    """
    for path in _files(directory):
        with _taken(path) as content:
            if content is None:
                continue
            source, events = _parse(content)
            if source and events:
                await _deliver(logger_address, source, events)
                log.info("delivered %d events that %s left", len(events), source)
            path.with_suffix(FRESH_SUFFIX).unlink(missing_ok=True)  # of a death amid its making
            path.unlink(missing_ok=True)


def _files(directory: Path) -> list[Path]:
    return sorted(directory.glob(f"*{SUFFIX}"))


async def _deliver(address: str, source: str, events: list[tuple[int, logger_pb2.Event]]) -> None:
    while True:
        client = AuditClient(address, source, max_pending_events=len(events))
        await client.start()
        try:
            for sequence, event in events:
                client.submit(sequence, event)
            await client.wait_acknowledged(events[-1][0], DELIVERY_TIMEOUT_SECONDS)
        except HayflickError as error:
            if error.reason != ErrorReason.ERROR_REASON_AUDIT_UNAVAILABLE:
                log.error("an event that %s left is refused: %s", source, error.message)  # noqa: TRY400
                return
            log.warning("events that %s left wait for the logger: %s", source, error.message)
        else:
            return
        finally:
            await client.close(flush_seconds=0)
        await asyncio.sleep(RETRY_SECONDS)


@contextlib.contextmanager
def _taken(path: Path) -> Iterator[bytes | None]:
    """Hold the file at *path* and yield what is in it; ``None`` while its sender lives."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        yield None
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        with os.fdopen(os.dup(descriptor), "rb") as file:
            content = file.read()
        yield content
    finally:
        os.close(descriptor)


def _parse(content: bytes) -> tuple[str, list[tuple[int, logger_pb2.Event]]]:
    """Return the sender's name and its events; what follows a torn record was never kept."""
    source, events, end = "", [], 0
    for sequence, body, after in _records(content):
        end = after
        if sequence:
            events.append((sequence, logger_pb2.Event.FromString(body)))
        else:
            source = body.decode()
    if end + _HEAD.size <= len(content):
        log.warning("a record that %s did not finish is left out", source or "a sender")
    return source, events


def _records(content: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Yield the sequence and the body of each whole record, and where it ends, as long as they rise."""
    at, last = 0, -1
    while at + _HEAD.size <= len(content):
        sequence, length, crc = _HEAD.unpack_from(content, at)
        at += _HEAD.size + length
        body = content[at - length : at]
        if len(body) != length or zlib.crc32(body) != crc or sequence <= last:
            return
        last = sequence
        yield sequence, body, at
