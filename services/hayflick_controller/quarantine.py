"""Quarantine: a latch that forbids births, and a freeze that stops time, for a worker and its descendants."""

from __future__ import annotations

import asyncio
import logging
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
from hayflick_rpc.errors import HayflickError

if TYPE_CHECKING:
    from hayflick_controller.clock import Clock
    from hayflick_controller.decisions import Decisions, Request
    from hayflick_controller.links import Link
    from hayflick_controller.pursuit import Pursuit
    from hayflick_controller.roster import Roster
    from hayflick_controller.store import Tx
    from hayflick_controller.tripwires import Report

ORDER_TIMEOUT_SECONDS = 10.0

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

    def __init__(self, decisions: Decisions, pursuit: Pursuit, roster: Roster, clock: Clock) -> None:
        self._decisions = decisions
        self._pursuit = pursuit
        self._roster = roster
        self._clock = clock

    async def engage(
        self, request: Request, worker_id: str, reason: str
    ) -> controller_pb2.QuarantineWorkerResponse:
        """Forbid births below a worker, durably, then freeze it and its descendants.

        Acts also when the logger is away.

        Raises:
            HayflickError: WORKER_UNKNOWN; WORKER_NOT_RUNNING when it has ended;
                SERVICE_UNAVAILABLE when no node confirmed the freeze. The births
                stay forbidden then, and the node is told again when it returns.
        """
        confirmed = await self._decisions.finish(self._turn(request, worker_id, reason, engaged=True))
        return controller_pb2.QuarantineWorkerResponse(worker_ids=confirmed)

    async def release(
        self, request: Request, worker_id: str, reason: str
    ) -> controller_pb2.ReleaseQuarantineResponse:
        """Thaw a worker and its descendants, but for those under another quarantine.

        Raises:
            HayflickError: WORKER_UNKNOWN; AUDIT_UNAVAILABLE; SERVICE_UNAVAILABLE
                when no node confirmed the thaw.
        """
        confirmed = await self._decisions.finish(self._turn(request, worker_id, reason, engaged=False))
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

    async def freeze_again(self, link: Link) -> None:
        """Freeze what is quarantined on a node that has just connected, and record whom it froze."""

        def read(tx: Tx) -> list[str]:
            roots = [latch.scope.id for latch in tx.engaged() if latch.scope.kind is ScopeKind.QUARANTINE]
            frozen = [tx.worker(worker_id) for worker_id in roots]
            return [
                worker.worker_id
                for worker in frozen
                if worker is not None
                and any(found.node_id == link.node_id for found in tx.live_workers(path=worker.path))
            ]

        for worker_id in await self._decisions.record(read):
            confirmed, _ = await self._carry(link, worker_id, engaged=True)
            if confirmed:
                # Else they would be ended for their silence, which is our own doing.
                await self._decisions.record(partial(self._write_states, worker_ids=confirmed, engaged=True))

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
        node_ids = {worker.node_id for worker in turned.affected}
        links = [self._pursuit.links[node_id] for node_id in sorted(node_ids & self._pursuit.links.keys())]
        answers = await asyncio.gather(
            *(self._carry(link, turned.worker.worker_id, engaged=engaged) for link in links)
        )
        confirmed = sorted({worker_id for ids, _ in answers for worker_id in ids})
        # A thaw may free nobody: another quarantine still holds them.
        carried_out = not engaged and any(not error for _, error in answers)
        if not confirmed and turned.affected and not carried_out:
            errors = "; ".join(error for _, error in answers if error) or "its node is not connected"
            held = "births stay forbidden" if engaged else "births are allowed again"
            raise HayflickError(
                ErrorReason.ERROR_REASON_SERVICE_UNAVAILABLE,
                f"no node confirmed the {'freeze' if engaged else 'thaw'} ({held}): {errors}"[:1_000],
                metadata={"service": "orchestrator", "worker_id": turned.worker.worker_id},
            )
        return confirmed

    async def _carry(self, link: Link, worker_id: str, *, engaged: bool) -> tuple[list[str], str]:
        order = controller_pb2.Order()
        if engaged:
            order.freeze.worker_id = worker_id
        else:
            order.thaw.worker_id = worker_id
        try:
            async with asyncio.timeout(ORDER_TIMEOUT_SECONDS):
                result = await link.order(order)
        except (TimeoutError, HayflickError) as error:
            log.warning("node %s did not confirm a freeze or thaw of %s", link.node_id, worker_id)
            return [], str(error) or f"node {link.node_id} did not answer in time"
        return list(result.worker_ids), result.error

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
