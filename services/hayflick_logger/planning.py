"""Pure: which events of a batch are new, which were recorded before, and which are missing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hayflick.v1 import logger_pb2
from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_logger.journal import Draft
from hayflick_rpc import events
from hayflick_rpc.errors import HayflickError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from google.protobuf.timestamp_pb2 import Timestamp

OWN_SOURCE = "logger"


class Plan:
    """What one commit adds to the record.

    Args:
        last_sequence: The highest recorded sequence of a source; 0 for none.
        recorded: The event recorded under a source and sequence, if any.
        now: The time that the logger's own events bear.
    """

    def __init__(
        self,
        last_sequence: Callable[[str], int],
        recorded: Callable[[str, int], bytes | None],
        now: Timestamp,
    ) -> None:
        self.drafts: list[Draft] = []
        self._last_sequence = last_sequence
        self._recorded = recorded
        self._now = now
        self._last: dict[str, int] = {}
        self._planned: dict[tuple[str, int], bytes] = {}

    def last(self, source: str) -> int:
        """Return the highest sequence of *source* once this commit is done."""
        if source not in self._last:
            self._last[source] = self._last_sequence(source)
        return self._last[source]

    def take(self, source: str, batch: Sequence[tuple[int, bytes]]) -> None:
        """Add what is new in *batch*: pairs of sequence and canonical event, ascending.

        An event that was recorded before is passed over. One whose sequence lies
        below the last but was never recorded is added late: acknowledging it
        without would be a lie. A sequence that leaves others out is recorded as
        it is, behind a ``sequence_gap`` that says so.

        Raises:
            HayflickError: REQUEST_ID_REUSED when another event was recorded
                under the same sequence; nothing of the batch is added then.
        """
        new = [(sequence, event) for sequence, event in batch if not self._known(source, sequence, event)]
        for sequence, event in new:
            expected = self.last(source) + 1
            if sequence > expected:
                self.note(
                    "sequence_gap",
                    {"source": source, "expected_sequence": expected, "received_sequence": sequence},
                )
            self._add(source, sequence, event)

    def note(self, name: str, details: Mapping[str, str | int]) -> None:
        """Add an event of the logger's own."""
        event = logger_pb2.Event(event=name, timestamp=self._now)
        event.details.update(details)
        self._add(OWN_SOURCE, self.last(OWN_SOURCE) + 1, events.to_json(event))

    def _known(self, source: str, sequence: int, event: bytes) -> bool:
        if sequence > self.last(source):
            return False
        before = self._planned.get((source, sequence)) or self._recorded(source, sequence)
        if before is not None and before != event:
            raise HayflickError(
                ErrorReason.ERROR_REASON_REQUEST_ID_REUSED,
                f"another event of {source} was recorded under sequence {sequence}",
                metadata={"request_id": f"{source}/{sequence}"},
            )
        return before is not None

    def _add(self, source: str, sequence: int, event: bytes) -> None:
        self.drafts.append(Draft(source, sequence, event))
        self._planned[source, sequence] = event
        self._last[source] = max(self.last(source), sequence)
