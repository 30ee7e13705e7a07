"""Licences taken from the living: at once, for the whole family, and for good."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING, Any

import pytest

from hayflick.v1 import controller_pb2, logger_pb2
from hayflick.v1.resources_pb2 import NetworkPolicy, Worker

from .conftest import Stack, command, refused, request_id, shell, until

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def upstream() -> Iterator[socket.socket]:
    """A port outside that accepts."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(20)
        yield server


def narrow(stack: Stack, worker: Worker, policy: NetworkPolicy | None = None, **more: Any) -> Worker:
    """Leave *worker* the *policy*."""
    request = controller_pb2.NarrowNetworkRequest(
        **{"request_id": request_id(), "worker_id": worker.worker_id, "reason": "enough", **more}
    )
    request.network.CopyFrom(policy or NetworkPolicy())
    return stack.controller.NarrowNetwork(request).worker


def policy(upstream: socket.socket, **more: Any) -> NetworkPolicy:
    """Return a policy that lists *upstream*."""
    fields = {"allow_controller": True, "allowed_hosts": [f"127.0.0.1:{upstream.getsockname()[1]}"], **more}
    return NetworkPolicy(**fields)


CONNECT = """
import socket, sys, time
sock = socket.create_connection(("127.0.0.1", 3128))
sock.sendall(b"CONNECT 127.0.0.1:%s HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n" % sys.argv[1].encode())
print(sock.recv(100)[:12], flush=True)
print(sock.recv(100), flush=True)
"""
HOLD = f"{CONNECT}time.sleep(100)\n"


def hold(stack: Stack, worker: Worker, upstream: socket.socket) -> tuple[Any, socket.socket]:
    """Have *worker* connect to *upstream*; return its task's stream and the far end."""
    task = command("python", "-c", HOLD, str(upstream.getsockname()[1]))
    stream = stack.begin(worker, task)
    far, _ = upstream.accept()
    far.settimeout(20)
    return stream, far


KNOCK = (
    "python -c 'import os,socket; s=socket.socket(socket.AF_UNIX); s.connect(\"/run/hayflick/worker.sock\")'"
)


def test_all_doors_shut_at_once(stack: Stack, upstream: socket.socket) -> None:
    """When the answer comes, connections are cut, doors are shut, and the record shows the new policy."""
    worker = stack.launch(network=policy(upstream))
    assert stack.run(worker, shell(KNOCK)).outcome == "SUCCEEDED"
    stream, far = hold(stack, worker, upstream)
    narrowed = narrow(stack, worker)
    assert narrowed.resources.network == NetworkPolicy()
    far.setblocking(False)  # it was cut before the answer came
    with far, contextlib.suppress(ConnectionResetError):
        assert far.recv(1) == b""
    stream.cancel()
    ran = stack.run(worker, shell(KNOCK), keep=True)
    assert b"ConnectionRefusedError" in ran.stderr, ran
    assert stack.worker(worker.worker_id).resources.network == NetworkPolicy()
    # What was signed stays what was signed.
    assert stack.worker(worker.worker_id).manifest.resources.network.allow_controller
    ran = stack.run(
        worker,
        command("python", "-c", CONNECT, str(upstream.getsockname()[1])),
        keep=True,
    )
    assert b"403" in ran.stdout.splitlines()[0], ran
    stack.stop(worker)


def test_what_is_still_listed_goes_on(stack: Stack, upstream: socket.socket) -> None:
    """A connection to a host that stays listed is not touched; a lower budget ends it."""
    worker = stack.launch(
        network=policy(upstream, allowed_hosts=[f"127.0.0.1:{upstream.getsockname()[1]}", "a.example"])
    )
    stream, far = hold(stack, worker, upstream)
    listed = policy(upstream)
    narrow(stack, worker, listed)
    with far:
        far.sendall(b"still here")
        assert b"still here" in next(stream).output.data
        listed.egress_limit_bytes = 10
        narrow(stack, worker, listed)
        with contextlib.suppress(ConnectionResetError):
            assert far.recv(1) == b""
    stream.cancel()
    events = [
        it.event
        for it in stack.logger.ListEvents(
            logger_pb2.ListEventsRequest(
                filter=logger_pb2.EventFilter(worker_id=worker.worker_id, events=["audit"])
            )
        ).events
    ]
    decisions = [dict(event.details) for event in events]
    taken = [list(it["taken"]) for it in decisions if it["decision"] == "network_narrowed"]
    assert taken == [["allowed_hosts"], ["egress_limit_bytes"]]
    stack.stop(worker)


