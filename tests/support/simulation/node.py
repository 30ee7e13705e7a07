"""A node that runs nothing, and knows at each moment what it would be running.

It is honest: it says of a worker that it is dead only once it is, and it ends its
workers by itself when its lease has run out. It need not be attentive.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hayflick.v1 import controller_pb2 as pb
from hayflick.v1 import resources_pb2
from hayflick_rpc.errors import HayflickError

if TYPE_CHECKING:
    from hayflick_controller.servicer import ControllerServicer
    from simulation.loop import Time

BEAT_SECONDS = 1.0
LEASE_SECONDS = 15.0


@dataclass(frozen=True)
class Running:
    """A worker that a node runs."""

    contract_id: str
    path: tuple[str, ...]


class Node:
    """See the module.

    Attributes:
        session: Of the stream that it has, or last had.
        connected: Whether it has one.
        obedient: Whether it carries out orders; those it leaves it carries out later.
        beating: Whether it beats.
        hushed: Workers that it does not beat for.
        births: Workers that it has asked to register, and does not know whether it may run.
        beaten: Workers that it beat for over this stream, and was heard.
        ever_beaten: The same, over all streams.
        ack_seconds: When its lease was last renewed.
    """

    def __init__(self, node_id: str, time: Time) -> None:
        self.node_id = node_id
        self.session = "none yet"
        self.connected = False
        self.obedient = True
        self.beating = True
        self.hushed: set[str] = set()
        self.births: set[str] = set()
        self.beaten: set[str] = set()
        self.ever_beaten: set[str] = set()
        self.ack_seconds = 0.0
        self._time = time
        self._running: dict[str, Running] = {}
        self._frozen: set[str] = set()
        self._orders: list[pb.Order] = []
        self._sent: dict[int, list[str]] = {}
        self._sequence = 0
        self._outgoing: asyncio.Queue[pb.ConnectNodeRequest | None] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def running(self) -> dict[str, Running]:
        """What runs now: nothing, once the lease has run out."""
        if self._time.seconds - self.ack_seconds >= LEASE_SECONDS:
            self._running.clear()
        return self._running

    def launch(self, worker: resources_pb2.Worker, path: tuple[str, ...]) -> None:
        """Run a worker that was registered for this node."""
        self.running[worker.worker_id] = Running(worker.contract_id, path)

    def lose(self, worker_id: str) -> None:
        """Note that a worker ended by itself."""
        self._running.pop(worker_id, None)

    async def connect(self, servicer: ControllerServicer) -> list[str]:
        """Open the stream; end and return whom the controller does not want to run.

        Raises:
            HayflickError: NODE_ALREADY_CONNECTED.
        """
        self._outgoing = asyncio.Queue()
        hello = pb.NodeHello(
            node_id=self.node_id, worker_ids=sorted(self.running), birth_worker_ids=sorted(self.births)
        )
        self._outgoing.put_nowait(pb.ConnectNodeRequest(hello=hello))
        stream = aiter(servicer.ConnectNode(_requests(self._outgoing), None))  # type: ignore[arg-type]
        first = await anext(stream)
        stop = list(first.welcome.stop_worker_ids)
        for worker_id in stop:
            self._running.pop(worker_id, None)
            self.births.discard(worker_id)
        self.session = first.welcome.session
        self.connected = True
        self.ack_seconds = self._time.seconds
        self._sequence, self._orders = 0, []
        self.beaten = set()
        self._tasks = [asyncio.create_task(self._read(stream)), asyncio.create_task(self._beat())]
        return stop

    async def hang_up(self) -> None:
        """End the stream."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.cut()

    def cut(self) -> None:
        """Notice that the stream has ended."""
        self.connected = False
        self.beaten = set()
        self._tasks = []

    async def die(self) -> None:
        """End, and all that it runs with it."""
        self._running.clear()
        await self.hang_up()

    def obey(self) -> None:
        """Carry out orders from now on, and first those that were left."""
        self.obedient = True
        orders, self._orders = self._orders, []
        for order in orders:
            self._carry_out(order)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            if not self.beating:
                continue
            self._sequence += 1
            # A frozen process says nothing.
            heard = [
                worker_id
                for worker_id, it in self.running.items()
                if worker_id not in self.hushed and self._frozen.isdisjoint(it.path)
            ]
            self._sent[self._sequence] = heard
            beats = [
                pb.WorkerBeat(worker_id=worker_id, state=resources_pb2.STATE_RUNNING) for worker_id in heard
            ]
            message = pb.ConnectNodeRequest(beat=pb.NodeBeat(sequence=self._sequence, workers=beats))
            self._outgoing.put_nowait(message)

    async def _read(self, stream: AsyncIterator[pb.ConnectNodeResponse]) -> None:
        try:
            with contextlib.suppress(HayflickError):
                async for message in stream:
                    if message.WhichOneof("message") == "ack":
                        self.ack_seconds = self._time.seconds
                        heard = self._sent.pop(message.ack.sequence)
                        self.beaten.update(heard)
                        self.ever_beaten.update(heard)
                    elif self.obedient:
                        self._carry_out(message.order)
                    else:
                        self._orders.append(message.order)
        finally:
            await stream.aclose()  # type: ignore[attr-defined] -- a generator
            self.connected = False
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()

    def _carry_out(self, order: pb.Order) -> None:
        result = pb.OrderResult(order_id=order.order_id)
        match order.WhichOneof("order"):
            case "kill":
                ordered = set(order.kill.worker_ids)
                dead = {
                    worker_id for worker_id, it in self.running.items() if _covers(order.kill.scope, it)
                } | ordered
                for worker_id in dead:
                    self._running.pop(worker_id, None)
                result.worker_ids.extend(sorted(dead))
            case "freeze":
                self._frozen.add(order.freeze.worker_id)
                result.worker_ids.extend(self._family(order.freeze.worker_id))
            case "thaw":
                self._frozen.discard(order.thaw.worker_id)
                result.worker_ids.extend(
                    worker_id
                    for worker_id in self._family(order.thaw.worker_id)
                    if self._frozen.isdisjoint(self.running[worker_id].path)
                )
        self._outgoing.put_nowait(pb.ConnectNodeRequest(result=result))

    def _family(self, worker_id: str) -> list[str]:
        return sorted(name for name, it in self.running.items() if worker_id in it.path)


def _covers(scope: pb.Scope, it: Running) -> bool:
    match scope.WhichOneof("scope"):
        case "everything":
            return True
        case "contract_id":
            return it.contract_id == scope.contract_id
        case _:
            return scope.worker_id in it.path


async def _requests(
    queue: asyncio.Queue[pb.ConnectNodeRequest | None],
) -> AsyncIterator[pb.ConnectNodeRequest]:
    while (message := await queue.get()) is not None:
        yield message
