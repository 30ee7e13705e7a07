"""Journal, index and metrics of one directory, opened and closed as one."""

from __future__ import annotations

import logging
import sqlite3
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from google.protobuf.timestamp_pb2 import Timestamp

from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_logger import entries
from hayflick_logger.directory import Claim
from hayflick_logger.index import Index
from hayflick_logger.journal import Journal
from hayflick_logger.metrics import MetricFilter, MetricStore
from hayflick_logger.planning import Plan
from hayflick_logger.recovery import corrupt
from hayflick_logger.rows import Filter
from hayflick_rpc.errors import HayflickError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hayflick.v1 import logger_pb2
    from hayflick_logger.config import Config
    from hayflick_tlog.verify import Finding

# A page is cut short when its events grow beyond this; a message must hold it.
MAX_PAGE_BYTES = 4 * 1024 * 1024
INDEX = "index.sqlite"

log = logging.getLogger(__name__)


class Record:
    """Everything a logger keeps. One thread writes; any may read.

    Raises:
        HayflickError: JOURNAL_CORRUPT.
        OSError: The directory is not ours alone, or held by another logger.
    """

    def __init__(self, config: Config) -> None:
        directory = config.data_dir.absolute()
        with ExitStack() as opened:
            opened.callback(Claim(directory).close)
            self._index = Index(directory / INDEX)
            opened.callback(self._index.close)
            self.journal = Journal(
                directory,
                origin=config.origin,
                max_segment_bytes=config.max_segment_bytes,
                check_all=config.check_all_on_start,
                witness=self._index.witness,
            )
            opened.callback(self.journal.close)
            self._metrics = MetricStore(directory / "metrics.sqlite", max_samples=config.max_metrics)
            opened.callback(self._metrics.close)
            try:
                self._index.attach(self.journal)
            except entries.BadEntry as error:
                raise corrupt(str(error), -1) from error
            self._opened = opened.pop_all()
        self._index_failed = False
        # What the logger itself has to say and could not yet record.
        self._notes: list[tuple[str, dict[str, int]]] = []
        if self.journal.healed_bytes:
            details = {"removed_bytes": self.journal.healed_bytes, "next_index": self.journal.next_index}
            self._notes.append(("journal_healed", details))
            with suppress(HayflickError):  # a full disk: said with the first commit that succeeds
                self.commit(self.plan())

    def close(self) -> None:
        """Close everything, in reverse."""
        self._opened.close()

    @property
    def waiting(self) -> int:
        """How many entries of the index, and metric samples, are in memory alone."""
        return self._index.waiting + self._metrics.waiting

    def plan(self) -> Plan:
        """Return an empty plan over what is recorded now.

        Raises:
            HayflickError: AUDIT_UNAVAILABLE while the index cannot be written: it
                bears witness to the record, and what it holds in memory is bounded.
        """
        if self._index_failed:
            self._flush_index()
        seconds, nanos = divmod(time.time_ns(), 1_000_000_000)
        plan = Plan(self._index.last_sequence, self._event_of, Timestamp(seconds=seconds, nanos=nanos))
        for name, details in self._notes:
            plan.note(name, details)
        return plan

    def commit(self, plan: Plan) -> None:
        """Make *plan* durable.

        Raises:
            HayflickError: AUDIT_UNAVAILABLE: nothing of it is recorded.
        """
        placed = self.journal.append(plan.drafts)
        self._notes.clear()
        self._index.add(placed)

    def flush(self) -> None:
        """Write what is in memory alone. An index that fails stops all appending until it is written.

        Raises:
            HayflickError: AUDIT_UNAVAILABLE: some of it cannot be written.
        """
        try:
            self._flush_index()
        finally:
            try:
                self._metrics.flush()
            except sqlite3.Error as error:
                raise _unavailable(f"metrics cannot be written: {error}") from error

    def publish(self) -> None:
        """Write what is new of the tree, and a signed checkpoint over it.

        Raises:
            HayflickError: AUDIT_UNAVAILABLE: it cannot be written.
        """
        try:
            self.journal.publish()
        except OSError as error:
            raise _unavailable(f"the checkpoint cannot be written: {error}") from error

    def add_metrics(self, samples: Sequence[logger_pb2.MetricSample]) -> None:
        """Keep *samples*.

        Raises:
            HayflickError: AUDIT_UNAVAILABLE: they cannot be written.
        """
        try:
            self._metrics.add(samples)
        except sqlite3.Error as error:
            raise _unavailable(f"metrics cannot be written: {error}") from error

    def events(
        self, wanted: Filter, start_index: int, end_index: int, limit: int
    ) -> tuple[list[logger_pb2.RecordedEvent], int]:
        """Return the first entries in [*start_index*, *end_index*) that *wanted* lets through.

        Returns:
            At most *limit* entries and about MAX_PAGE_BYTES; and the index from
            which to go on, *end_index* when there are no more.

        Raises:
            HayflickError: AUDIT_UNAVAILABLE when the index is behind
                *end_index*; JOURNAL_CORRUPT when an entry cannot be read back.
        """
        if end_index > self._index.size:
            raise _unavailable("the index is behind the record; try again")
        try:
            found = self._index.find(wanted, start_index, end_index, limit + 1)
        except sqlite3.Error as error:
            raise _unavailable(f"the index cannot be read: {error}") from error
        read = self.journal.read(found[:limit])
        kept, size_bytes = 0, 0
        for entry in read:
            size_bytes += len(entry)
            if kept and size_bytes > MAX_PAGE_BYTES:
                break
            kept += 1
        try:
            events = [entries.parse(entry, index) for index, entry in zip(found[:kept], read, strict=False)]
        except entries.BadEntry as error:
            raise corrupt(str(error), -1) from error
        return events, found[kept] if kept < len(found) else end_index

    def metrics(
        self, wanted: MetricFilter, after_id: int, limit: int
    ) -> list[tuple[int, logger_pb2.MetricSample]]:
        """Return the first *limit* samples behind *after_id* that *wanted* lets through, with their ids.

        Raises:
            HayflickError: AUDIT_UNAVAILABLE: they cannot be read, or the newest not written.
        """
        try:
            return self._metrics.find(wanted, after_id, limit)
        except sqlite3.Error as error:
            raise _unavailable(f"metrics cannot be read: {error}") from error

    def verify(self) -> Finding:
        """Recompute the whole tree."""
        return self.journal.verify()

    def _flush_index(self) -> None:
        try:
            self._index.flush()
        except sqlite3.Error as error:
            self._index_failed = True
            raise _unavailable(f"the index cannot be written: {error}") from error
        self._index_failed = False

    def _event_of(self, source: str, sequence: int) -> bytes | None:
        index = self._index.index_of(source, sequence)
        return entries.event_bytes(self.journal.read([index])[0]) if index is not None else None


def _unavailable(message: str) -> HayflickError:
    return HayflickError(ErrorReason.ERROR_REASON_AUDIT_UNAVAILABLE, message, retry_after_seconds=1.0)
