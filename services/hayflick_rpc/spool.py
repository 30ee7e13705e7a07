"""Events on disk until the logger has them, for a sender that keeps no database.

What a sender noted survives its own death: a write is in the kernel's hands when
it returns, and the next process of that sender delivers what the last one could
not, under the last one's name, so that the logger knows what it already has.
A power cut may take what was not synced; the sender's processes died with it.

One file holds the events of one boot of a sender. It is emptied whenever all in it
is acknowledged, and gone when its sender ended with nothing left to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from hayflick.v1 import logger_pb2
from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_rpc.audit import AuditClient
from hayflick_rpc.errors import HayflickError

SUFFIX = ".events"
# Sequence, length and CRC-32 of what follows.
_HEAD = struct.Struct(">QII")
DELIVERY_TIMEOUT_SECONDS = 60.0
RETRY_SECONDS = 1.0

log = logging.getLogger(__name__)


class Spool:
    """The file of one boot of a sender; this process alone writes it.

    Args:
        directory: Of the sender's spools; made with mode 0700 when missing.
        source: The sender's name in this boot.

    Raises:
        OSError: the file cannot be made.
    """

    def __init__(self, directory: Path, source: str) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = directory / f"{secrets.token_hex(8)}{SUFFIX}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(self._path, flags, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        self._last = self._acknowledged = 0
        self._write(0, source.encode())
        self._start_bytes = os.fstat(self._descriptor).st_size

    def append(self, sequence: int, event: logger_pb2.Event) -> None:
        """Keep *event*, whose sequence is higher than any before.

        Raises:
            OSError: the disk refused; the event is not kept.
        """
        self._write(sequence, event.SerializeToString())
        self._last = sequence

    def acknowledged(self, sequence: int) -> None:
        """Note that all up to *sequence* is recorded."""
        self._acknowledged = max(self._acknowledged, sequence)
        if self._acknowledged >= self._last and os.fstat(self._descriptor).st_size > self._start_bytes:
            os.ftruncate(self._descriptor, self._start_bytes)

    def close(self) -> None:
        """Let go of the file; it stays when something in it is not recorded."""
        if self._acknowledged >= self._last:
            self._path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def _write(self, sequence: int, body: bytes) -> None:
        record = _HEAD.pack(sequence, len(body), zlib.crc32(body)) + body
        before = os.fstat(self._descriptor).st_size
        try:
            written = os.write(self._descriptor, record)
            if written != len(record):
                raise OSError(28, "the disk is full", str(self._path))
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
    source, events, at = "", [], 0
    while at + _HEAD.size <= len(content):
        sequence, length, crc = _HEAD.unpack_from(content, at)
        body = content[at + _HEAD.size : at + _HEAD.size + length]
        if len(body) != length or zlib.crc32(body) != crc:
            log.warning("a record that %s did not finish is left out", source or "a sender")
            break
        if sequence:
            events.append((sequence, logger_pb2.Event.FromString(body)))
        else:
            source = body.decode()
        at += _HEAD.size + length
    return source, events
