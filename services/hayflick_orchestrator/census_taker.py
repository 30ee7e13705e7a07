"""Takes the census every few seconds, and tells of what is not as declared."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from hayflick_orchestrator.census import Place, Sightings, compare
from hayflick_orchestrator.census_reader import observe
from hayflick_sandbox.cgroups import LEAF

if TYPE_CHECKING:
    from collections.abc import Callable

    from hayflick_orchestrator.census import Drift
    from hayflick_orchestrator.host import Host
    from hayflick_orchestrator.records import Records
    from hayflick_orchestrator.supervisor import Everyone
    from hayflick_orchestrator.workers import Worker

log = logging.getLogger(__name__)


class CensusTaker:
    """Compares what this node declared with what the kernel shows.

    Args:
        host: The sandboxes, and where they are.
        population: Whose they are.
        records: Told of each drift.
        node_id: This node.
        interval_seconds: From the end of one count to the next.

    Attributes:
        on_drift: Told of each drift in the place of a worker that lives.
        seconds: How long the last count took.
    """

    def __init__(
        self, host: Host, population: Everyone, records: Records, *, node_id: str, interval_seconds: float
    ) -> None:
        self._host = host
        self._population = population
        self._records = records
        self._node_id = node_id
        self._interval_seconds = interval_seconds
        self._sightings = Sightings()
        # Its own thread: a count must never wait for the living, nor they for it.
        self._reader = ThreadPoolExecutor(1, "census")
        self.on_drift: Callable[[Worker, Drift], None] = lambda *_: None
        self.seconds = 0.0

    async def run(self) -> None:
        """Count for ever."""
        while True:
            await asyncio.sleep(self._interval_seconds)
            try:
                await self.count()
            except OSError as error:
                # The next may go better; without any, nothing else suffers.
                log.warning("the census could not be taken: %s", error)

    async def count(self) -> list[Drift]:
        """Take one census; return the drifts that it told of."""
        started = time.monotonic()
        before = self._places()
        loop = asyncio.get_running_loop()
        observed = await loop.run_in_executor(self._reader, observe, self._host.tree)
        after = self._places()
        # Who was there at one of the two is declared; who was at both, and whole, must be there.
        places = [
            Place(
                one.path,
                one.worker_id,
                one.init_pid,
                settled=one.settled and after.get(path) == one,
            )
            for path, one in {**after, **before}.items()
        ]
        drifts = await loop.run_in_executor(self._reader, compare, places, observed, LEAF)
        told = self._sightings.confirm(drifts)
        for drift in told:
            self._tell(drift)
        self.seconds = time.monotonic() - started
        return told

    def _places(self) -> dict[str, Place]:
        places = {
            birth.cgroup_path: Place(birth.cgroup_path, birth.worker_id)
            for birth in self._population.births
            if birth.cgroup_path
        }
        for sandbox in self._host.sandboxes:
            settled = sandbox.ready.done() and not sandbox.doomed and not sandbox.dead.done()
            path = sandbox.cgroup_path
            places[path] = Place(path, init_pid=sandbox.pid or 0, settled=settled)
        for worker in self._population:
            if (place := places.get(worker.cgroup_path)) is not None:
                settled = place.settled and not worker.life.ending
                places[place.path] = Place(place.path, worker.worker_id, place.init_pid, settled)
        return places

    def _tell(self, drift: Drift) -> None:
        worker = self._population.get(drift.worker_id)
        log.warning("census: %s at %s, process %d", drift.kind, drift.path, drift.pid)
        details: dict[str, str | int] = {
            "node_id": self._node_id,
            "kind": drift.kind,
            "cgroup_path": drift.path,
        }
        if drift.pid:
            details["host_pid"] = drift.pid
        self._records.census_drift(None if worker is None else worker.record, details)
        if worker is not None:
            self.on_drift(worker, drift)

    async def close(self) -> None:
        """See a count in progress to its end."""
        await asyncio.to_thread(self._reader.shutdown)
