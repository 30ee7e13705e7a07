"""The one thread that writes: whatever waits becomes one commit, one write, one sync.

The loop and the thread wake each other once a commit, however many batches it
holds: with small batches those wake-ups cost more than the batches.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_rpc.errors import HayflickError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hayflick.v1 import logger_pb2
    from hayflick_logger.planning import Plan
    from hayflick_logger.record import Record

MAX_WAITING_BATCHES = 1_024
MAX_COMMIT_EVENTS = 10_000
MAX_COMMIT_BYTES = 16 * 1024 * 1024
# How far index and metrics on disk may stay behind. Longer would save little:
# ten transactions a second already cost next to nothing.
MAX_UNWRITTEN = 1_000
MAX_UNWRITTEN_SECONDS = 0.1
RETRY_SECONDS = 1.0
# How far the signed checkpoint on disk may stay behind.
PUBLISH_SECONDS = 1.0

Outcome: TypeAlias = "int | Exception"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """What one sender hands over at once.

    Attributes:
        source: The sender.
        events: Pairs of sequence and canonical event, ascending.
        metrics: Samples to keep beside them.
    """

    source: str
    events: Sequence[tuple[int, bytes]]
    metrics: Sequence[logger_pb2.MetricSample]

    @property
    def size_bytes(self) -> int:
        """The bytes of its events."""
        return sum(len(event) for _, event in self.events)


@dataclass(frozen=True)
class _Waiting:
    batch: Batch
    done: asyncio.Future[int]


class Recorder:
    """Commits batches to *record*, in the order they came. Made in the loop that it serves.

    Args:
        record: Written by this recorder's thread alone from now on.
        on_recorded: Called in the loop with the next index after each commit.
    """

    def __init__(self, record: Record, on_recorded: Callable[[int], None]) -> None:
        self._record = record
        self._on_recorded = on_recorded
        self._loop = asyncio.get_running_loop()
        # Filled by the loop alone, so that its size can be trusted there.
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._flush_at = 0.0  # monotonic; of use while there is something to flush
        self._publish_at = 0.0
        self._thread = threading.Thread(target=self._run, name="recorder")
        self._thread.start()

    async def record(self, batch: Batch) -> int:
        """Return the highest durable sequence of the batch's source once all of *batch* is durable.

        Raises:
            HayflickError: AUDIT_UNAVAILABLE when it cannot be made durable;
                REQUEST_ID_REUSED when it contradicts the record.
        """
        if self._queue.qsize() >= MAX_WAITING_BATCHES:
            raise HayflickError(
                ErrorReason.ERROR_REASON_AUDIT_UNAVAILABLE,
                f"{MAX_WAITING_BATCHES} batches wait for the disk",
                retry_after_seconds=1.0,
            )
        done: asyncio.Future[int] = self._loop.create_future()
        self._queue.put(_Waiting(batch, done))
        return await done

    def close(self) -> None:
        """Commit what waits, then end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        running = True
        while running:
            everyone: list[_Waiting] = []
            running = self._collect(everyone)
            # A sender that hung up has cancelled its future.
            everyone = [waiting for waiting in everyone if not waiting.done.cancelled()]
            if everyone:
                outcomes = self._outcomes([waiting.batch for waiting in everyone])
                next_index = self._record.journal.next_index
                self._loop.call_soon_threadsafe(self._settle, everyone, outcomes, next_index)
            self._flush_when_due()

    def _collect(self, everyone: list[_Waiting]) -> bool:
        """Fill *everyone* with all that waits, up to the limits of a commit; return whether to go on.

        Waits for the first, but no longer than what is unwritten may wait.
        """
        events, size_bytes = 0, 0
        timeout_seconds = self._idle_seconds()
        while events < MAX_COMMIT_EVENTS and size_bytes < MAX_COMMIT_BYTES:
            try:
                waiting = self._queue.get(timeout=timeout_seconds)
            except queue.Empty:
                return True
            if waiting is None:
                return False
            timeout_seconds = 0.0
            everyone.append(waiting)
            events += len(waiting.batch.events)
            size_bytes += waiting.batch.size_bytes
        return True

    def _outcomes(self, batches: Sequence[Batch]) -> Sequence[Outcome]:
        """Commit *batches*; return for each its source's highest durable sequence, or why not."""
        try:
            if not self._record.waiting:
                self._flush_at = time.monotonic() + MAX_UNWRITTEN_SECONDS
            plan = self._record.plan()
            refusals = [_refusal(plan, batch) for batch in batches]
            self._record.commit(plan)
            samples = [
                sample
                for batch, refusal in zip(batches, refusals, strict=True)
                for sample in batch.metrics
                if refusal is None
            ]
            unkept = self._keep(samples) if samples else None
            return [
                refusal or (unkept if batch.metrics else None) or plan.last(batch.source)
                for batch, refusal in zip(batches, refusals, strict=True)
            ]
        except HayflickError as error:
            return [error] * len(batches)
        except Exception as error:
            log.exception("a commit failed")
            return [error] * len(batches)

    def _keep(self, samples: Sequence[logger_pb2.MetricSample]) -> HayflickError | None:
        try:
            self._record.add_metrics(samples)
        except HayflickError as refusal:
            return refusal
        return None

    def _settle(self, everyone: Sequence[_Waiting], outcomes: Sequence[Outcome], next_index: int) -> None:
        """Tell everyone, in the loop."""
        self._on_recorded(next_index)
        for waiting, outcome in zip(everyone, outcomes, strict=True):
            if waiting.done.done():
                continue
            if isinstance(outcome, Exception):
                waiting.done.set_exception(outcome)
            else:
                waiting.done.set_result(outcome)

    def _idle_seconds(self) -> float | None:
        """Return how long there is nothing to do but to wait for a batch; ``None`` for ever."""
        due = [self._flush_at] if self._record.waiting else []
        if not self._record.journal.published:
            due.append(self._publish_at)
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _flush_when_due(self) -> None:
        now, unwritten = time.monotonic(), self._record.waiting
        try:
            if unwritten >= MAX_UNWRITTEN or (unwritten and now >= self._flush_at):
                self._record.flush()
            if now >= self._publish_at and not self._record.journal.published:
                self._publish_at = now + PUBLISH_SECONDS
                self._record.publish()
        except HayflickError as error:
            log.error("%s", error.message)  # noqa: TRY400 -- the text says it all
            self._flush_at = now + RETRY_SECONDS


def _refusal(plan: Plan, batch: Batch) -> HayflickError | None:
    try:
        plan.take(batch.source, batch.events)
    except HayflickError as refusal:
        return refusal
    return None
