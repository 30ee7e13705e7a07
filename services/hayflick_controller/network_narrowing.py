"""Taking network licences from the living: on record first, then in force, and never given back.

What descends from a worker may have no more than it, so its living descendants
are narrowed to what both have. A manifest that was issued for a further one and
promises more is refused when it is to be registered, as any child with more
than its parent is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hayflick.v1 import controller_pb2
from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_controller import events, licences, render
from hayflick_controller.killswitch import require_worker
from hayflick_controller.model import NetworkPolicy, Worker
from hayflick_controller.standing_orders import Answer, Standing, Verb
from hayflick_rpc.errors import HayflickError

if TYPE_CHECKING:
    from hayflick_controller.clock import Clock
    from hayflick_controller.decisions import Decisions, Request
    from hayflick_controller.links import Link
    from hayflick_controller.roster import Roster
    from hayflick_controller.standing_orders import StandingOrders
    from hayflick_controller.store import Tx

Response = controller_pb2.NarrowNetworkResponse

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Narrowed:
    """What was decided.

    Attributes:
        worker: The one asked about, with its new policy.
        affected: It and its living descendants, as far as anything was taken from them.
        position: Of its event.
        answer: What was answered before, when the request is a repeat.
    """

    worker: Worker
    affected: tuple[Worker, ...]
    position: int
    answer: Response | None = None


class Narrowing:
    """See the module."""

    def __init__(self, decisions: Decisions, standing: StandingOrders, roster: Roster, clock: Clock) -> None:
        self._decisions = decisions
        self._standing = standing
        self._roster = roster
        self._clock = clock

    async def narrow(self, request: Request, worker_id: str, network: NetworkPolicy, reason: str) -> Response:
        """Leave a worker no more than *network*, and its descendants no more than that.

        Acts also when the logger is away.

        Raises:
            HayflickError: WORKER_UNKNOWN; WORKER_NOT_RUNNING when it has ended;
                NOT_NARROWER, naming the field; LIMIT_NOT_ENFORCEABLE when its
                own loopback were to be taken; SERVICE_UNAVAILABLE when a node
                did not confirm. The decision stands then, and the node is told
                again until it does.
        """
        return await self._decisions.finish(self._narrow(request, worker_id, network, reason))

    async def pursue(self) -> None:
        """Tell the nodes again what was taken from their workers, as long as it is not in force."""
        for worker_id, network in self._roster.narrowed().items():
            link = self._standing.link(self._roster.place(worker_id)[0])
            standing = Standing(Verb.NARROW, worker_id, network)
            if link is not None and not self._standing.in_force(link, standing):
                self._standing.pursue(link, standing, _nothing_to_record)

    async def _narrow(
        self, request: Request, worker_id: str, network: NetworkPolicy, reason: str
    ) -> Response:
        wanted = licences.settled(network)

        def decide(tx: Tx) -> _Narrowed:
            worker = require_worker(tx, worker_id)
            known = self._decisions.check_repeated(tx, request)
            if known is not None:
                answer = None if known.body is None else Response.FromString(known.body)
                family = tx.live_workers(path=worker.path)
                return _Narrowed(worker, _taken_from(family), known.position, answer)
            _check(worker, wanted)
            affected = _narrowed(tx.live_workers(path=worker.path), worker, wanted)
            tx.narrow_workers(affected)
            tx.record(
                events.network_narrowed(
                    worker, wanted, reason, self._clock(), descendants=max(0, len(affected) - 1)
                )
            )
            self._decisions.remember(tx, request, None)
            return _Narrowed(replace(worker, network=wanted), affected, tx.position)

        narrowed = await self._decisions.record(decide, durable=True)
        if narrowed.answer is not None:
            return narrowed.answer
        await self._carry_out(narrowed)

        def complete(tx: Tx) -> Response:
            worker = require_worker(tx, worker_id)
            answer = Response(worker=render.worker(worker))
            tx.complete(request.request_id, answer.SerializeToString(), tx.position)
            return answer

        answer = await self._decisions.record(complete)
        await self._decisions.wait_recorded(narrowed.position)
        return answer

    async def _carry_out(self, narrowed: _Narrowed) -> None:
        """Tell each node of each of its workers, and wait until all is in force."""
        answers = await asyncio.gather(
            *[self._carry(self._standing.link(worker.node_id), worker) for worker in narrowed.affected]
        )
        if failed := [error for _, error in answers if error]:
            raise HayflickError(
                ErrorReason.ERROR_REASON_SERVICE_UNAVAILABLE,
                f"not confirmed by a node, which is told again until it does: {failed[0]}"[:1_000],
                metadata={"service": "orchestrator", "worker_id": narrowed.worker.worker_id},
            )

    def _carry(self, link: Link | None, worker: Worker) -> Awaitable[Answer]:
        """Tell the node of *worker*; await why it is not narrowed there, empty when it is."""
        if link is None:
            return _away(worker.node_id)
        return self._standing.give(link, Standing(Verb.NARROW, worker.worker_id, worker.resources.network))


async def _away(node_id: str) -> Answer:
    return (), f"node {node_id} is not connected"


async def _nothing_to_record(link: Link, answer: Answer) -> None:
    if answer[1]:
        log.warning("node %s does not narrow: %s", link.node_id, answer[1])


def _check(worker: Worker, wanted: NetworkPolicy) -> None:
    held = worker.resources.network
    if not worker.live:
        raise HayflickError(
            ErrorReason.ERROR_REASON_WORKER_NOT_RUNNING,
            f"worker {worker.worker_id} has ended",
            metadata={
                "worker_id": worker.worker_id,
                "state": worker.state.value,
                "end_reason": worker.exit.reason.value if worker.exit else "",
            },
        )
    if field := licences.wider_in(wanted, held):
        raise HayflickError(
            ErrorReason.ERROR_REASON_NOT_NARROWER,
            f"network.{field}: is wider than what worker {worker.worker_id} has; nothing can be added",
            metadata={"field": f"network.{field}"},
        )
    if held.allow_loopback and not wanted.allow_loopback:
        raise HayflickError(
            ErrorReason.ERROR_REASON_LIMIT_NOT_ENFORCEABLE,
            "network.allow_loopback: a worker's own loopback cannot be taken while it lives",
            metadata={
                "field": "network.allow_loopback",
                "layer": "network",
                "remedy": "end the worker, or leave allow_loopback as it is",
            },
        )


def _narrowed(family: Iterable[Worker], head: Worker, wanted: NetworkPolicy) -> tuple[Worker, ...]:
    """Return those of *family* from whom *wanted* takes something, with what is left to them.

    To its *head* the very policy that was asked for, to the others what of
    theirs is in it.
    """
    found = []
    for worker in family:
        held = worker.resources.network
        # Its loopback stays: nobody reaches anything through it but the worker itself.
        shared = licences.settled(licences.common(held, wanted))
        left = wanted if worker.worker_id == head.worker_id else shared
        left = replace(left, allow_loopback=held.allow_loopback)
        if left != held:
            found.append(replace(worker, network=left))
    return tuple(found)


def _taken_from(family: Iterable[Worker]) -> tuple[Worker, ...]:
    return tuple(worker for worker in family if worker.network is not None)
