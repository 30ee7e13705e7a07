"""One live stream to a node: what goes down it, and what is awaited from it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator

from hayflick.v1 import controller_pb2
from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_rpc.errors import HayflickError

MAX_OUTGOING = 10_000

Outgoing = controller_pb2.ConnectNodeResponse
Result = controller_pb2.OrderResult


class Link:
    """The stream of one connected node.

    Attributes:
        node_id: The node's name.
        address: Where clients reach its OrchestratorService.
        python_version: Of the Python that its workers run.
        attestation_public_key: What verifies what it found of its sandboxes; empty when it gave none.
        last_beat_us: When it last beat.
        last_ack_us: When its lease was last renewed.
        sequence: Of its last beat.
        worker_count: Workers it last beat for.
        failure: Why the controller closed it; ``None`` when the node hung up.
        closed: Whether it has ended.
        departed: Set when its end is recorded and its name is free.
    """

    def __init__(
        self,
        node_id: str,
        address: str,
        python_version: str,
        connect_us: int,
        attestation_public_key: bytes = b"",
    ) -> None:
        self.node_id = node_id
        self.address = address
        self.python_version = python_version
        self.connect_us = connect_us
        self.attestation_public_key = attestation_public_key
        self.last_beat_us = connect_us
        self.last_ack_us = connect_us
        self.sequence = 0
        self.worker_count = 0
        self._outgoing: asyncio.Queue[Outgoing | None] = asyncio.Queue(MAX_OUTGOING)
        self._awaited: dict[str, asyncio.Future[Result]] = {}
        self.failure: HayflickError | None = None
        self.closed = False
        self.departed = asyncio.Event()

    def send(self, message: Outgoing) -> None:
        """Queue *message*; a node that reads none of 10,000 is cut off instead."""
        if self.closed:
            return
        try:
            self._outgoing.put_nowait(message)
        except asyncio.QueueFull:
            self.close(gone(self.node_id, "does not read its orders"))

    def order(self, order: controller_pb2.Order) -> asyncio.Future[Result]:
        """Send *order* under a new order_id; the future holds its result.

        The future fails with SERVICE_UNAVAILABLE when the stream ends first.
        """
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        # Nobody may be waiting any more when it fails.
        future.add_done_callback(lambda done: None if done.cancelled() else done.exception())
        if self.closed:
            future.set_exception(gone(self.node_id, "is not connected"))
            return future
        order.order_id = secrets.token_hex(8)
        self._awaited[order.order_id] = future
        future.add_done_callback(lambda _: self._awaited.pop(order.order_id, None))
        self.send(Outgoing(order=order))
        return future

    def result(self, result: Result) -> None:
        """Hand *result* to whoever awaits it; one that nobody awaits any more is dropped."""
        future = self._awaited.get(result.order_id)
        if future is not None and not future.done():
            future.set_result(result)

    def close(self, failure: HayflickError | None = None) -> None:
        """End the stream; orders without a result fail."""
        if self.closed:
            return
        self.closed = True
        self.failure = failure
        if self._outgoing.full():
            self._outgoing.get_nowait()
        self._outgoing.put_nowait(None)
        for future in list(self._awaited.values()):
            if not future.done():
                future.set_exception(gone(self.node_id, "hung up"))

    async def outgoing(self) -> AsyncGenerator[Outgoing]:
        """Yield what goes down the stream until it is closed.

        Raises:
            HayflickError: Why the controller closed it, when it did so for cause.
        """
        while (message := await self._outgoing.get()) is not None:
            yield message
        if self.failure is not None:
            raise self.failure


def gone(node_id: str, what: str) -> HayflickError:
    """Return the error about a node that cannot be asked."""
    return HayflickError(
        ErrorReason.ERROR_REASON_SERVICE_UNAVAILABLE,
        f"node {node_id} {what}",
        metadata={"service": "orchestrator", "node_id": node_id},
    )
