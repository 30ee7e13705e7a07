"""The living, in memory: who beats where, and what was last heard of each.

Nothing is decided by it. It follows the commits, and it holds the beats between
two writes to the database, so that thousands of them a second cost no
transaction each.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from hayflick_controller.model import EndReason, State
from hayflick_controller.store.protocol import Beat

if TYPE_CHECKING:
    from hayflick_controller.model import NetworkPolicy, Usage, Worker
    from hayflick_controller.store import Commit


class Departures:
    """Waits until every one of some workers has ended.

    Attributes:
        remaining: Those that live.
        unseen: Those that count as dead because their node was silent for a whole lease.
    """

    def __init__(self, worker_ids: Iterable[str]) -> None:
        self.remaining = set(worker_ids)
        self.unseen: set[str] = set()
        self._done = asyncio.Event()
        self._check()

    def ended(self, worker_id: str, *, seen: bool = True) -> None:
        """Count a worker as ended, and note when nobody *saw* that."""
        if not seen and worker_id in self.remaining:
            self.unseen.add(worker_id)
        self.remaining.discard(worker_id)
        self._check()

    async def wait(self) -> None:
        """Return when none remains."""
        await self._done.wait()

    def _check(self) -> None:
        if not self.remaining:
            self._done.set()


class Roster:
    """See the module."""

    def __init__(self) -> None:
        self._workers: dict[str, tuple[str, State]] = {}
        self._expire_us: dict[str, int] = {}
        self._narrowed: dict[str, NetworkPolicy] = {}
        self._beats: dict[str, Beat] = {}
        self._unwritten: set[str] = set()
        self._departures: set[Departures] = set()

    def load(self, workers: Iterable[Worker]) -> None:
        """Take those who live when the controller starts."""
        for worker in workers:
            self._take(worker)

    def follow(self, commit: Commit) -> None:
        """Take what a commit changed; called in the order of commits."""
        for worker in commit.workers:
            if worker.live:
                self._take(worker)
                continue
            self._workers.pop(worker.worker_id, None)
            self._expire_us.pop(worker.worker_id, None)
            self._narrowed.pop(worker.worker_id, None)
            self._beats.pop(worker.worker_id, None)
            self._unwritten.discard(worker.worker_id)
            seen = worker.exit is None or worker.exit.reason is not EndReason.NODE_LOST
            for departures in self._departures:
                departures.ended(worker.worker_id, seen=seen)

    def _take(self, worker: Worker) -> None:
        self._workers[worker.worker_id] = (worker.node_id, worker.state)
        if worker.expire_us is not None:
            self._expire_us[worker.worker_id] = worker.expire_us
        if worker.network is not None:
            self._narrowed[worker.worker_id] = worker.network

    def known(self) -> frozenset[str]:
        """Return the living."""
        return frozenset(self._workers)

    def expired(self, before_us: int) -> list[str]:
        """Return the workers whose life by contract ended before *before_us*."""
        return [worker_id for worker_id, expire_us in self._expire_us.items() if expire_us < before_us]

    def state_on(self, node_id: str, worker_id: str) -> State | None:
        """Return a worker's state if it lives on this node."""
        node, state = self._workers.get(worker_id, ("", None))
        return state if node == node_id else None

    def starting(self) -> list[str]:
        """Return the workers that were not yet heard of as running."""
        return [worker_id for worker_id, (_, state) in self._workers.items() if state is State.STARTING]

    def quarantined(self) -> list[str]:
        """Return the workers that are recorded as frozen."""
        return [worker_id for worker_id, (_, state) in self._workers.items() if state is State.QUARANTINED]

    def place(self, worker_id: str) -> tuple[str, State | None]:
        """Return where a worker lives, and its state; nowhere when it does not."""
        return self._workers.get(worker_id, ("", None))

    def narrowed(self) -> dict[str, NetworkPolicy]:
        """Return what is left to the workers from whom some of their network policy was taken."""
        return dict(self._narrowed)

    def beat(self, worker_id: str, heard_us: int, usage: Usage) -> None:
        """Take a beat of a live worker."""
        self._beats[worker_id] = Beat(worker_id, heard_us, usage)
        self._unwritten.add(worker_id)

    def unwritten(self) -> list[Beat]:
        """Return the beats that the database does not have yet, and count them as written."""
        beats = [self._beats[worker_id] for worker_id in self._unwritten]
        self._unwritten.clear()
        return beats

    def freshen(self, worker: Worker) -> Worker:
        """Return *worker* with what was heard since its record was written."""
        beat = self._beats.get(worker.worker_id)
        if beat is None or beat.last_heartbeat_us <= worker.last_heartbeat_us:
            return worker
        return replace(worker, last_heartbeat_us=beat.last_heartbeat_us, usage=beat.usage)

    def watch_departures(self, worker_ids: Iterable[str]) -> Departures:
        """Return something that waits for the end of live workers; give it back to :meth:`forget`."""
        departures = Departures(worker_id for worker_id in worker_ids if worker_id in self._workers)
        self._departures.add(departures)
        return departures

    def forget(self, departures: Departures) -> None:
        """Stop counting for *departures*."""
        self._departures.discard(departures)
