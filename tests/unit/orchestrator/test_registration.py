"""A registration whose answers are lost: the client knows when it cannot know, and finds out."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from hayflick.v1 import controller_pb2 as pb
from hayflick.v1 import controller_pb2_grpc
from hayflick.v1.errors_pb2 import ErrorReason
from hayflick.v1.resources_pb2 import Manifest, Worker
from hayflick_orchestrator.controller_client import ControllerClient, Registration, Session
from hayflick_rpc.channel import OPTIONS, connect
from hayflick_rpc.clock import boot_seconds
from hayflick_rpc.errors import HayflickError
from hayflick_rpc.interceptors import chain


class Controller(controller_pb2_grpc.ControllerServiceServicer):
    """Answers each registration with the next of what it was given; registers when there is nothing left."""

    def __init__(self) -> None:
        self.answers: list[str] = []
        self.request_ids: set[str] = set()
        self.heard_boot: list[float] = []

    async def RegisterWorker(self, request: Any, context: Any) -> pb.RegisterWorkerResponse:  # noqa: N802 -- gRPC's
        """Answer."""
        self.request_ids.add(request.request_id)
        self.heard_boot.append(boot_seconds())
        if self.answers:
            reason = ErrorReason.Value(f"ERROR_REASON_{self.answers.pop(0)}")
            raise HayflickError(reason, "as the test says")
        born = Worker(worker_id=request.manifest.worker_id)
        born.create_time.FromSeconds(1_000)
        born.expire_time.FromSeconds(1_060)
        return pb.RegisterWorkerResponse(worker=born)


@pytest.fixture
async def controller() -> AsyncIterator[tuple[Controller, ControllerClient]]:
    """A controller that says what it is told to, and a node's client of it."""
    with tempfile.TemporaryDirectory(prefix="hf-") as directory:
        server = grpc.aio.server(interceptors=chain(), options=OPTIONS)
        made = Controller()
        controller_pb2_grpc.add_ControllerServiceServicer_to_server(made, server)
        address = f"unix://{directory}/controller.sock"
        server.add_insecure_port(address)
        await server.start()
        session = Session()
        session.opened("secret")
        channel = connect(address)
        try:
            yield made, ControllerClient(channel, "node", session)
        finally:
            await channel.close()
            await server.stop(None)


@pytest.mark.parametrize(
    ("answers", "unsure"),
    [
        (["SERVICE_UNAVAILABLE"] * 3, True),
        (["SHUTTING_DOWN"] * 3, True),
        (["SERVICE_UNAVAILABLE", "NODE_SESSION_INVALID", "NODE_SESSION_INVALID"], True),
        (["SERVICE_UNAVAILABLE", "AUDIT_UNAVAILABLE"], True),
        (["INTERNAL"], True),
        (["SERVICE_UNAVAILABLE", "QUARANTINED"], False),
        (["NODE_SESSION_INVALID"] * 3, False),
        (["AUDIT_UNAVAILABLE"], False),
        (["QUARANTINED"], False),
    ],
    ids=lambda value: " then ".join(value) if isinstance(value, list) else None,
)
async def test_what_may_have_been_committed(
    controller: tuple[Controller, ControllerClient], answers: list[str], unsure: bool
) -> None:
    """A registration is unsure until the controller says what became of it, and not of one attempt alone."""
    made, client = controller
    made.answers = list(answers)
    registration = Registration(Manifest(worker_id="worker"), ())
    with pytest.raises(HayflickError) as caught:
        await client.register(registration)
    assert caught.value.reason_name == answers[-1]
    assert made.answers == []
    assert registration.unsure == unsure


async def test_it_asks_until_it_knows(controller: tuple[Controller, ControllerClient]) -> None:
    """What became of a registration is asked by the same request until the controller says it."""
    made, client = controller
    registration = Registration(Manifest(worker_id="worker"), ())
    made.answers = ["SERVICE_UNAVAILABLE", "SHUTTING_DOWN", "NODE_SESSION_INVALID", "AUDIT_UNAVAILABLE"]
    found = await client.settle(registration)
    assert found is not None
    assert found.worker_id == "worker"
    assert made.request_ids == {registration.request_id}
    made.answers = ["WORKER_NOT_RUNNING"]
    assert await client.settle(registration) is None


async def test_a_life_counts_from_the_first_attempt_that_may_have_been_heard(
    controller: tuple[Controller, ControllerClient],
) -> None:
    """A worker's end lies its length of life after the first attempt that may have committed it."""
    made, client = controller
    registration = Registration(Manifest(worker_id="worker"), ())
    made.answers = ["NODE_SESSION_INVALID", "SERVICE_UNAVAILABLE"]
    await client.register(registration)
    assert registration.expire_boot is not None
    refused, unheard, _ = made.heard_boot
    asked = registration.asked_boot
    assert refused < asked < unheard
    assert registration.expire_boot == pytest.approx(asked + 60, abs=1e-6)
    # The same one again, as after an answer that was lost, moves nothing.
    registration.unsure = True
    await client.register(registration)
    assert registration.asked_boot == asked
