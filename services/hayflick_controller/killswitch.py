"""The kill switch: a durable latch first, then orders, then confirmation.

It acts also when the logger is away, or the database. Containment comes before
the record; the events wait in the outbox, and the latch for its database.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hayflick.v1 import controller_pb2
from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_controller import ends, events, parse_values, receipts, render, render_terms
from hayflick_controller.clock import Clock, seconds
from hayflick_controller.decisions import Decisions, Form, Request
from hayflick_controller.model import EndReason, Latch, Scope, ScopeKind, Worker
from hayflick_controller.pursuit import Kill, Pursuit
from hayflick_rpc.errors import HayflickError

if TYPE_CHECKING:
    from hayflick_controller.admission import Denial
    from hayflick_controller.links import Link, Result
    from hayflick_controller.roster import Roster
    from hayflick_controller.store import Tx

LATCH_TIMEOUT_SECONDS = 1.0
"""How long the nodes' orders wait for the latch to be on record."""
LATE_LATCH_SECONDS = 5.0
"""How long an answer waits for a latch that came too late for that, the orders being given."""

Response = controller_pb2.EngageKillSwitchResponse


@dataclass(frozen=True, slots=True)
class _Engaged:
    """What a request set off, now or when it was first made.

    Attributes:
        latch: As the request set it.
        targets: Who held a slot in its scope then, as recorded now.
        stands: Whether the switch is still engaged: released since, it ends nobody more.
        answer: What was answered before, when it was.
    """

    latch: Latch
    targets: tuple[Worker, ...]
    stands: bool = True
    answer: Response | None = None


@dataclass(frozen=True, slots=True)
class _Patience:
    """How long a kill may take: for confirmations, and before that for tasks to end by themselves."""

    timeout_us: int
    grace_us: int


