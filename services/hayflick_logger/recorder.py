"""The one thread that writes: whatever waits becomes one commit, one write, one sync."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_logger.planning import OWN_SOURCE, Plan
from hayflick_rpc.errors import HayflickError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hayflick.v1 import logger_pb2
    from hayflick_logger.record import Record

MAX_WAITING_BATCHES = 1_024
MAX_COMMIT_EVENTS = 10_000
MAX_COMMIT_BYTES = 16 * 1024 * 1024

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """What one sender hands over at once.

    Attributes:
        source: The sender.
        events: Pairs of sequence and canonical event, ascending.
        metrics: Samples to keep beside them.
        done: The highest durable sequence of the source, once all of it is durable.
    """

    source: str
    events: Sequence[tuple[int, bytes]]
    metrics: Sequence[logger_pb2.MetricSample]
    done: Future[int] = field(default_factory=Future)

    @property
    def size_bytes(self) -> int:
        """The bytes of its events."""
        return sum(len(event) for _, event in self.events)


class Recorder:
    """Commits batches to *record*, in the order they came.

    Args:
        record: Written by this recorder's thread alone from now on.
        on_recorded: Called in that thread with the next index after each commit.
    """

    def __init__(self, record: Record, on_recorded: Callable[[int], None]) -> None:
        self._record = record
        self._on_recorded = on_recorded
        self._waiting: queue.Queue[Batch | None] = queue.Queue(MAX_WAITING_BATCHES)
        self._thread = threading.Thread(target=self._run, name="recorder")
        self._thread.start()

    async def record(self, batch: Batch) -> int:
        """Return the highest durable sequence of the batch's source once all of *batch* is durable.

        Raises:
            HayflickError: AUDIT_UNAVAILABLE when it cannot be made durable;
                REQUEST_ID_REUSED when it contradicts the record.
        """
        try:
            self._waiting.put_nowait(batch)
        except queue.Full:
            raise HayflickError(
                ErrorReason.ERROR_REASON_AUDIT_UNAVAILABLE,
                f"{MAX_WAITING_BATCHES} batches wait for the disk",
                retry_after_seconds=1.0,
            ) from None
        return await asyncio.wrap_future(batch.done)

    async def catch_up(self) -> None:
        """Return once the index has what the journal has.

        Raises:
            HayflickError: AUDIT_UNAVAILABLE when it cannot.
        """
        await self.record(Batch(OWN_SOURCE, (), ()))

    def close(self) -> None:
        """Commit what waits, then end the thread."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        running = True
        while running:
            batches: list[Batch] = []
            running = self._collect(batches)
            # A sender that hung up cancels its future; this keeps it from then on.
            batches = [batch for batch in batches if batch.done.set_running_or_notify_cancel()]
            try:
                self._commit(batches)
            except Exception as error:
                log.exception("a commit failed")
                for batch in batches:
                    if not batch.done.done():
                        batch.done.set_exception(error)

    def _collect(self, batches: list[Batch]) -> bool:
        """Fill *batches* with all that waits, up to the limits of a commit; return whether to go on."""
        events, size_bytes = 0, 0
        block = True
        while events < MAX_COMMIT_EVENTS and size_bytes < MAX_COMMIT_BYTES:
            try:
                batch = self._waiting.get(block)
            except queue.Empty:
                return True
            if batch is None:
                return False
            block = False
            batches.append(batch)
            events += len(batch.events)
            size_bytes += batch.size_bytes
        return True

    def _commit(self, batches: Sequence[Batch]) -> None:
        try:
            plan = self._record.plan()
            accepted = [batch for batch in batches if _accept(plan, batch)]
            self._record.commit(plan)
        except HayflickError as error:
            for batch in batches:
                if not batch.done.done():
                    batch.done.set_exception(error)
            return
        refusal = self._keep_metrics(accepted)
        self._on_recorded(self._record.journal.head.next_index)
        for batch in accepted:
            if refusal is not None and batch.metrics:
                batch.done.set_exception(refusal)
            else:
                batch.done.set_result(plan.last(batch.source))

    def _keep_metrics(self, batches: Sequence[Batch]) -> HayflickError | None:
        samples = [sample for batch in batches for sample in batch.metrics]
        try:
            if samples:
                self._record.add_metrics(samples)
        except HayflickError as refusal:
            return refusal
        return None


def _accept(plan: Plan, batch: Batch) -> bool:
    try:
        plan.take(batch.source, batch.events)
    except HayflickError as refusal:
        batch.done.set_exception(refusal)
        return False
    return True
