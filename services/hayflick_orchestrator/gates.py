"""The gate before a sandbox's channels: shut while it is quarantined, so that nothing passes.

Whoever reads from a sandbox, or tells it something, asks the gate first. What
waits behind it waits where it was: in kernel buffers, which are bounded.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class Gate:
    """Open, or shut.

    Args:
        on_turn: Called after each turn.
    """

    def __init__(self, on_turn: Callable[[], None] = lambda: None) -> None:
        self._loop = asyncio.get_running_loop()
        self._open = True
        self._on_turn = on_turn
        self._turned: asyncio.Future[None] = self._loop.create_future()

    @property
    def is_open(self) -> bool:
        """Whether anything may pass now."""
        return self._open

    def open(self) -> None:
        """Let pass."""
        self._turn(to_open=True)

    def shut(self) -> None:
        """Let nothing pass, from this moment on."""
        self._turn(to_open=False)

    def _turn(self, *, to_open: bool) -> None:
        if self._open is to_open:
            return
        self._open = to_open
        turned, self._turned = self._turned, self._loop.create_future()
        turned.set_result(None)
        self._on_turn()

    async def passage(self, unless: Iterable[asyncio.Future[Any]] = ()) -> bool:
        """Wait until the gate is open, or one of *unless* is done; return whether it is open."""
        reasons = set(unless)
        while not self._open and not _any_done(reasons):
            # Not awaited itself: a waiter that is cancelled would cancel it for all.
            await asyncio.wait({self._turned, *reasons}, return_when=asyncio.FIRST_COMPLETED)
        return self._open

    async def first(self, futures: Iterable[asyncio.Future[Any]], seconds: float | None) -> bool:
        """Wait until one of *futures* is done; return whether one is.

        Args:
            futures: What is waited for.
            seconds: How long at most. Time does not run while the gate is shut:
                whoever stands still uses none up.
        """
        waiting = set(futures)
        left = seconds
        while not _any_done(waiting):
            if left is not None and left <= 0:
                return False
            started, counts = time.monotonic(), self._open
            await asyncio.wait(
                {self._turned, *waiting},
                timeout=left if counts else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if left is not None and counts:
                left -= time.monotonic() - started
        return True


def _any_done(futures: Iterable[asyncio.Future[Any]]) -> bool:
    return any(future.done() for future in futures)