class KillSwitch:
    """See the module."""

    def __init__(
        self, decisions: Decisions, pursuit: Pursuit, roster: Roster, clock: Clock, issuer: receipts.Issuer
    ) -> None:
        self._issuer = issuer
        self._decisions = decisions
        self._pursuit = pursuit
        self._roster = roster
        self._clock = clock

    async def engage(
        self, request: Request, scope: Scope, reason: str, timeout_us: int, grace_us: int = 0
    ) -> Response:
        """Forbid births in *scope*, end its workers, and say which are dead.

        Args:
            request: Repeated, it gets its first answer.
            scope: Whom.
            reason: For the record.
            timeout_us: How long to wait for confirmations, once the grace is over.
            grace_us: How long the workers' tasks may go on after SIGTERM.

        Raises:
            HayflickError: CONTRACT_UNKNOWN, WORKER_UNKNOWN; REQUEST_ID_REUSED;
                SERVICE_UNAVAILABLE while the database is away: the nodes were told
                to kill all the same, and the latch is set when it returns.
        """
        patience = _Patience(timeout_us, grace_us)
        return await self._decisions.finish(self._engage(request, scope, reason, patience))

    async def release(
        self, request: Request, scope: Scope, reason: str
    ) -> controller_pb2.ReleaseKillSwitchResponse:
        """Allow births in *scope* again, in a new epoch.

        Raises:
            HayflickError: CONTRACT_UNKNOWN, WORKER_UNKNOWN; AUDIT_UNAVAILABLE.
        """

        def release(tx: Tx) -> Latch | Denial:
            contract_id, _ = subject(tx, scope)
            known = tx.latches([scope]).get(scope, Latch(scope))
            latch = self._turn(known, reason, engaged=False)
            tx.put_latch(latch)
            tx.record(events.latch_changed("kill_switch_released", latch, contract_id=contract_id))
            return latch

        def undo(tx: Tx, latch: Latch) -> None:
            # Also over whoever was born since: their births may be on record by now.
            self._put_down(tx, latch, "its release could not be recorded")

        form = Form[Latch, controller_pb2.ReleaseKillSwitchResponse](
            controller_pb2.ReleaseKillSwitchResponse,
            lambda latch: controller_pb2.ReleaseKillSwitchResponse(kill_switch=render.latch(latch)),
        )
        return await self._decisions.take(request, release, form, undo=undo, durable=True)

    async def _engage(self, request: Request, scope: Scope, reason: str, patience: _Patience) -> Response:
        def latch_down(tx: Tx) -> _Engaged:
            known = self._decisions.check_repeated(tx, request)
            latch = tx.latches([scope]).get(scope, Latch(scope))
            if known is not None:
                return _remembered(tx, scope, Response.FromString(known.body or b""))
            engaged = self._put_down(tx, latch, reason)
            self._decisions.remember(tx, request, _begun(engaged.latch, engaged.targets).SerializeToString())
            return engaged

        latching = asyncio.ensure_future(self._decisions.record(latch_down, durable=True))
        await asyncio.wait({latching}, timeout=LATCH_TIMEOUT_SECONDS)
        if not latching.done() or _unavailable(latching):
            await self._without_database(scope, reason, patience, latching, latch_down)
        engaged = latching.result()
        if engaged.answer is not None:
            return engaged.answer
        start_us = engaged.latch.change_us
        response = await self._carry_out(engaged, patience, start_us)
        response.receipt.CopyFrom(self._issuer.issue(engaged.latch, engaged.targets, response, self._clock()))

        def complete(tx: Tx) -> int:
            contract_id, _ = subject(tx, scope)
            elapsed_us = max(0, self._clock() - start_us)
            tx.record(
                events.killed(
                    engaged.latch,
                    contract_id,
                    dead=len(response.worker_ids),
                    unconfirmed_ids=response.unconfirmed_worker_ids,
                    now_us=self._clock(),
                    elapsed_us=elapsed_us,
                    receipt_sha256=receipts.digest(response.receipt),
                )
            )
            tx.complete(request.request_id, response.SerializeToString(), tx.position)
            return tx.position

        await self._decisions.wait_recorded(await self._decisions.record(complete))
        return response

    async def _without_database(
        self,
        scope: Scope,
        reason: str,
        patience: _Patience,
        latching: asyncio.Future[_Engaged],
        latch_down: Callable[[Tx], _Engaged],
    ) -> None:
        """End whom the nodes know in *scope*; return when the database was only slow, and has the latch.

        Nothing can be born meanwhile: a registration needs the database too. The
        latch is set as soon as it answers.

        Raises:
            HayflickError: SERVICE_UNAVAILABLE: what was done without a latch.
        """
        kill = Kill(scope, EndReason.KILL_SWITCH, reason, (), patience.grace_us)
        orders = [self._pursuit.order(link, kill) for link in self._pursuit.links.values() if not link.closed]

        async def latch() -> None:
            if not latching.done():
                await asyncio.shield(latching)  # it is queued, and holds when the database goes on
            elif _unavailable(latching):
                await self._decisions.record(latch_down, durable=True)

        self._pursuit.insist(latch)
        late = asyncio.get_running_loop().time() + LATE_LATCH_SECONDS
        if orders:
            await asyncio.wait(orders, timeout=seconds(patience.timeout_us + patience.grace_us))
        left = late - asyncio.get_running_loop().time()
        if not latching.done() and left > 0:
            await asyncio.wait({latching}, timeout=left)
        if latching.done() and not _unavailable(latching):
            return
        done = [order.result() for order in orders if order.done() and order.exception() is None]
        dead = sum(len(result.worker_ids) for result in done)
        raise HayflickError(
            ErrorReason.ERROR_REASON_SERVICE_UNAVAILABLE,
            f"the database does not answer: {dead} workers were killed and seen dead on {len(done)} of"
            f" {len(orders)} nodes, but no latch is on record; ask again with this request_id until it is",
            metadata={"service": "database", "dead_count": str(dead), "node_count": str(len(orders))},
            retry_after_seconds=1.0,
        )

    async def _carry_out(self, engaged: _Engaged, patience: _Patience, start_us: int) -> Response:
        latch = engaged.latch
        departures = self._roster.watch_departures(worker.worker_id for worker in engaged.targets)
        links = [link for link in self._pursuit.links.values() if engaged.stands and not link.closed]
        orders = {
            link.node_id: self._order(link, latch, engaged.targets, patience.grace_us) for link in links
        }
        try:
            async with asyncio.timeout(seconds(patience.timeout_us + patience.grace_us)):
                await asyncio.gather(departures.wait(), *map(asyncio.shield, orders.values()))
        except TimeoutError:
            pass  # those who remain stay STOPPING, and are pursued
        finally:
            self._roster.forget(departures)
        # A repeated request finds some that ended before it came.
        lost = {worker.worker_id for worker in engaged.targets if _was_lost(worker)}
        unconfirmed = departures.remaining | departures.unseen | lost
        return Response(
            kill_switch=render.latch(latch),
            active_before=len(engaged.targets),
            worker_ids=[
                worker.worker_id for worker in engaged.targets if worker.worker_id not in unconfirmed
            ],
            unconfirmed_worker_ids=sorted(unconfirmed),
            nodes=[_node_kill(node_id, order) for node_id, order in sorted(orders.items())],
            elapsed=render_terms.length(max(0, self._clock() - start_us)),
        )

    def _order(
        self, link: Link, latch: Latch, targets: Sequence[Worker], grace_us: int
    ) -> asyncio.Task[Result | None]:
        # Nodes without a known worker are told too: one may be under way to them.
        ids = tuple(worker.worker_id for worker in targets if worker.node_id == link.node_id)
        kill = Kill(latch.scope, EndReason.KILL_SWITCH, latch.reason, ids, grace_us)
        return self._pursuit.kill(link, kill)

    def _put_down(self, tx: Tx, latch: Latch, reason: str) -> _Engaged:
        """Engage *latch* and stop whoever lives in its scope; pursuit ends them."""
        contract_id, path = subject(tx, latch.scope)
        targets = tuple(_within(tx, latch.scope, path))
        latch = self._turn(latch, reason, engaged=True)
        tx.put_latch(latch)
        tx.return_reserved(latch.scope, path)
        ends.stop(tx, targets, EndReason.KILL_SWITCH, reason)
        event = events.latch_changed("kill_switch_engaged", latch, contract_id=contract_id, workers=targets)
        tx.record(event)
        return _Engaged(latch, targets)

    def _turn(self, latch: Latch, reason: str, *, engaged: bool) -> Latch:
        return replace(latch, engaged=engaged, epoch=latch.epoch + 1, reason=reason, change_us=self._clock())