def test_a_task_of_the_sdk_may_not_call_either(stack: Stack) -> None:
    """The control stream of a running worker goes by the narrower policy too."""
    worker = stack.launch()
    narrow(stack, worker)
    from .conftest import call

    def task(me: Any) -> str:
        try:
            me._channel.call("Replicate", {"requestId": "r1"})
        except me._channel.CallError as error:
            return str(error.reason)
        return "born"

    assert stack.run(worker, call(task)).result.value_json == '"CONTROLLER_NOT_ALLOWED"'
    stack.stop(worker)


def test_descendants_are_narrowed_as_well(stack: Stack, upstream: socket.socket) -> None:
    """A child keeps no licence that its parent lost, and one that is born later gets none."""
    contract = stack.contract()
    root = stack.launch(contract, network=policy(upstream))
    child = stack.launch(contract, root.worker_id, network=policy(upstream))
    pending = stack.manifest(contract, root.worker_id, network=policy(upstream))
    stream, far = hold(stack, child, upstream)
    narrow(stack, root, NetworkPolicy(allow_controller=True))
    with far, contextlib.suppress(ConnectionResetError):
        assert far.recv(1) == b""
    stream.cancel()
    assert stack.worker(child.worker_id).resources.network == NetworkPolicy(allow_controller=True)
    from hayflick.v1 import orchestrator_pb2

    with refused("EXCEEDS_PARENT"):
        stack.orchestrator.LaunchWorker(
            orchestrator_pb2.LaunchWorkerRequest(request_id=request_id(), manifest=pending)
        )
    stack.stop(root)


def test_never_wider(stack: Stack, upstream: socket.socket) -> None:
    """What would add anything, or take what cannot be taken live, is refused and changes nothing."""
    worker = stack.launch(network=policy(upstream, allow_loopback=True))
    before = stack.worker(worker.worker_id).resources.network
    for more in (
        {"allow_external": True},
        {"allowed_hosts": ["a.example"]},
        {"allowed_hosts": [*before.allowed_hosts, "*.b.example"]},
    ):
        with refused("NOT_NARROWER"):
            narrow(stack, worker, policy(upstream, allow_loopback=True, **more))
    with refused("LIMIT_NOT_ENFORCEABLE"):
        narrow(stack, worker, policy(upstream))
    assert stack.worker(worker.worker_id).resources.network == before
    narrow(stack, worker, NetworkPolicy(allow_loopback=True))
    with refused("NOT_NARROWER"):
        narrow(stack, worker, policy(upstream, allow_loopback=True))
    stack.stop(worker)
    with refused("WORKER_NOT_RUNNING"):
        narrow(stack, worker, NetworkPolicy(allow_loopback=True))


def test_asked_twice(stack: Stack, upstream: socket.socket) -> None:
    """A repeated request gets its first answer and is recorded once; with other contents it is refused."""
    worker = stack.launch(network=policy(upstream))
    again = request_id()
    first = narrow(stack, worker, request_id=again)
    assert narrow(stack, worker, request_id=again) == first
    with refused("REQUEST_ID_REUSED"):
        narrow(stack, worker, request_id=again, reason="other")
    with refused("WORKER_UNKNOWN"):
        narrow(stack, Worker(worker_id="f" * 16))
    stack.stop(worker)


def test_a_controller_that_restarts_still_knows(own_stack: Stack, upstream: socket.socket) -> None:
    """What was taken stays taken when the controller starts again."""
    worker = own_stack.launch(network=policy(upstream))
    narrow(own_stack, worker, NetworkPolicy(allow_controller=True))
    own_stack.end("controller", 9)
    own_stack.start("controller")
    until(
        lambda: own_stack.controller.ListNodes(controller_pb2.ListNodesRequest(), wait_for_ready=True).nodes
    )
    assert own_stack.worker(worker.worker_id).resources.network == NetworkPolicy(allow_controller=True)
    with refused("NOT_NARROWER"):
        narrow(own_stack, worker, policy(upstream))
    own_stack.stop(worker)
