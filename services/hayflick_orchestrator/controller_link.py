"""The node's line to its controller: beats and results up, acknowledgements and orders down.

The acknowledgements renew the lease. When none came for a whole lease, the node
ends every worker by itself: a controller that cannot be heard cannot stop them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from hayflick.v1 import controller_pb2, controller_pb2_grpc
from hayflick.v1.controller_pb2 import ConnectNodeRequest, ConnectNodeResponse, Order, OrderResult
from hayflick.v1.errors_pb2 import ErrorReason
from hayflick.v1.resources_pb2 import EndReason
from hayflick_orchestrator.lease import Lease
from hayflick_orchestrator.lifecycle import Ask
from hayflick_orchestrator.network_narrowing import narrow
from hayflick_orchestrator.predicates import PredicateError, Predicates
from hayflick_orchestrator.requests import PYTHON_VERSION
from hayflick_rpc import wire
from hayflick_rpc.clock import boot_seconds
from hayflick_rpc.errors import HayflickError
from hayflick_rpc.status import from_rpc_error

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from hayflick_orchestrator.controller_client import Session
    from hayflick_orchestrator.reports import Report
    from hayflick_orchestrator.supervisor import Everyone, Supervisor
    from hayflick_orchestrator.tripwires import Tripwires

WELCOME_SECONDS = 5.0
MIN_BACKOFF_SECONDS = 0.05
MAX_BACKOFF_SECONDS = 1.0
# How long a name may stay taken when this node first asks for it. A
# predecessor that just died lets go at once; one that lives never will.
NAME_TAKEN_SECONDS = 3.0
MIN_BEAT_SECONDS = 0.01
# A worker that just started is told of at once, together with its neighbours.
NUDGE_SECONDS = 0.02
MAX_OUTGOING = 1_024
# Longer than a controller takes to make a quarantine of a report.
REPORT_SECONDS = 5.0
LEASE_CHECK_SECONDS = 0.05
LEASE_LOOK_SECONDS = 0.5

_Call = grpc.aio.StreamStreamCall[ConnectNodeRequest, ConnectNodeResponse]

T = TypeVar("T")

log = logging.getLogger(__name__)


class ControllerLink:
    """Keeps the stream open, and the lease."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        *,
        node_id: str,
        address: str,
        public_key: bytes,
        session: Session,
        population: Everyone,
        supervisor: Supervisor,
        tripwires: Tripwires,
        predicates: Predicates,
        on_name_taken: Callable[[], None],
        on_renewed: Callable[[float], None],
    ) -> None:
        self._stub: controller_pb2_grpc.ControllerServiceAsyncStub = (
            controller_pb2_grpc.ControllerServiceStub(channel)
        )
        self._node_id = node_id
        self._address = address
        self._public_key = public_key
        self._session = session
        self._population = population
        self._supervisor = supervisor
        self._tripwires = tripwires
        tripwires.on_report = self._report
        self._predicates = predicates
        self._on_name_taken = on_name_taken
        self._on_renewed = on_renewed
        self._lease = Lease(0.0, boot_seconds())
        self._call: _Call | None = None
        self._outgoing: asyncio.Queue[ConnectNodeRequest] | None = None
        self._nudged = asyncio.Event()
        self._orders: set[str] = set()
        self._welcomed = self._lost = False

    def nudge(self) -> None:
        """Beat soon: there is news."""
        self._nudged.set()

    async def run(self) -> None:
        """Connect, and connect again, for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._guard_lease())
            group.create_task(self._stay_connected())

    async def _stay_connected(self) -> None:
        backoff_seconds, begun = MIN_BACKOFF_SECONDS, time.monotonic()
        while True:
            refusal = await self._connect()
            self._session.lost()
            if refusal is None:
                backoff_seconds = MIN_BACKOFF_SECONDS
            elif (
                refusal.reason == ErrorReason.ERROR_REASON_NODE_ALREADY_CONNECTED
                and not self._welcomed
                and time.monotonic() - begun > NAME_TAKEN_SECONDS
            ):
                log.error("another orchestrator holds the node_id %s", self._node_id)
                self._on_name_taken()
                return
            # Jitter, so that nodes that lost the same controller do not return in step.
            await asyncio.sleep(backoff_seconds * random.uniform(0.5, 1.0))  # noqa: S311 -- no secret
            backoff_seconds = min(backoff_seconds * 2, MAX_BACKOFF_SECONDS)

    async def _connect(self) -> HayflickError | None:
        """Serve one stream to its end; return why there was none, or ``None`` when there was."""
        call: _Call = self._stub.ConnectNode()
        self._call = call
        admitted, refusal = False, None
        try:
            hello_at = boot_seconds()
            welcome = await self._greet(call)
            admitted = self._welcomed = True
            self._lease.welcomed(hello_at, wire.seconds(welcome.lease))
            self._on_renewed(self._lease.remaining_seconds(boot_seconds()))
            self._session.opened(welcome.session)
            self._supervisor.attest_again()
            self._lost = False
            log.info("connected to the controller")
            if welcome.stop_worker_ids:
                self._supervisor.spawn(self._obey(list(welcome.stop_worker_ids)), "stop at welcome")
            self._outgoing = asyncio.Queue(MAX_OUTGOING)
            await _first_failure(
                self._read(call),
                self._write(call, self._outgoing),
                self._beat(self._outgoing, wire.seconds(welcome.beat_interval)),
                self._repeat_reports(self._outgoing),
            )
        except (grpc.RpcError, TimeoutError, _StreamEnded, asyncio.InvalidStateError) as error:
            refusal = await _refusal(call, error)
            # Said once an outage, not once an attempt.
            log.log(
                logging.WARNING if admitted or not self._lost else logging.DEBUG,
                "no line to the controller: %s",
                refusal.message,
            )
            self._lost = True
        finally:
            self._outgoing = None
            call.cancel()
        return None if admitted else refusal

    async def _greet(self, call: _Call) -> controller_pb2.NodeWelcome:
        hello = controller_pb2.NodeHello(
            node_id=self._node_id,
            address=self._address,
            worker_ids=[worker.worker_id for worker in self._population],
            # Apart: the controller may have committed one whose answer was lost with
            # the last stream, and need not know of the others yet.
            birth_worker_ids=[birth.worker_id for birth in self._population.births],
            python_version=PYTHON_VERSION,
            attestation_public_key=self._public_key,
        )
        async with asyncio.timeout(WELCOME_SECONDS):
            await _live(call.write(ConnectNodeRequest(hello=hello)))
            answer = await _live(call.read())
        if not isinstance(answer, ConnectNodeResponse) or answer.WhichOneof("message") != "welcome":
            raise _StreamEnded("the controller did not welcome this node")
        return answer.welcome

    async def _obey(self, worker_ids: list[str]) -> None:
        await self._supervisor.kill_scope(
            controller_pb2.Scope(),
            Ask(EndReason.END_REASON_KILLED, "the controller counts it among the ended"),
            also=worker_ids,
        )

    async def _beat(self, outgoing: asyncio.Queue[ConnectNodeRequest], interval_seconds: float) -> None:
        sequence, interval_seconds = 0, max(interval_seconds, MIN_BEAT_SECONDS)
        while True:
            await self._supervisor.meter()
            sequence += 1
            beat = controller_pb2.NodeBeat(sequence=sequence, workers=self._supervisor.beats())
            self._lease.sent(sequence, boot_seconds())
            await outgoing.put(ConnectNodeRequest(beat=beat))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_seconds):
                    await self._nudged.wait()
                await asyncio.sleep(NUDGE_SECONDS)
            self._nudged.clear()

    def _report(self, report: controller_pb2.TripwireReport) -> None:
        """Tell of a tripwire at once; without a stream, or when it is full, it is told with the others."""
        if self._outgoing is not None:
            with contextlib.suppress(asyncio.QueueFull):
                self._outgoing.put_nowait(ConnectNodeRequest(tripped=report))

    async def _repeat_reports(self, outgoing: asyncio.Queue[ConnectNodeRequest]) -> None:
        while True:
            for report in self._tripwires.reports():
                await outgoing.put(ConnectNodeRequest(tripped=report))
            await asyncio.sleep(REPORT_SECONDS)

    async def _write(self, call: _Call, outgoing: asyncio.Queue[ConnectNodeRequest]) -> None:
        # The only writer: gRPC takes one message of a stream at a time.
        while True:
            await _live(call.write(await outgoing.get()))

    async def _read(self, call: _Call) -> None:
        while isinstance(answer := await _live(call.read()), ConnectNodeResponse):
            match answer.WhichOneof("message"):
                case "ack":
                    self._lease.acknowledged(answer.ack.sequence)
                    self._on_renewed(self._lease.remaining_seconds(boot_seconds()))
                case "order":
                    self._take(answer.order)
                case _:
                    raise _StreamEnded("the controller sent what no node expects")
        raise _StreamEnded("the controller ended the stream")

    # Orders

    def _take(self, order: Order) -> None:
        if order.order_id in self._orders:
            return  # sent again after a reconnect, and in progress
        self._orders.add(order.order_id)
        self._supervisor.spawn(self._carry_out(order), f"order {order.order_id}")

    async def _carry_out(self, order: Order) -> None:
        started = time.monotonic()
        result = OrderResult(order_id=order.order_id)
        try:
            await self._execute(order, result)
        except HayflickError as refusal:
            result.error = f"{refusal.reason_name}: {refusal.message}"
        except PredicateError as error:
            result.error = str(error)
        except Exception:
            log.exception("order %s failed", order.order_id)
            result.error = "INTERNAL: a fault of the node's own; its log has more"
        finally:
            self._orders.discard(order.order_id)
        if not result.HasField("elapsed"):
            result.elapsed.CopyFrom(wire.duration(time.monotonic() - started))
        # On whichever stream is open now; without one, the controller asks again.
        if self._outgoing is not None:
            await self._outgoing.put(ConnectNodeRequest(result=result))
        else:
            self._supervisor.tell([end.worker_id for end in result.ends])

    async def _execute(self, order: Order, result: OrderResult) -> None:
        match order.WhichOneof("order"):
            case "kill":
                kill = order.kill
                ask = Ask(kill.reason or EndReason.END_REASON_KILLED, kill.detail)
                report = await self._supervisor.kill_scope(
                    kill.scope,
                    ask,
                    also=kill.worker_ids,
                    ordered=True,
                    grace_seconds=wire.seconds(kill.grace),
                )
                _fill(result, report)
                result.last_death.CopyFrom(wire.duration(report.elapsed_seconds))
                result.unpopulated = report.unpopulated
            case "freeze":
                self._tripwires.ordered(order.freeze.worker_id)
                _fill(result, await self._supervisor.freeze(order.freeze.worker_id))
            case "thaw":
                self._tripwires.ordered(order.thaw.worker_id)
                _fill(result, self._supervisor.thaw(order.thaw.worker_id))
            case "narrow_network":
                narrowed = order.narrow_network
                await narrow(self._population, narrowed.worker_id, narrowed.network)
                result.worker_ids.append(narrowed.worker_id)
            case "evaluate":
                value = await self._predicates.evaluate(order.evaluate)
                if value is not None:  # the controller knows what its absence means
                    result.value = value
            case _:
                result.error = "UNIMPLEMENTED: this node does not know the order"

    # The lease

    async def _guard_lease(self) -> None:
        while True:
            left = self._lease.remaining_seconds(boot_seconds())
            if left > 0:
                # Not for all of it: this clock stands still while the machine is suspended.
                await asyncio.sleep(min(left, LEASE_LOOK_SECONDS))
                continue
            if self._population.births or any(not worker.life.killing for worker in self._population):
                self._session.lost()
                if self._call is not None:
                    self._call.cancel()  # it only seems open
                await self._supervisor.lapse()
            await asyncio.sleep(LEASE_CHECK_SECONDS)


async def _live(operation: Awaitable[T]) -> T:
    """Await an operation of a call that somebody else may cancel.

    gRPC reports that as a cancellation of whoever waits, which would end the
    task without a word.

    Raises:
        _StreamEnded: the call was cancelled, and not this task.
    """
    try:
        return await operation
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise _StreamEnded("the stream was given up") from None


class _StreamEnded(Exception):
    """The controller, not the transport, ended the stream."""


async def _first_failure(*duties: Coroutine[Any, Any, None]) -> None:
    """Run *duties*, none of which ends by itself, until one fails; end the others and raise.

    Not a TaskGroup: until Python 3.13 one that fails leaves its parent counted
    as being cancelled, and :func:`_live` asks for that count.
    """
    tasks = [asyncio.create_task(duty) for duty in duties]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        failed = next((task for task in tasks if task.done()), None)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if failed is not None:
        failed.result()


async def _refusal(call: _Call, error: Exception) -> HayflickError:
    """Return the word of the controller that *error* brought, or one of our own."""
    if isinstance(error, grpc.RpcError):
        return from_rpc_error(error)
    if call.done():
        # What ended first can be the writer, which knows only that the call
        # is over; the next read knows why.
        try:
            await _live(call.read())
        except grpc.RpcError as told:
            return from_rpc_error(told)
        except (_StreamEnded, asyncio.InvalidStateError):
            pass
    return HayflickError(
        ErrorReason.ERROR_REASON_SERVICE_UNAVAILABLE, str(error) or "the controller does not answer"
    )


def _fill(result: OrderResult, report: Report) -> None:
    result.worker_ids.extend(report.confirmed)
    result.unconfirmed_worker_ids.extend(report.unconfirmed)
    result.elapsed.CopyFrom(wire.duration(report.elapsed_seconds))
    for worker in report.ended:
        result.ends.add(worker_id=worker.worker_id, exit=worker.verdict.result(), usage=worker.usage)
