"""What must be done from time to time, each on a clock of its own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from hayflick_rpc.errors import HayflickError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Chore:
    """Something to be done every *interval_seconds*."""

    name: str
    interval_seconds: float
    do: Callable[[], Awaitable[object]]


class Chores:
    """Does chores until it is closed; one that fails is logged and done again."""

    def __init__(self, *chores: Chore) -> None:
        self._tasks = [asyncio.create_task(_repeat(chore), name=chore.name) for chore in chores]

    async def close(self) -> None:
        """Stop; return when every chore has stopped."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _repeat(chore: Chore) -> None:
    while True:
        await asyncio.sleep(chore.interval_seconds)
        try:
            await chore.do()
        except HayflickError as error:
            log.warning("%s: %s", chore.name, error.message)
        except Exception:
            # A chore that stopped for good would leave leases unenforced.
            log.exception("%s failed", chore.name)
