"""Following the record: stored entries first, then each new one, without a gap or a double.

A follower is a position in the record and nothing else. It reads what the index
has beyond its position and then waits for the record to grow, so stored and
live entries come from one place, and one that reads slowly holds back itself
alone: there is no queue to fill.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hayflick.v1 import logger_pb2
    from hayflick_logger.record import Record
    from hayflick_logger.rows import Filter

PAGE_ENTRIES = 256


class Growth:
    """How far the record reaches, for those who wait for more of it. Lives in the loop."""

    def __init__(self, next_index: int) -> None:
        self.next_index = next_index
        self.ended = False
        self._changed = asyncio.Event()

    def reach(self, next_index: int) -> None:
        """Say that the record reaches up to *next_index*."""
        self.next_index = max(self.next_index, next_index)
        self._wake()

    def end(self) -> None:
        """Say that it grows no more."""
        self.ended = True
        self._wake()

    async def beyond(self, index: int) -> bool:
        """Return true once there is an entry at *index*, false when none will come."""
        while self.next_index <= index and not self.ended:
            await self._changed.wait()
        return self.next_index > index

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


async def follow(
    record: Record, growth: Growth, wanted: Filter, start_index: int
) -> AsyncIterator[logger_pb2.RecordedEvent]:
    """Yield each entry from *start_index* on that *wanted* lets through, until the record ends.

    Raises:
        HayflickError: As for :meth:`Record.events`.
    """
    position = start_index
    while not growth.ended and await growth.beyond(position):
        page, position = await asyncio.to_thread(
            record.events, wanted, position, growth.next_index, PAGE_ENTRIES
        )
        for entry in page:
            yield entry
