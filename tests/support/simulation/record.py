"""The logger's end of the wire: keeps what a logger keeps, and can be away, deaf or mute."""

from __future__ import annotations

import asyncio
import enum
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

from hayflick.v1 import logger_pb2
from hayflick_rpc import events


class Condition(enum.Enum):
    """How the logger is. Deaf, it reads nothing; mute, it records and does not say so."""

    UP = "up"
    DEAF = "deaf"
    MUTE = "mute"
    DOWN = "down"


@dataclass(frozen=True)
class Entry:
    """An event as recorded."""

    source: str
    sequence: int
    event: logger_pb2.Event


class Record:
    """What was delivered, in order, and what of it was acknowledged.

    As the logger does, it takes each (source, sequence) once. Stricter than the logger, it
    suffers no gap: the controller promises that there is none.
    """

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.condition = Condition.UP
        self.acknowledged: defaultdict[str, int] = defaultdict(int)
        self._bodies: defaultdict[str, list[bytes]] = defaultdict(list)
        self._calls: list[_Call] = []

    def dial(self, address: str) -> Any:
        """Return a channel to this logger, in the place of :func:`hayflick_rpc.channel.connect`."""
        return _Channel(self)

    def turn(self, condition: Condition) -> None:
        """Become up, deaf, mute or down; whoever is connected notices."""
        self.condition = condition
        for call in list(self._calls):
            call.serve()

    def cut(self) -> None:
        """Lose every connection, as when their other ends die."""
        for call in list(self._calls):
            call.cancel()

    def open(self, call: _Call) -> None:
        """Serve a new stream."""
        self._calls.append(call)

    def forget(self, call: _Call) -> None:
        """Count a stream as ended."""
        if call in self._calls:
            self._calls.remove(call)

    def append(self, request: logger_pb2.AppendRequest) -> int:
        """Record a batch; return the highest sequence of its source."""
        bodies = self._bodies[request.source]
        for sent in request.events:
            body = events.to_json(sent.event)
            if sent.sequence <= len(bodies):
                assert bodies[sent.sequence - 1] == body, f"{sent.sequence} of {request.source} was another"
                continue
            assert sent.sequence == len(bodies) + 1, f"a gap before {sent.sequence} of {request.source}"
            bodies.append(body)
            self.entries.append(Entry(request.source, sent.sequence, sent.event))
        return len(bodies)

    def is_acknowledged(self, matches: Callable[[logger_pb2.Event], bool]) -> bool:
        """Return whether the newest event that *matches* is on record and its sender knows."""
        for entry in reversed(self.entries):
            if matches(entry.event):
                return entry.sequence <= self.acknowledged[entry.source]
        return False


class _Channel:
    """As much of a grpc.aio.Channel as an :class:`AuditClient` uses."""

    def __init__(self, record: Record) -> None:
        self._record = record

    def stream_stream(self, method: str, *_: object, **__: object) -> Callable[[], _Call]:
        return lambda: _Call(self._record)

    def unary_unary(self, method: str, *_: object, **__: object) -> None:
        """Offer nothing: a sender of events asks for nothing else."""

    unary_stream = unary_unary

    async def close(self) -> None:
        """End nothing: each call is ended by whoever made it."""


class _Call:
    """One Append stream."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._unread: list[logger_pb2.AppendRequest] = []
        self._answers: asyncio.Queue[tuple[str, int] | None] = asyncio.Queue()
        self._unsaid: list[tuple[str, int]] = []
        self._callbacks: list[Callable[[object], None]] = []
        self._over = False
        record.open(self)
        self.serve()

    async def write(self, request: logger_pb2.AppendRequest) -> None:
        await asyncio.sleep(0)
        if self._over:
            raise asyncio.InvalidStateError("the stream has ended")
        self._unread.append(logger_pb2.AppendRequest.FromString(request.SerializeToString()))
        self.serve()

    async def read(self) -> logger_pb2.AppendResponse:
        answer = None if self._over and self._answers.empty() else await self._answers.get()
        if answer is None:
            raise grpc.aio.AioRpcError(
                grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "the logger is away"
            )
        source, sequence = answer
        self._record.acknowledged[source] = max(self._record.acknowledged[source], sequence)
        return logger_pb2.AppendResponse(sequence=sequence)

    def serve(self) -> None:
        """Do what the logger does in its present condition."""
        condition = self._record.condition
        if condition is Condition.DOWN:
            self.cancel()
        if self._over or condition is Condition.DEAF:
            return
        while self._unread:
            request = self._unread.pop(0)
            self._unsaid.append((request.source, self._record.append(request)))
        while self._unsaid and condition is Condition.UP:
            self._answers.put_nowait(self._unsaid.pop(0))

    def cancel(self) -> None:
        if self._over:
            return
        self._over = True
        self._record.forget(self)
        self._answers.put_nowait(None)
        for callback in self._callbacks:
            callback(self)

    def done(self) -> bool:
        return self._over

    def add_done_callback(self, callback: Callable[[object], None]) -> None:
        self._callbacks.append(callback)

    async def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    async def details(self) -> str:
        return "the logger is away"
