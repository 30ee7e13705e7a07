"""How fast a worker may be refused births: each refusal is on record, and a record has an end.

Nothing is left out and nothing is refused for haste: who was refused too often
waits for its next attempt, as who makes too many refused calls does.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

from hayflick_orchestrator.denials import Budget

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

# As many as a task may have in progress, twice: who is refused nothing waits for nothing.
REFUSALS_AT_ONCE = 32
REFUSALS_PER_SECOND = 1.0


class Attempts:
    """The attempts of one worker, on the event loop.

    Args:
        at_once: How many may be in progress, or were refused lately.
        per_second: How many of those refused are forgiven.
    """

    def __init__(self, at_once: int = REFUSALS_AT_ONCE, per_second: float = REFUSALS_PER_SECOND) -> None:
        self._budget = Budget(per_second, at_once, time.monotonic())
        self._returned = asyncio.Event()

    @contextlib.asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """Wait for a turn, and make an attempt; one that raises costs its turn."""
        while not self._budget.take(time.monotonic()):
            self._returned.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._budget.wait_seconds(time.monotonic())):
                    await self._returned.wait()
        yield
        self._budget.give()
        self._returned.set()
