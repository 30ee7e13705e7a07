"""Changes of workers, told to whoever watches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_rpc.errors import HayflickError

if TYPE_CHECKING:
    from hayflick_controller.model import Worker
    from hayflick_controller.store import Commit

MAX_BEHIND = 1_024
"""How many changes a watcher may be behind before it is cut off."""


class Watch:
    """One watcher's line. It starts to fill when it is made."""

    def __init__(self, contract_id: str) -> None:
        self._contract_id = contract_id
        self._queue: asyncio.Queue[Worker | None] = asyncio.Queue(MAX_BEHIND + 1)
        self._failure: HayflickError | None = None

    def tell(self, worker: Worker) -> None:
        """Queue a change if it is wanted; a watcher that is too far behind is cut off."""
        if self._failure is not None or self._contract_id not in ("", worker.contract_id):
            return
        if self._queue.qsize() >= MAX_BEHIND:
            self.close(
                HayflickError(
                    ErrorReason.ERROR_REASON_SERVICE_UNAVAILABLE,
                    f"the watcher is {MAX_BEHIND} changes behind; watch again to catch up",
                    metadata={"service": "watch", "limit": str(MAX_BEHIND)},
                )
            )
            return
        self._queue.put_nowait(worker)

    def close(self, failure: HayflickError) -> None:
        """End the line after what is queued, with *failure*."""
        if self._failure is None:
            self._failure = failure
            self._queue.put_nowait(None)

    async def changes(self) -> AsyncGenerator[Worker]:
        """Yield the changes.

        Raises:
            HayflickError: SERVICE_UNAVAILABLE when too far behind; SHUTTING_DOWN.
        """
        while (worker := await self._queue.get()) is not None:
            yield worker
        assert self._failure is not None
        raise self._failure


class Broadcast:
    """Tells every watcher of every change."""

    def __init__(self) -> None:
        self._watches: set[Watch] = set()

    def follow(self, commit: Commit) -> None:
        """Tell what a commit changed; called in the order of commits."""
        for watch in self._watches:
            for worker in commit.workers:
                watch.tell(worker)

    def join(self, contract_id: str) -> Watch:
        """Return a line for a new watcher; give it back to :meth:`leave`."""
        watch = Watch(contract_id)
        self._watches.add(watch)
        return watch

    def leave(self, watch: Watch) -> None:
        """Stop telling a watcher."""
        self._watches.discard(watch)

    def close(self) -> None:
        """End every line: the service stops."""
        for watch in self._watches:
            watch.close(
                HayflickError(ErrorReason.ERROR_REASON_SHUTTING_DOWN, "the controller is shutting down")
            )
