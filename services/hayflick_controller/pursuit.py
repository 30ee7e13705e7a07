"""Ending workers: orders to their nodes, again and again, until each is seen dead.

What must end is in the database (STOPPING), so a pursuit survives the controller.
A node's confirmation, a node's own report, or the end of its lease, whichever
comes first, records the end.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hayflick.v1 import controller_pb2
from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_controller import ends, lineage, parse, render
from hayflick_controller.clock import seconds
from hayflick_controller.model import EndReason, Exit, Latch, Scope, ScopeKind, State, Usage, Worker
from hayflick_rpc import wire
from hayflick_rpc.errors import HayflickError

if TYPE_CHECKING:
    from hayflick_controller.clock import Clock
    from hayflick_controller.links import Link, Result
    from hayflick_controller.roster import Roster
    from hayflick_controller.store import Store, Tx

ORDER_TIMEOUT_SECONDS = 10.0
"""When an order without a result is given again."""
TICK_SECONDS = 1.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kill:
    """One order to one node."""

    scope: Scope
    reason: EndReason
    detail: str
    worker_ids: tuple[str, ...]
    grace_us: int = 0


class Pursuit:
    """See the module.

    Attributes:
        links: The live streams, by node.
    """

    def __init__(self, store: Store, roster: Roster, clock: Clock) -> None:
        self.links: dict[str, Link] = {}
        self._store = store
        self._roster = roster
        self._clock = clock
        self._ordered: set[tuple[str, str]] = set()
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[Result | None]] = set()
        self._insisting: set[asyncio.Task[None]] = set()

    def kick(self) -> None:
        """Look for workers to end now rather than at the next tick."""
        self._wake.set()

    async def run(self) -> None:
        """Pursue until cancelled."""
        while True:
            try:
                await self._give_orders()
            except HayflickError as error:
                log.warning("pursuit pauses: %s", error.message)
            try:
                async with asyncio.timeout(TICK_SECONDS):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()

    async def close(self) -> None:
        """Stop waiting for results; what is STOPPING is pursued by the next start."""
        tasks: list[asyncio.Task[Any]] = [*self._tasks, *self._insisting]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def kill(self, link: Link, kill: Kill) -> asyncio.Task[Result | None]:
        """Give an order; the task returns its result once the ends are recorded, or ``None``."""
        ordered = {(link.node_id, worker_id) for worker_id in kill.worker_ids}
        self._ordered |= ordered
        task = asyncio.create_task(self._carry(link, kill))
        self._tasks.add(task)

        def done(finished: asyncio.Task[Result | None]) -> None:
            self._tasks.discard(finished)
            self._ordered -= ordered

        task.add_done_callback(done)
        return task

    def evict(self, node_id: str, worker_ids: Sequence[str]) -> None:
        """End what a node runs and should not: the record has it as ended, or never had it."""
        link = self.links.get(node_id)
        for worker_id in worker_ids:
            if link is not None and (node_id, worker_id) not in self._ordered:
                scope = Scope(ScopeKind.WORKER, worker_id)
                self.kill(link, Kill(scope, EndReason.KILLED, "not in the controller's record", (worker_id,)))

    async def _give_orders(self) -> None:
        ordered = frozenset(self._ordered)

        def read(tx: Tx) -> tuple[list[Worker], list[Latch]]:
            # Names first: while a thousand are dying, all are ordered to.
            if ordered.issuperset(tx.stopping()):
                return [], []
            return tx.live_workers(stopping=True), tx.engaged()

        stopping, latches = await self._store.transact(read)
        by_node: defaultdict[str, list[Worker]] = defaultdict(list)
        for worker in stopping:
            if (worker.node_id, worker.worker_id) not in self._ordered:
                by_node[worker.node_id].append(worker)
        for node_id, workers in by_node.items():
            link = self.links.get(node_id)
            if link is None or link.closed:
                continue  # its lease runs out, or it returns and its hello is answered
            for kill in plan(workers, latches):
                self.kill(link, kill)

    def order(self, link: Link, kill: Kill) -> asyncio.Future[Result]:
        """Give an order, and record nothing of what comes of it."""
        return link.order(
            controller_pb2.Order(
                kill=controller_pb2.KillOrder(
                    scope=render.scope(kill.scope),
                    reason=render.end_reason(kill.reason),
                    detail=kill.detail,
                    worker_ids=kill.worker_ids,
                    grace=wire.duration(seconds(kill.grace_us)),
                )
            )
        )

    def insist(self, act: Callable[[], Awaitable[object]]) -> None:
        """Do *act* once the database answers again, for as long as this process lives."""
        task = asyncio.create_task(_until_available(act))
        self._insisting.add(task)
        task.add_done_callback(self._insisting.discard)

    async def _carry(self, link: Link, kill: Kill) -> Result | None:
        future = self.order(link, kill)
        try:
            async with asyncio.timeout(ORDER_TIMEOUT_SECONDS + seconds(kill.grace_us)):
                result = await future
            await self._record(link.node_id, result, kill)
        except (TimeoutError, HayflickError) as error:
            log.warning("node %s did not confirm a kill: %s", link.node_id, str(error) or "no answer in time")
            return None
        if result.error or result.unconfirmed_worker_ids:
            log.warning(
                "node %s could not confirm %d workers dead: %s",
                link.node_id,
                len(result.unconfirmed_worker_ids),
                result.error,
            )
        return result

    async def _record(self, node_id: str, result: Result, kill: Kill) -> None:
        now_us = self._clock()
        dead = result.worker_ids
        ordered = set(kill.worker_ids)
        told = _told(result, now_us)

        def exit_of(worker: Worker) -> Exit:
            known = told.get(worker.worker_id)
            return _exit_of(worker, kill, now_us, None if known is None else known[0])

        def freshen(worker: Worker) -> Worker:
            known = told.get(worker.worker_id)
            fresh = self._roster.freshen(worker)
            return fresh if known is None else replace(fresh, usage=known[1])

        def due(worker: Worker) -> bool:
            return (
                worker.worker_id in ordered
                or worker.state is State.STOPPING
                or not worker.live
                or _covers(kill.scope, worker)
            )

        def run(tx: Tx) -> list[str]:
            found = [tx.worker(worker_id) for worker_id in dead]
            here = [worker for worker in found if worker is not None and worker.node_id == node_id]
            ended = [(worker, exit_of(worker)) for worker in here if due(worker)]
            ends.end(tx, ended, now_us, freshen)
            return [worker.worker_id for worker in here if not due(worker)]

        if dead:
            strangers = await self._store.transact(run)
            if strangers:  # a node that is wrong about an order must not end whom nobody wanted ended
                log.warning(
                    "node %s says that a kill ended %d workers it was not for, among them %s: ignored",
                    node_id,
                    len(strangers),
                    strangers[0],
                )
            self.kick()  # their descendants on other nodes


async def _until_available(act: Callable[[], Awaitable[object]]) -> None:
    while True:
        try:
            await act()
        except HayflickError as error:
            if error.reason != ErrorReason.ERROR_REASON_SERVICE_UNAVAILABLE:
                log.error("given up: %s", error.message)  # noqa: TRY400 -- the text says it all
                return
            await asyncio.sleep(TICK_SECONDS)
        else:
            return


def _told(result: Result, now_us: int) -> dict[str, tuple[Exit, Usage]]:
    """Return what a node tells of the ends it brought, less what it tells wrongly: dead is dead."""
    told: dict[str, tuple[Exit, Usage]] = {}
    for end in result.ends:
        try:
            told[end.worker_id] = parse.exit_(end.exit, now_us), parse.usage("ends.usage", end.usage)
        except HayflickError as error:
            log.warning("the end of worker %.64s is told wrongly: %s", end.worker_id, error.message)
    return told


def _exit_of(worker: Worker, kill: Kill, now_us: int, told: Exit | None) -> Exit:
    """Return how *worker* ended by *kill*, given what its node told of it.

    Whoever descends from the one that was meant dies of that, and not of its
    ancestor's own reason: it may well have been launched, and heard of.
    """
    reason, detail = kill.reason, kill.detail
    if worker.stop_reason is not None:
        reason, detail = worker.stop_reason, worker.stop_detail
    elif worker.worker_id not in kill.worker_ids and reason is not EndReason.KILL_SWITCH:
        reason, detail = EndReason.KILLED, ends.ANCESTOR_ENDED
    if told is None:
        return Exit(reason, now_us, detail)
    if told.reason not in (EndReason.KILLED, kill.reason):
        return told  # it ended by itself before
    return replace(told, reason=reason, detail=detail if told.detail in ("", kill.detail) else told.detail)


def plan(workers: Sequence[Worker], latches: Sequence[Latch]) -> list[Kill]:
    """Return the orders that end *workers*, all of one node: as few and as wide as their causes allow."""
    kills: list[Kill] = []
    rest = list(workers)
    for latch in latches:  # "contract/" sorts before "everything" and that before "worker/"
        covered = [worker for worker in rest if _covers(latch.scope, worker)]
        if covered:
            ids = tuple(worker.worker_id for worker in covered)
            kills.append(Kill(latch.scope, EndReason.KILL_SWITCH, latch.reason, ids))
            rest = [worker for worker in rest if worker not in covered]
    for top in lineage.topmost(rest):
        family = [worker.worker_id for worker in rest if lineage.covers(top.path, worker.path)]
        scope = Scope(ScopeKind.WORKER, top.worker_id)
        reason = top.stop_reason or EndReason.KILLED
        kills.append(Kill(scope, reason, top.stop_detail, tuple(family)))
    return kills


def _covers(scope: Scope, worker: Worker) -> bool:
    match scope.kind:
        case ScopeKind.EVERYTHING:
            return True
        case ScopeKind.CONTRACT:
            return worker.contract_id == scope.id
        case ScopeKind.WORKER:
            return scope.id in lineage.members(worker.path)
        case ScopeKind.QUARANTINE:
            return False
