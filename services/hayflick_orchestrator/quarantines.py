"""Quarantine: a kernel freeze of a family, and a cut of its channels; and the way back.

The channels are cut before the freeze is ordered and opened after the thaw, so
nothing that a worker said on its way into quarantine is acted upon before its
release. Ends win: a frozen worker is killed like any other. One that is still being
born is called off instead: it has done nothing yet that could be looked at.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from hayflick.v1.resources_pb2 import State
from hayflick_orchestrator.lifecycle import Frozen, Thawed
from hayflick_orchestrator.reports import Report
from hayflick_orchestrator.workers import worker_unknown
from hayflick_rpc.errors import HayflickError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from hayflick_orchestrator.host import Host
    from hayflick_orchestrator.lifecycle import Event
    from hayflick_orchestrator.supervisor import Everyone
    from hayflick_orchestrator.workers import Birth, Worker

BIRTH_SECONDS = 8.0
"""How long a birth that was called off may take to be over; less than a controller waits."""


class Quarantines:
    """Freezes and thaws families.

    Args:
        host: Where their processes are.
        population: Who descends from whom.
        apply: Puts an event into a worker's life.

    Attributes:
        on_frozen: Told of each family that the kernel confirmed frozen, the
            worker that was named first.
    """

    def __init__(self, host: Host, population: Everyone, apply: Callable[[Worker, Event], object]) -> None:
        self._host = host
        self._population = population
        self._apply = apply
        self.on_frozen: Callable[[tuple[Worker, ...]], None] = lambda _: None

    async def freeze(self, worker_id: str) -> Report:
        """Freeze a worker and its descendants; births below it are called off, and so is its own.

        When the kernel does not confirm it in time the order stands, and the
        channels stay cut: the kernel may still get there. A birth that was called
        off is confirmed once nothing of it is left.

        Raises:
            HayflickError: WORKER_UNKNOWN; LIMIT_NOT_ENFORCEABLE.
        """
        started = time.monotonic()
        unborn = [birth for birth in self._population.births if birth.worker_id == worker_id]
        if unborn and self._population.get(worker_id) is None:
            return await self._await_over(worker_id, unborn, started)
        worker = self._require(worker_id)
        worker.own_freeze = True
        family = self._population.family(worker_id)
        for member in family:
            _cut(member)
        ids = {member.worker_id for member in family}
        await self._call_off(birth for birth in self._population.births if birth.parent_id in ids)
        try:
            confirmed = await self._host.freeze(worker.cgroup_path)
        except HayflickError:
            self.thaw(worker_id)
            raise
        members = self._population.family(worker_id)
        elapsed = time.monotonic() - started
        if not (confirmed and worker.own_freeze):  # it may be thawed again by now
            return Report((), tuple(member.worker_id for member in members), elapsed)
        news = False
        for member in members:
            before = member.life.state
            self._apply(member, Frozen())
            news = news or (before, member.life.state) == (State.STATE_RUNNING, State.STATE_QUARANTINED)
        if news:
            self.on_frozen(members)
        return Report(tuple(member.worker_id for member in members), (), elapsed)

    def thaw(self, worker_id: str) -> Report:
        """Let a worker and its descendants go on, but those that another freeze still holds.

        Raises:
            HayflickError: WORKER_UNKNOWN.
        """
        started = time.monotonic()
        if self._population.get(worker_id) is None and any(
            birth.worker_id == worker_id for birth in self._population.births
        ):
            return Report((), (), 0.0)  # one that was called off does not come to life any more
        worker = self._require(worker_id)
        worker.own_freeze = False
        self._host.thaw(worker.cgroup_path)
        thawed = []
        for member in self._population.family(worker_id):
            line = (member, *self._population.ancestors(member.worker_id))
            if not any(one.own_freeze for one in line):
                # Its init could not beat; it gets the full time to do so again.
                member.thawed_monotonic = time.monotonic()
                self._apply(member, Thawed())
                _join(member)
                thawed.append(member.worker_id)
        return Report(tuple(thawed), (), time.monotonic() - started)

    async def _await_over(self, worker_id: str, births: Sequence[Birth], started: float) -> Report:
        await self._call_off(births, worker_id)
        _, going_on = await asyncio.wait([birth.settled for birth in births], timeout=BIRTH_SECONDS)
        elapsed = time.monotonic() - started
        return Report((), (worker_id,), elapsed) if going_on else Report((worker_id,), (), elapsed)

    async def _call_off(self, births: Iterable[Birth], own_id: str = "") -> None:
        """See that nothing of *births* comes to life: of *own_id*, or of children of the frozen."""
        places = []
        for birth in births:
            birth.frozen = own_id or birth.parent_id
            places.append(birth.cgroup_path)
        await asyncio.gather(*(self._host.kill(place) for place in places if place))

    def _require(self, worker_id: str) -> Worker:
        worker = self._population.get(worker_id)
        if worker is None:
            raise worker_unknown(worker_id)
        return worker


def _cut(worker: Worker) -> None:
    worker.sandbox.gate.shut()
    for door in worker.doors.values():
        door.hold()


def _join(worker: Worker) -> None:
    worker.sandbox.gate.open()
    for door in worker.doors.values():
        door.release()
