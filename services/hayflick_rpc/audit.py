"""Deliver events to the logger, in order, and say when each is durable.

How a service uses it::

    audit = AuditClient("unix:///run/hayflick/logger.sock", "controller/1f3a",
                        on_acknowledged=outbox.delete_up_to)
    await audit.start()                       # returns at once, logger or no logger

    durable = audit.submit(sequence, event)   # a sender with a sequence of its own (an outbox)
    await audit.wait_acknowledged(sequence, timeout_seconds=5)

    sequence = await audit.record(event, timeout_seconds=5)   # or: a sequence kept here, in memory
    sequence = audit.enqueue(event)           # the same, not waiting

    audit.emit_metric(sample)                 # never blocks; dropped, and counted, when full
    await audit.close(flush_seconds=5)

What it promises: events reach the record in the order of their sequence, each
once; a future is done only when its event is on the logger's disk. Nothing is
dropped in silence: a full queue refuses with AUDIT_UNAVAILABLE, and close()
fails the futures of what it could not deliver. What it cannot promise: an event
whose wait timed out may be recorded later, so a sender that gives up on it
records what it did instead.

One batch is in flight at a time and the next collects meanwhile, so the logger
pays for one disk sync per round trip however many events wait (group commit).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from hayflick.v1 import logger_pb2, logger_pb2_grpc
from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_rpc import events
from hayflick_rpc.channel import Dial, connect
from hayflick_rpc.errors import HayflickError
from hayflick_rpc.status import from_rpc_error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MAX_BATCH_EVENTS = 1_000
MAX_BATCH_METRICS = 1_000
# Far below what a message may hold, and small enough to sync quickly.
MAX_BATCH_BYTES = 4 * 1024 * 1024
ANSWER_TIMEOUT_SECONDS = 30.0
MAX_REFUSED_KEPT = 1_000
MIN_BACKOFF_SECONDS = 0.05
MAX_BACKOFF_SECONDS = 1.0

# Sending the same again cannot help: the event itself is at fault.
_PERMANENT = frozenset(
    {
        ErrorReason.ERROR_REASON_INVALID_FIELD,
        ErrorReason.ERROR_REASON_TOO_LARGE,
        ErrorReason.ERROR_REASON_REQUEST_ID_REUSED,
    }
)

_Call = grpc.aio.StreamStreamCall[logger_pb2.AppendRequest, logger_pb2.AppendResponse]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Pending:
    sequence: int
    message: logger_pb2.SequencedEvent
    size_bytes: int
    done: asyncio.Future[None]


class AuditClient:
    """One sender of events, for the loop it was started in.

    Args:
        address: The logger's ``unix:`` target.
        source: The sender's name; no other sender may use it at the same time.
        on_acknowledged: Called in the loop with the highest sequence that is
            now durable, so that an outbox can delete what it kept.
        keep: Called with each event before it is queued, so that it outlives this
            process; an OSError refuses the event.
        reread: Called with a sequence and a number; returns the next so many events
            after it that *keep* took. With it, events beyond memory wait where they are kept.
        max_pending_events: How many events may wait in memory. More are refused, or reread.
        max_pending_metrics: How many samples may wait. The oldest give way.
        dial: Makes the channel to *address*.
    """

    def __init__(
        self,
        address: str,
        source: str,
        *,
        on_acknowledged: Callable[[int], None] | None = None,
        keep: Callable[[int, logger_pb2.Event], None] | None = None,
        reread: Callable[[int, int], Sequence[tuple[int, logger_pb2.Event]]] | None = None,
        max_pending_events: int = 10_000,
        max_pending_metrics: int = 10_000,
        dial: Dial = connect,
    ) -> None:
        self._address = address
        self._dial = dial
        self._source = events.require_source(source)
        self._on_acknowledged = on_acknowledged
        self._keep = keep
        self._reread = reread
        self._max_pending_events = max_pending_events
        self._pending: dict[int, _Pending] = {}  # by sequence, ascending
        self._metrics: deque[logger_pb2.MetricSample] = deque(maxlen=max_pending_metrics)
        self._last_sequence = 0
        self._in_memory = 0  # the last sequence that was; later ones are kept alone
        self._waiters: dict[int, asyncio.Future[None]] = {}  # for those
        self._acknowledged = 0
        self._dropped_metrics = 0
        self._refused: dict[int, HayflickError] = {}
        self._one_by_one = False
        self._progressed = True
        self._closing = False
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._connected = asyncio.Event()
        self._disconnected = asyncio.Event()
        self._disconnected.set()
        self._task: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        """Whether the logger answered on the stream that is open now."""
        return self._connected.is_set()

    @property
    def acknowledged(self) -> int:
        """The highest sequence that the logger made durable for this client; 0 for none."""
        return self._acknowledged

    @property
    def pending_events(self) -> int:
        """How many events wait for the logger."""
        return len(self._pending) + self._last_sequence - self._in_memory

    @property
    def dropped_metrics(self) -> int:
        """How many samples gave way because too many waited."""
        return self._dropped_metrics

    async def start(self) -> None:
        """Begin to deliver; returns at once and keeps trying while the logger is away."""
        if self._task is None:
            self._task = asyncio.create_task(self._deliver(), name=f"audit of {self._source}")

    async def close(self, flush_seconds: float) -> None:
        """Deliver what waits for at most *flush_seconds*, then end; what is left fails."""
        self._closing = True
        if self._task is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), flush_seconds)
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        if self.pending_events:
            log.error("%d events of %s were not delivered", self.pending_events, self._source)
        for waiting in self._pending.values():
            _fail(waiting, _unavailable("the sender ended before the logger answered"))
        self._pending.clear()
        for done in self._waiters.values():
            if not done.done():
                done.set_exception(_unavailable("the sender ended before the logger answered"))
        self._waiters.clear()
        self._in_memory = self._last_sequence
        self._metrics.clear()
        self._settle()

    def submit(self, sequence: int, event: logger_pb2.Event) -> asyncio.Future[None]:
        """Queue *event* under the sender's own *sequence*; the future is done when it is durable.

        A sequence that was acknowledged before is done at once; one that waits
        already keeps its first event.

        Raises:
            HayflickError: INVALID_FIELD when the event cannot be recorded;
                AUDIT_UNAVAILABLE when too many wait or the client is closing.
            ValueError: *sequence* is below 1, or was passed over by a later one.
        """
        if sequence < 1:
            raise ValueError("sequence: starts at 1")
        done = _unheeded()
        if sequence in self._refused:
            done.set_exception(self._refused[sequence])
            return done
        if sequence <= self._acknowledged:
            done.set_result(None)
            return done
        if sequence <= self._last_sequence:
            waiting = self._waiting(sequence)
            if waiting is None:
                raise ValueError(f"sequence: {sequence} comes after {self._last_sequence} was submitted")
            return waiting
        self._queue(sequence, event, done)
        return self._waiting(sequence) or done

    def _queue(self, sequence: int, event: logger_pb2.Event, done: asyncio.Future[None]) -> None:
        events.to_json(event)  # raises where the fault is, not a round trip later
        if self._closing:
            raise _unavailable("the sender is closing")
        kept_alone = len(self._pending) >= self._max_pending_events or self._in_memory < self._last_sequence
        if kept_alone and self._reread is None:
            raise _unavailable(f"{len(self._pending)} events wait for the logger", retry_after_seconds=1.0)
        if self._keep is not None:
            try:
                self._keep(sequence, event)
            except OSError as error:
                raise _unavailable(f"the event cannot be kept: {error}") from error
        self._last_sequence = sequence
        if not kept_alone:
            self._take(sequence, event, done)
        self._settle()

    def _take(self, sequence: int, event: logger_pb2.Event, done: asyncio.Future[None]) -> None:
        message = logger_pb2.SequencedEvent(sequence=sequence, event=event)
        self._pending[sequence] = _Pending(sequence, message, message.ByteSize(), done)
        self._in_memory = sequence

    def _waiting(self, sequence: int) -> asyncio.Future[None] | None:
        """Return what is done when an event that waits is durable; ``None`` when it does not wait."""
        if sequence in self._pending:
            return self._pending[sequence].done
        if self._in_memory < sequence <= self._last_sequence:
            return self._waiters.setdefault(sequence, _unheeded())
        return None

    def _refill(self) -> None:
        """Take events that are kept alone into memory, as far as there is room."""
        room = self._max_pending_events - len(self._pending)
        if (
            self._reread is None
            or self._in_memory == self._last_sequence
            or 2 * room < self._max_pending_events
        ):
            return
        try:
            found = self._reread(self._in_memory, room)
        except OSError:
            log.exception("events of %s that are kept cannot be read now", self._source)
            return
        if not found:
            # The logger sees the gap that they leave, and records it.
            log.error("%d events of %s are not where they were kept", self.pending_events, self._source)
            self._in_memory = self._last_sequence
        for sequence, event in found:
            self._take(sequence, event, self._waiting(sequence) or _unheeded())
            self._waiters.pop(sequence, None)

    def enqueue(self, event: logger_pb2.Event) -> int:
        """Queue *event* under the next sequence of this client's own; return that sequence.

        Raises:
            HayflickError: As for :meth:`submit`.
        """
        sequence = self._last_sequence + 1
        self._queue(sequence, event, _unheeded())
        return sequence

    async def record(self, event: logger_pb2.Event, timeout_seconds: float) -> int:
        """Queue *event* as :meth:`enqueue` does and return its sequence once it is durable.

        Raises:
            HayflickError: As for :meth:`submit` and :meth:`wait_acknowledged`.
        """
        sequence = self.enqueue(event)
        await self.wait_acknowledged(sequence, timeout_seconds)
        return sequence

    def emit_metric(self, sample: logger_pb2.MetricSample) -> None:
        """Queue *sample*; when too many wait, the oldest is dropped and counted.

        Raises:
            HayflickError: INVALID_FIELD when the sample cannot be kept.
        """
        if len(self._metrics) == self._metrics.maxlen:
            self._dropped_metrics += 1
        self._metrics.append(events.require_metric(sample))
        self._settle()

    async def wait_acknowledged(self, sequence: int, timeout_seconds: float) -> None:
        """Return once the event with *sequence* is durable.

        Raises:
            HayflickError: AUDIT_UNAVAILABLE when that takes longer than
                *timeout_seconds* (it may be recorded later) or never will be;
                the logger's own reason when it refused the event.
        """
        if sequence in self._refused:
            raise self._refused[sequence]
        if sequence <= self._acknowledged:
            return
        waiting = self._waiting(sequence)
        if waiting is None:
            raise _unavailable(f"event {sequence} does not wait for the logger")
        try:
            # Shielded: one who gives up waiting must not take the event from others.
            await asyncio.wait_for(asyncio.shield(waiting), timeout_seconds)
        except TimeoutError:
            raise _unavailable(
                f"the logger did not acknowledge within {timeout_seconds:g} s", retry_after_seconds=1.0
            ) from None

    async def wait_connected(self, timeout_seconds: float) -> None:
        """Return once the logger answers.

        Raises:
            HayflickError: AUDIT_UNAVAILABLE after *timeout_seconds*.
        """
        try:
            await asyncio.wait_for(self._connected.wait(), timeout_seconds)
        except TimeoutError:
            raise _unavailable(f"no logger at {self._address} within {timeout_seconds:g} s") from None

    async def wait_disconnected(self, timeout_seconds: float) -> None:
        """Return once the logger is known to be gone; at once when it was not there.

        Raises:
            TimeoutError: it still answers after *timeout_seconds*.
        """
        await asyncio.wait_for(self._disconnected.wait(), timeout_seconds)

    def _return_metrics(self, samples: Sequence[logger_pb2.MetricSample], error: BaseException) -> None:
        """Queue samples again that were not answered, or count them as dropped."""
        refused = isinstance(error, grpc.RpcError) and from_rpc_error(error).reason in _PERMANENT
        room = 0 if refused else (self._metrics.maxlen or 0) - len(self._metrics)
        kept = samples[max(0, len(samples) - room) :]
        self._dropped_metrics += len(samples) - len(kept)
        self._metrics.extendleft(reversed(kept))

    def _settle(self) -> None:
        """Bring the two events in line with whether anything waits."""
        if self._pending or self._metrics or self._in_memory < self._last_sequence:
            self._idle.clear()
            self._wake.set()
        else:
            self._idle.set()

    def _set_connected(self, *, connected: bool) -> None:
        for event, holds in ((self._connected, connected), (self._disconnected, not connected)):
            event.set() if holds else event.clear()

    async def _deliver(self) -> None:
        backoff_seconds = MIN_BACKOFF_SECONDS
        channel = self._dial(self._address)
        try:
            while True:
                refusal = await self._stream(logger_pb2_grpc.LoggerServiceStub(channel))
                was_connected = self.connected
                if self._progressed:  # said once an outage, not once an attempt
                    self._progressed = False
                    backoff_seconds = MIN_BACKOFF_SECONDS
                    log.warning("%s cannot deliver: %s", self._source, refusal.message)
                self._set_connected(connected=False)
                if was_connected and refusal.reason in _PERMANENT and self._refuse(refusal):
                    continue
                # Jitter: senders that lost the same logger do not return in step.
                await asyncio.sleep(backoff_seconds * random.uniform(0.5, 1.0))  # noqa: S311 -- no secret
                backoff_seconds = min(2 * backoff_seconds, MAX_BACKOFF_SECONDS)
        finally:
            self._set_connected(connected=False)
            await channel.close()

    async def _stream(self, stub: logger_pb2_grpc.LoggerServiceAsyncStub) -> HayflickError:
        """Deliver over one stream for as long as it lasts; return why it ended."""
        call: _Call = stub.Append()
        call.add_done_callback(lambda _: self._wake.set())  # notices a loss while nothing is sent
        try:
            # An empty batch: its answer says that the logger is there.
            await self._exchange(call, logger_pb2.AppendRequest(source=self._source))
            self._set_connected(connected=True)
            while not call.done():
                batch, request = self._collect()
                if not batch and not request.metrics:
                    self._progressed = True
                    self._wake.clear()
                    self._settle()
                    if call.done():
                        break
                    await self._wake.wait()
                    continue
                try:
                    await self._exchange(call, request)
                except BaseException as error:
                    self._return_metrics(request.metrics, error)
                    raise
                self._acknowledge(batch)
            await self._exchange(call, None)
        except grpc.RpcError as error:
            return from_rpc_error(error)
        except (TimeoutError, asyncio.InvalidStateError) as error:
            if call.done() and await call.code() is not grpc.StatusCode.OK:
                return _unavailable(await call.details() or str(await call.code()))
            return _unavailable(str(error) or "no answer in time")
        finally:
            call.cancel()
        raise AssertionError("a stream that is over has no answer")

    async def _exchange(self, call: _Call, request: logger_pb2.AppendRequest | None) -> None:
        """Send *request* and return when it is answered; raise when the stream ends instead."""
        async with asyncio.timeout(ANSWER_TIMEOUT_SECONDS):
            if request is not None:
                await call.write(request)
            answer = await call.read()
        if not isinstance(answer, logger_pb2.AppendResponse):
            raise asyncio.InvalidStateError("the logger ended the stream")

    def _collect(self) -> tuple[list[_Pending], logger_pb2.AppendRequest]:
        """Return the next batch; its events stay queued until they are acknowledged."""
        self._refill()
        batch: list[_Pending] = []
        size_bytes = 0
        limit = 1 if self._one_by_one else MAX_BATCH_EVENTS
        for waiting in self._pending.values():
            if len(batch) == limit or (batch and size_bytes + waiting.size_bytes > MAX_BATCH_BYTES):
                break
            batch.append(waiting)
            size_bytes += waiting.size_bytes
        count = min(len(self._metrics), MAX_BATCH_METRICS)
        metrics = [self._metrics.popleft() for _ in range(0 if self._one_by_one else count)]
        return batch, logger_pb2.AppendRequest(
            source=self._source, events=[waiting.message for waiting in batch], metrics=metrics
        )

    def _acknowledge(self, batch: list[_Pending]) -> None:
        self._one_by_one = False
        self._progressed = True
        for waiting in batch:
            del self._pending[waiting.sequence]
            self._acknowledged = waiting.sequence
            if not waiting.done.done():
                waiting.done.set_result(None)
        if batch and self._on_acknowledged is not None:
            try:
                self._on_acknowledged(self._acknowledged)
            except Exception:
                # Its outbox keeps what it could not delete and sends it again
                # one day; the logger will know it.
                log.exception("what %s does on acknowledgement failed", self._source)
        self._settle()

    def _refuse(self, refusal: HayflickError) -> bool:
        """Find the one event that the logger will never take; fail it alone."""
        if not self._pending:
            return False
        if not self._one_by_one:
            self._one_by_one = True
            return True
        refused = self._pending.pop(next(iter(self._pending)))
        log.error("the logger refused event %d of %s: %r", refused.sequence, self._source, refusal)
        _fail(refused, refusal)
        self._refused[refused.sequence] = refusal
        if len(self._refused) > MAX_REFUSED_KEPT:
            del self._refused[next(iter(self._refused))]
        self._one_by_one = False
        self._settle()
        return True


def _unheeded() -> asyncio.Future[None]:
    """Return a future whose failure nobody needs to look at: it is logged here."""
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    done.add_done_callback(lambda future: None if future.cancelled() else future.exception())
    return done


def _fail(waiting: _Pending, error: HayflickError) -> None:
    if not waiting.done.done():
        waiting.done.set_exception(error)


def _unavailable(message: str, retry_after_seconds: float | None = None) -> HayflickError:
    return HayflickError(
        ErrorReason.ERROR_REASON_AUDIT_UNAVAILABLE, message, retry_after_seconds=retry_after_seconds
    )
