"""Deaths that are reported or called for: a node's own word, and silence."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hayflick.v1 import controller_pb2
from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_controller import ends, events, nodes, render
from hayflick_controller.decisions import Decisions, Form, Request
from hayflick_controller.killswitch import require_worker
from hayflick_controller.model import EndReason, Exit, State, Usage, Worker
from hayflick_rpc.errors import HayflickError

if TYPE_CHECKING:
    from hayflick_controller.admission import Denial
    from hayflick_controller.clock import Clock
    from hayflick_controller.pursuit import Pursuit
    from hayflick_controller.roster import Roster
    from hayflick_controller.store import Tx

REAP_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Report:
    """A node's word that a worker's processes are all dead."""

    worker_id: str
    node_id: str
    session: str
    exit: Exit
    usage: Usage | None


class Deaths:
    """See the module."""

    def __init__(self, decisions: Decisions, pursuit: Pursuit, roster: Roster, clock: Clock) -> None:
        self._decisions = decisions
        self._pursuit = pursuit
        self._roster = roster
        self._clock = clock

    async def deregister(self, request: Request, report: Report) -> controller_pb2.DeregisterWorkerResponse:
        """Record a worker's end. The first report counts; a later one gets the record as it is.

        The slot is free at once. AUDIT_UNAVAILABLE means that the record is kept
        and not yet with the logger; the same request again tells when it is.

        Raises:
            HayflickError: WORKER_UNKNOWN, NODE_SESSION_INVALID, AUDIT_UNAVAILABLE.
        """

        def deregister(tx: Tx) -> Worker | Denial:
            nodes.require_session(tx, report.node_id, report.session)
            worker = require_worker(tx, report.worker_id)
            if worker.node_id != report.node_id:
                raise HayflickError(
                    ErrorReason.ERROR_REASON_NODE_SESSION_INVALID,
                    f"worker {worker.worker_id} runs on another node",
                    metadata={"node_id": report.node_id},
                )
            if not worker.live:
                return worker
            exit_ = ends.reported(worker, report.exit)
            if report.usage is None:
                (ended,) = ends.end(tx, [(worker, exit_)], self._clock(), self._roster.freshen)
            else:
                final = replace(self._roster.freshen(worker), usage=report.usage)
                (ended,) = ends.end(tx, [(final, exit_)], self._clock(), lambda worker: worker)
            return ended

        form = Form[Worker, controller_pb2.DeregisterWorkerResponse](
            controller_pb2.DeregisterWorkerResponse,
            lambda worker: controller_pb2.DeregisterWorkerResponse(worker=render.worker(worker)),
        )
        try:
            return await self._decisions.take(request, deregister, form)
        finally:  # also when it could not be recorded yet
            self._pursuit.kick()  # its descendants elsewhere

    async def reap(
        self, request: Request, contract_id: str, timeout_us: int
    ) -> controller_pb2.ReapStaleWorkersResponse:
        """End workers that were not heard of for longer than *timeout_us*; return those seen dead.

        The others stay under pursuit until their node confirms or is lost.

        Raises:
            HayflickError: REQUEST_ID_REUSED; AUDIT_UNAVAILABLE.
        """

        def reap(tx: Tx) -> tuple[str, ...] | Denial:
            now_us = self._clock()
            stale = [
                worker
                for worker in map(self._roster.freshen, tx.live_workers(contract_id=contract_id))
                # The frozen cannot beat; their silence is our own doing.
                if worker.state is not State.QUARANTINED and now_us - worker.last_heartbeat_us > timeout_us
            ]
            for worker in stale:
                tx.record(events.reaped(worker, now_us - worker.last_heartbeat_us, now_us))
            ends.stop(tx, stale, EndReason.HEARTBEAT_TIMEOUT, "not heard of")
            return tuple(worker.worker_id for worker in stale)

        form = Form[tuple[str, ...], controller_pb2.ReapStaleWorkersResponse](
            controller_pb2.ReapStaleWorkersResponse,
            lambda ids: controller_pb2.ReapStaleWorkersResponse(worker_ids=ids),
        )
        try:
            response = await self._decisions.take(request, reap, form)
        finally:  # also when it could not be recorded yet
            self._pursuit.kick()
        departures = self._roster.watch_departures(response.worker_ids)
        try:
            async with asyncio.timeout(REAP_TIMEOUT_SECONDS):
                await departures.wait()
        except TimeoutError:
            pass
        finally:
            self._roster.forget(departures)
        dead = [worker_id for worker_id in response.worker_ids if worker_id not in departures.remaining]
        return controller_pb2.ReapStaleWorkersResponse(worker_ids=dead)

    async def stop_stillborn(self, timeout_us: int) -> None:
        """End workers that were registered and never began to run: their node forgot them."""
        starting = self._roster.starting()
        if not starting:
            return

        def stop(tx: Tx) -> bool:
            before_us = self._clock() - timeout_us
            found = [tx.worker(worker_id) for worker_id in starting]
            stillborn = [
                worker
                for worker in found
                if worker is not None and worker.state is State.STARTING and worker.create_us < before_us
            ]
            return bool(ends.stop(tx, stillborn, EndReason.LAUNCH_FAILED, "never began to run"))

        if await self._decisions.record(stop):
            self._pursuit.kick()

    async def end_expired(self, margin_us: int) -> None:
        """End workers whose life by contract has been over for *margin_us*: their node should have."""
        overdue = self._roster.expired(self._clock() - margin_us)
        if not overdue:
            return

        def stop(tx: Tx) -> bool:
            found = [tx.worker(worker_id) for worker_id in overdue]
            living = [worker for worker in found if worker is not None and worker.live]
            return bool(ends.stop(tx, living, EndReason.EXPIRED, "its life by contract is over"))

        if await self._decisions.record(stop):
            self._pursuit.kick()