def subject(tx: Tx, scope: Scope) -> tuple[str, str]:
    """Return the contract that *scope* lies in, and the path of its worker; "" where there is none.

    Raises:
        HayflickError: CONTRACT_UNKNOWN, WORKER_UNKNOWN.
    """
    match scope.kind:
        case ScopeKind.EVERYTHING:
            return "", ""
        case ScopeKind.CONTRACT:
            if tx.contract(scope.id, lock=True) is None:
                raise HayflickError(
                    ErrorReason.ERROR_REASON_CONTRACT_UNKNOWN,
                    f"scope.contract_id: there is no contract {scope.id}",
                    metadata={"contract_id": scope.id, "field": "scope.contract_id"},
                )
            return scope.id, ""
        case _:
            worker = require_worker(tx, scope.id, "scope.worker_id")
            tx.contract(worker.contract_id, lock=True)
            return worker.contract_id, worker.path


def require_worker(tx: Tx, worker_id: str, field: str = "worker_id") -> Worker:
    """Return a worker, live or ended.

    Raises:
        HayflickError: WORKER_UNKNOWN.
    """
    worker = tx.worker(worker_id)
    if worker is None:
        raise HayflickError(
            ErrorReason.ERROR_REASON_WORKER_UNKNOWN,
            f"{field}: there is no worker {worker_id}",
            metadata={"worker_id": worker_id, "field": field},
        )
    return worker


def _within(tx: Tx, scope: Scope, path: str) -> list[Worker]:
    match scope.kind:
        case ScopeKind.EVERYTHING:
            return tx.live_workers()
        case ScopeKind.CONTRACT:
            return tx.live_workers(contract_id=scope.id)
        case _:
            return tx.live_workers(path=path)


def _begun(latch: Latch, targets: Sequence[Worker]) -> Response:
    """Return what is remembered of a kill until it is answered: an answer without a receipt."""
    return Response(
        kill_switch=render.latch(latch),
        active_before=len(targets),
        unconfirmed_worker_ids=[worker.worker_id for worker in targets],
    )


def _remembered(tx: Tx, scope: Scope, kept: Response) -> _Engaged:
    """Return what a request that is repeated had set off; see :func:`_begun`."""
    latch = Latch(
        scope,
        engaged=True,
        epoch=kept.kill_switch.epoch,
        reason=kept.kill_switch.reason,
        change_us=parse_values.instant_us("change_time", kept.kill_switch.change_time),
    )
    if kept.HasField("receipt"):
        return _Engaged(latch, (), answer=kept)
    found = [tx.worker(worker_id) for worker_id in kept.unconfirmed_worker_ids]
    targets = tuple(worker for worker in found if worker is not None)
    # Released since, it ends nobody more; whom it had stopped is pursued anyway.
    return _Engaged(latch, targets, stands=tx.latches([scope]).get(scope, Latch(scope)).engaged)


def _was_lost(worker: Worker) -> bool:
    """Return whether *worker* is over by its node's lease, and nobody saw it die."""
    return worker.exit is not None and worker.exit.reason is EndReason.NODE_LOST


def _unavailable(latching: asyncio.Future[_Engaged]) -> bool:
    error = latching.exception()
    return isinstance(error, HayflickError) and error.reason == ErrorReason.ERROR_REASON_SERVICE_UNAVAILABLE


def _node_kill(node_id: str, order: asyncio.Task[Result | None]) -> controller_pb2.NodeKill:
    result = order.result() if order.done() and not order.cancelled() else None
    if result is None:
        return controller_pb2.NodeKill(node_id=node_id, error="did not confirm in time")
    return controller_pb2.NodeKill(
        node_id=node_id,
        confirmed_count=len(result.worker_ids),
        elapsed=result.elapsed,
        error=result.error,
        last_death=result.last_death,
        unpopulated=result.unpopulated,
    )
