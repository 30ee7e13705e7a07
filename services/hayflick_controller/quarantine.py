"""Quarantine: a latch that forbids births, and a freeze that stops time, for a worker and its descendants."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from hayflick.v1 import controller_pb2
from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_controller import events, lineage
from hayflick_controller.killswitch import require_worker
from hayflick_controller.model import Latch, Scope, ScopeKind, State, Worker
from hayflick_controller.outbox import unavailable
from hayflick_controller.standing_orders import Standing, Verb
from hayflick_rpc.errors import HayflickError

if TYPE_CHECKING:
    from hayflick_controller.clock import Clock
    from hayflick_controller.decisions import Decisions, Request
    from hayflick_controller.links import Link
    from hayflick_controller.roster import Roster
    from hayflick_controller.standing_orders import Answer, StandingOrders
    from hayflick_controller.store import Tx
    from hayflick_controller.tripwires import Report

FREEZABLE = frozenset({State.STARTING, State.RUNNING})

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Turned:
    latch: Latch
    worker: Worker
    affected: tuple[Worker, ...]
    position: int
    confirmed: tuple[str, ...] | None = None


class Quarantine:
    """See the module."""

    def __init__(self, decisions: Decisions, standing: StandingOrders, roster: Roster, clock: Clock) -> None:
        self._decisions = decisions
        self._standing = standing
        self._roster = roster
        self._clock = clock
        self._families: dict[Latch, tuple[str, ...]] = {}
        self._releasing: Counter[str] = Counter()
        self._released: set[str] = set()

    async def engage(
        self, request: Request, worker_id: str, reason: str
    ) -> controller_pb2.QuarantineWorkerResponse:
        """Forbid births below a worker, durably, then freeze it and its descendants.

        Acts also when the logger is away.

        Raises:
            HayflickError: WORKER_UNKNOWN; WORKER_NOT_RUNNING when it has ended;
                SERVICE_UNAVAILABLE when no node confirmed the freeze. The births
                stay forbidden then, and the node is told again until it does.
        """
        confirmed = await self._decisions.finish(self._turn(request, worker_id, reason, engaged=True))
        return controller_pb2.QuarantineWorkerResponse(worker_ids=confirmed)

    async def release(
        self, request: Request, worker_id: str, reason: str
    ) -> controller_pb2.ReleaseQuarantineResponse:
        """Thaw a worker and its descendants, but for those under another quarantine.

        Raises:
            HayflickError: WORKER_UNKNOWN; AUDIT_UNAVAILABLE; SERVICE_UNAVAILABLE
                when no node confirmed the thaw. It is released all the same then,
                and the node is told again until it thaws.
        """
        confirmed = await self._decisions.finish(self._release(request, worker_id, reason))
        return controller_pb2.ReleaseQuarantineResponse(worker_ids=confirmed)

    async def trip(self, link: Link, report: Report) -> None:
        """Make a quarantine of what a node froze by itself, as :meth:`engage` would.

        A node repeats its report until it is ordered about the worker: the
        freeze below is that order, also where the quarantine stands already. It
        can quarantine nobody but what it runs.
        """
        await self._decisions.finish(self._trip(link, report))

    async def _trip(self, link: Link, report: Report) -> None:
        scope = Scope(ScopeKind.QUARANTINE, report.frozen_worker_id)

        def turn(tx: Tx) -> _Turned | None:
            worker, tripped = tx.worker(report.frozen_worker_id), tx.worker(report.worker_id)
            if worker is None or not worker.live or worker.node_id != link.node_id:
                return None
            if tripped is None or worker.worker_id not in lineage.members(tripped.path):
                return None
            latch = tx.latches([scope]).get(scope, Latch(scope))
            affected = tuple(tx.live_workers(path=worker.path))
            if not latch.engaged:
                latch = self._put(tx, latch, worker, affected, report.reason, actor=f"node {link.node_id}")
            return _Turned(latch, worker, affected, tx.position)

        turned = await self._decisions.record(turn, durable=True)
        if turned is None:
            log.warning("node %s reports a tripwire of a worker that it does not run", link.node_id)
            return
        await self._freeze(turned)

    async def _freeze(self, turned: _Turned) -> None:
        """Freeze a family whose latch stands, for nobody who waits for an answer."""
        try:
            confirmed = await self._carry_out(turned, engaged=True)
        except HayflickError as error:
            log.warning("%s", error.message)  # the latch stands, and the node will ask again or be told
            return
        await self._decisions.record(lambda tx: self._write_states(tx, confirmed, engaged=True))

    def _put(
        self,
        tx: Tx,
        latch: Latch,
        worker: Worker,
        affected: Sequence[Worker],
        reason: str,
        *,
        engaged: bool = True,
        actor: str = "",
    ) -> Latch:
        """Turn the latch, and record it."""
        latch = replace(latch, engaged=engaged, epoch=latch.epoch + 1, reason=reason, change_us=self._clock())
        tx.put_latch(latch)
        word = "quarantined" if engaged else "quarantine_released"
        event = events.latch_changed(
            word, latch, contract_id=worker.contract_id, workers=affected, actor=actor
        )
        tx.record(event)
        return latch

    async def pursue_freezes(self) -> None:
        """Order again each freeze that a latch calls for and that is not in force, or not of everybody."""
        living, known = self._roster.known(), self._families

        def read(tx: Tx) -> dict[Latch, tuple[str, ...]]:
            # Nobody is born below an engaged latch, so its family is read once.
            latches = [latch for latch in tx.engaged() if latch.scope.kind is ScopeKind.QUARANTINE]
            return {
                latch: known[latch] if latch in known else _family(tx, latch)
                for latch in latches
                if latch.scope.id in living
            }

        self._families = await self._decisions.record(read)
        for latch, family in self._families.items():
            standing = Standing(Verb.FREEZE, latch.scope.id, latch.epoch)
            states: defaultdict[str, set[State | None]] = defaultdict(set)
            for worker_id in family:
                node_id, state = self._roster.place(worker_id)
                states[node_id].add(state)
            for node_id, found in states.items():
                link = self._standing.link(node_id)
                if link is not None and (found & FREEZABLE or not self._standing.in_force(link, standing)):
                    self._standing.pursue(link, standing, partial(self._settle, engaged=True))

    async def pursue_thaws(self) -> None:
        """Order again each thaw that is not in force, once its release is on record.

        A thaw is called for by whoever is recorded as frozen, and held by no latch;
        and by an order that was given and not confirmed.
        """
        held = {worker_id for family in self._families.values() for worker_id in family}
        adrift = [
            worker_id
            for worker_id in self._roster.quarantined()
            if worker_id not in held and self._standing.link(self._roster.place(worker_id)[0])
        ]
        open_ = [
            (link.node_id, standing.worker_id) for link, standing in self._standing.unconfirmed(Verb.THAW)
        ]
        if not adrift and not open_:
            return
        position = await self._decisions.record(lambda tx: tx.position)
        if not await self._decisions.wait_recorded(position):
            return
        for node_id, latch in await self._decisions.record(lambda tx: _releases(tx, adrift, open_)):
            root_id, link = latch.scope.id, self._standing.link(node_id)
            # Another controller's release is on record when that one says so; see docs/controllers.md.
            seen = root_id in self._released or not self._decisions.shared
            if link is not None and seen and not self._releasing[root_id]:
                standing = Standing(Verb.THAW, root_id, latch.epoch)
                self._standing.pursue(link, standing, partial(self._settle, engaged=False))

    async def _settle(self, link: Link, answer: Answer, *, engaged: bool) -> None:
        here = [worker_id for worker_id in answer[0] if self._roster.place(worker_id)[0] == link.node_id]
        if here:
            await self._decisions.record(lambda tx: self._write_states(tx, here, engaged=engaged))

    async def _release(self, request: Request, worker_id: str, reason: str) -> list[str]:
        self._releasing[worker_id] += 1  # nobody thaws before the release is on record
        try:
            return await self._turn(request, worker_id, reason, engaged=False)
        finally:
            self._releasing -= Counter([worker_id])

    async def _turn(self, request: Request, worker_id: str, reason: str, *, engaged: bool) -> list[str]:
        scope = Scope(ScopeKind.QUARANTINE, worker_id)

        def turn(tx: Tx) -> _Turned:
            worker = require_worker(tx, worker_id)
            latch = tx.latches([scope]).get(scope, Latch(scope))
            known = self._decisions.check_repeated(tx, request)
            if known is not None and known.body is not None:
                kept = controller_pb2.QuarantineWorkerResponse.FromString(known.body)
                return _Turned(latch, worker, (), known.position, tuple(kept.worker_ids))
            if engaged and not worker.live:
                raise _not_running(worker)
            affected = tuple(tx.live_workers(path=worker.path))
            if known is not None:
                return _Turned(latch, worker, affected, known.position)
            if not engaged and not self._decisions.audit_up:
                raise unavailable("the logger does not answer")
            latch = self._put(tx, latch, worker, affected, reason, engaged=engaged)
            self._decisions.remember(tx, request, None)
            return _Turned(latch, worker, affected, tx.position)

        turned = await self._decisions.record(turn, durable=True)
        if turned.confirmed is not None:
            return list(turned.confirmed)
        if not engaged and not await self._decisions.wait_recorded(turned.position):
            again = await self._decisions.record(
                lambda tx: self._take_back(tx, request, turned), durable=True
            )
            await self._freeze(again)  # whoever was born meanwhile
            raise unavailable("the logger did not answer in time")
        if not engaged:
            self._released = {worker_id, *(self._released & self._roster.known())}
        confirmed = await self._carry_out(turned, engaged=engaged)

        def complete(tx: Tx) -> int:
            self._write_states(tx, confirmed, engaged=engaged)
            body = controller_pb2.QuarantineWorkerResponse(worker_ids=confirmed).SerializeToString()
            tx.complete(request.request_id, body, tx.position)
            return tx.position

        await self._decisions.wait_recorded(await self._decisions.record(complete))
        return confirmed

    async def _carry_out(self, turned: _Turned, *, engaged: bool) -> list[str]:
        """Tell every node that runs one of the family; return what they confirmed.

        Raises:
            HayflickError: SERVICE_UNAVAILABLE when there was something to confirm
                and nobody did.
        """
        scope = turned.latch.scope
        # Turned since, by another request, it is that one's order which must stand.
        latch = (
            turned.latch if engaged else await self._decisions.record(lambda tx: tx.latches([scope])[scope])
        )
        standing = Standing(Verb.FREEZE if engaged else Verb.THAW, scope.id, latch.epoch)
        links = [self._standing.link(node_id) for node_id in sorted({one.node_id for one in turned.affected})]
        answers = await asyncio.gather(
            *[
                self._standing.give(link, standing)
                for link in links
                if link is not None and latch.engaged is engaged
            ]
        )
        confirmed = sorted({worker_id for ids, _ in answers for worker_id in ids})
        # A thaw may free nobody: another quarantine still holds them.
        carried_out = not engaged and (latch.engaged or any(not error for _, error in answers))
        if not confirmed and turned.affected and not carried_out:
            errors = "; ".join(error for _, error in answers if error) or (
                "not in time" if answers else "its node is not connected, or it was turned since"
            )
            held = "births stay forbidden" if engaged else "births are allowed again"
            raise HayflickError(
                ErrorReason.ERROR_REASON_SERVICE_UNAVAILABLE,
                f"no node confirmed the {'freeze' if engaged else 'thaw'} ({held}): {errors}"[:1_000],
                metadata={"service": "orchestrator", "worker_id": turned.worker.worker_id},
            )
        return confirmed

    def _write_states(self, tx: Tx, worker_ids: Sequence[str], *, engaged: bool) -> None:
        found = [tx.worker(worker_id) for worker_id in worker_ids]
        workers = [worker for worker in found if worker is not None]
        frozen = _frozen(tx, workers)
        if engaged:  # unless it was released while the nodes answered
            tx.update_states(
                [
                    replace(worker, state=State.QUARANTINED)
                    for worker in workers
                    if worker.state in FREEZABLE and worker.worker_id in frozen
                ]
            )
            return
        tx.update_states(
            [
                replace(worker, state=_thawed(self._roster.freshen(worker)))
                for worker in workers
                if worker.state is State.QUARANTINED and worker.worker_id not in frozen
            ]
        )

    def _take_back(self, tx: Tx, request: Request, turned: _Turned) -> _Turned:
        affected = tuple(tx.live_workers(path=turned.worker.path))
        reason = "its release could not be recorded"
        latch = self._put(tx, turned.latch, turned.worker, affected, reason)
        tx.forget(request.request_id)
        return replace(turned, latch=latch, affected=affected)


def _family(tx: Tx, latch: Latch) -> tuple[str, ...]:
    worker = tx.worker(latch.scope.id)
    found = [] if worker is None else tx.live_workers(path=worker.path)
    return tuple(member.worker_id for member in found)


def _releases(tx: Tx, worker_ids: Iterable[str], open_: Iterable[tuple[str, str]]) -> set[tuple[str, Latch]]:
    """Return, each with a node, the released quarantines whose thaw is not in force there.

    Args:
        tx: Where they are read.
        worker_ids: Who seems to be frozen for nothing.
        open_: Nodes that were ordered a thaw and did not confirm it, and of whom.
    """
    found = [tx.worker(worker_id) for worker_id in worker_ids]
    frozen = [worker for worker in found if worker is not None and worker.state is State.QUARANTINED]
    held = _frozen(tx, frozen)
    loose = [worker for worker in frozen if worker.worker_id not in held]
    wanted = {(worker.node_id, member) for worker in loose for member in lineage.members(worker.path)}
    wanted.update(open_)
    latches = tx.latches({Scope(ScopeKind.QUARANTINE, root_id) for _, root_id in wanted})
    return {
        (node_id, latch)
        for node_id, root_id in wanted
        if (latch := latches.get(Scope(ScopeKind.QUARANTINE, root_id))) is not None and not latch.engaged
    }


def _frozen(tx: Tx, workers: Iterable[Worker]) -> set[str]:
    """Return those of *workers* that some quarantine holds."""
    members = {worker.worker_id: lineage.members(worker.path) for worker in workers}
    scopes = {Scope(ScopeKind.QUARANTINE, member) for path in members.values() for member in path}
    held = {scope.id for scope, latch in tx.latches(scopes).items() if latch.engaged}
    return {worker_id for worker_id, path in members.items() if held.intersection(path)}


def _thawed(worker: Worker) -> State:
    """Return the state in which *worker* was frozen: only who was heard of had begun to run."""
    return State.RUNNING if worker.last_heartbeat_us > worker.create_us else State.STARTING


def _not_running(worker: Worker) -> HayflickError:
    return HayflickError(
        ErrorReason.ERROR_REASON_WORKER_NOT_RUNNING,
        f"worker {worker.worker_id} has ended",
        metadata={
            "worker_id": worker.worker_id,
            "state": worker.state.value,
            "end_reason": worker.exit.reason.value if worker.exit else "",
        },
    )
