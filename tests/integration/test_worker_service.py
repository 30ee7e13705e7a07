"""WorkerService over gRPC, spoken from inside a sandbox by whoever can."""

from __future__ import annotations

import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from hayflick.v1 import controller_pb2
from hayflick.v1.resources_pb2 import NetworkPolicy, State

from .conftest import Stack, command, request_id, shell, until

ALLOWED = NetworkPolicy(allow_controller=True)
# gRPC's threads and stubs want more than the small workers of other tests have.
ROOMY = {"memory_limit_bytes": 256 * 1024 * 1024}

CLIENT = """
import json, os, sys
import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hayflick.v1 import controller_pb2, controller_pb2_grpc, worker_pb2, worker_pb2_grpc

def reason(error):
    status = rpc_status.from_call(error)
    info = error_details_pb2.ErrorInfo()
    for detail in status.details if status else ():
        if detail.Unpack(info):
            return info.reason
    return error.code().name

channel = grpc.insecure_channel(os.environ["HAYFLICK_WORKER"])
me = worker_pb2_grpc.WorkerServiceStub(channel)
"""


def client(body: str) -> Any:
    """Return a task that runs *body* with a gRPC channel to the worker's own service."""
    return command("python", "-c", CLIENT + body, timeout=60)


def test_a_client_of_another_program_replicates(stack: Stack) -> None:
    """A program that is no task of the SDK's learns who it is, gets a child and ends it, over gRPC."""
    root = stack.launch(network=ALLOWED, **ROOMY)
    ran = stack.run(
        root,
        client(
            """
said = me.GetSelf(worker_pb2.GetSelfRequest()).worker.worker_id
child = me.Replicate(worker_pb2.ReplicateRequest(request_id="one", reason="split")).worker
ended = me.Shutdown(worker_pb2.ShutdownRequest(request_id="two", worker_id=child.worker_id)).worker
print(json.dumps([said, child.parent_id, child.depth, ended.worker_id == child.worker_id]))
"""
        ),
    )
    assert json.loads(ran.stdout or b"0") == [root.worker_id, root.worker_id, 1, True], ran
    stack.stop(root)


def test_a_task_in_a_descendant(stack: Stack) -> None:
    """What a descendant's task prints comes back over the stream."""
    root = stack.launch(network=ALLOWED, **ROOMY)
    ran = stack.run(
        root,
        client(
            """
from hayflick.v1 import orchestrator_pb2
child = me.Replicate(worker_pb2.ReplicateRequest(request_id="one")).worker
task = orchestrator_pb2.Task(command=orchestrator_pb2.Command(argv=["echo", "from", "below"]))
request = worker_pb2.RunDescendantTaskRequest(worker_id=child.worker_id, task=task)
for answer in me.RunDescendantTask(request):
    sys.stdout.buffer.write(answer.event.output.data)
"""
        ),
    )
    assert ran.stdout == b"from below\n", ran
    stack.stop(root)


def test_each_door_is_its_own_workers(stack: Stack) -> None:
    """Two workers at once are each told of themselves, and neither may touch the other."""
    contract = stack.contract()
    pair = [stack.launch(contract, network=ALLOWED, **ROOMY) for _ in range(2)]
    answers: dict[str, Any] = {}

    def ask(asker: Any, other: Any) -> None:
        ran = stack.run(
            asker,
            client(
                f"""
said = {{me.GetSelf(worker_pb2.GetSelfRequest()).worker.worker_id for _ in range(50)}}
try:
    me.Shutdown(worker_pb2.ShutdownRequest(request_id="r", worker_id={other.worker_id!r}))
except grpc.RpcError as error:
    print(json.dumps([sorted(said), reason(error)]))
"""
            ),
        )
        answers[asker.worker_id] = json.loads(ran.stdout or b"0")

    threads = [threading.Thread(target=ask, args=order) for order in (pair, pair[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {one.worker_id: [[one.worker_id], "NOT_A_DESCENDANT"] for one in pair}
    for one in pair:
        stack.stop(one)


def test_nothing_else_is_served_there(stack: Stack) -> None:
    """Behind the door are WorkerService, health and reflection, and no other service of Hayflick."""
    root = stack.launch(network=ALLOWED, **ROOMY)
    ran = stack.run(
        root,
        client(
            """
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
(listed,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(asked)
names = sorted(service.name for service in listed.list_services_response.service)
try:
    controller_pb2_grpc.ControllerServiceStub(channel).ListNodes(controller_pb2.ListNodesRequest())
except grpc.RpcError as error:
    print(json.dumps([health.status, names, reason(error)]))
"""
        ),
    )
    assert json.loads(ran.stdout or b"0") == [
        1,
        [
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
            "hayflick.v1.WorkerService",
        ],
        "UNIMPLEMENTED",
    ], ran
    stack.stop(root)


def test_without_the_licence_there_is_no_door(stack: Stack) -> None:
    """A worker that may not call its WorkerService finds no socket and no word of one."""
    root = stack.launch(network=NetworkPolicy())
    ran = stack.run(root, shell('echo "[$HAYFLICK_WORKER]"; ls -d /run 2>&1; true'))
    assert ran.stdout.startswith(b"[]\n"), ran
    assert b"No such file" in ran.stdout, ran
    stack.stop(root)


def test_the_worker_cannot_move_its_door(stack: Stack) -> None:
    """The door can be neither removed, nor renamed, nor covered, nor closed to others of the worker."""
    root = stack.launch(network=ALLOWED)
    ran = stack.run(
        root,
        shell(
            "cd /run/hayflick; for it in 'rm worker.sock' 'mv worker.sock other' 'chmod 000 worker.sock' "
            "'touch new' 'ln -s /tmp x'; do $it 2>/dev/null && echo did $it; done; ls -l"
        ),
    )
    assert b"did" not in ran.stdout, ran
    assert b"worker.sock" in ran.stdout, ran
    stack.stop(root)


@pytest.mark.root
def test_a_stranger_at_the_door(stack: Stack) -> None:
    """A process that is not of the sandbox is hung up on at its door, even as root."""
    root = stack.launch(network=ALLOWED)
    pid = stack.sandboxes()[root.worker_id].host_pid
    directory = os.open(f"/proc/{pid}/root/run/hayflick", os.O_PATH)
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(f"/proc/self/fd/{directory}/worker.sock")
            assert sock.recv(1) == b""
    finally:
        os.close(directory)
    assert "not its own" in stack.log("orchestrator")
    stack.stop(root)


HOARDER = """
import os, socket, sys, time
path = os.environ["HAYFLICK_WORKER"].removeprefix("unix://")
held = []
for _ in range(12):
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    sock.settimeout(2)
    held.append(sock)
served = 0
for sock in held:
    try:
        # An HTTP/2 server speaks first; whoever was not accepted hears nothing.
        served += bool(sock.recv(1))
    except TimeoutError:
        pass
print(served, flush=True)
time.sleep(float(sys.argv[1]))
"""


def test_connections_are_bounded(stack: Stack) -> None:
    """A worker that hoards connections is served four of them; its neighbour is served as before."""
    hoarder = stack.launch(network=ALLOWED)
    neighbour = stack.launch(network=ALLOWED, **ROOMY)
    before = descriptors(stack)
    stream = stack.orchestrator.RunTask(
        controller_task(hoarder.worker_id, command("python", "-c", HOARDER, "60"))
    )
    assert next(stream).HasField("started")
    assert next(stream).output.data == b"4\n"
    ran = stack.run(neighbour, client("print(me.GetSelf(worker_pb2.GetSelfRequest()).worker.worker_id)"))
    assert ran.stdout.decode().strip() == neighbour.worker_id, ran
    stream.cancel()
    stack.stop(hoarder)
    stack.stop(neighbour)
    # The doors themselves are gone too.
    until(lambda: descriptors(stack) <= before)


def controller_task(worker_id: str, task: Any) -> Any:
    """Return the request that runs *task* in a worker."""
    from hayflick.v1 import orchestrator_pb2

    return orchestrator_pb2.RunTaskRequest(worker_id=worker_id, task=task)


def descriptors(stack: Stack) -> int:
    """Return how many sockets the orchestrator has open."""
    total = 0
    for entry in Path(f"/proc/{stack.processes['orchestrator'].pid}/fd").iterdir():
        try:
            total += str(entry.readlink()).startswith("socket:")
        except OSError:
            continue
    return total


@pytest.mark.layers("kill")
def test_quarantine_holds_the_line(stack: Stack) -> None:
    """Nothing passes while a worker is quarantined; released, the same connection goes on."""
    root = stack.launch(network=ALLOWED, **ROOMY)
    stream = stack.orchestrator.RunTask(
        controller_task(
            root.worker_id,
            client(
                """
import time
seen = 0
print("begun", flush=True)
while True:
    assert me.GetSelf(worker_pb2.GetSelfRequest()).worker.worker_id
    seen += 1
    if seen % 20 == 0:
        print(seen, flush=True)
"""
            ),
        )
    )
    assert next(stream).HasField("started")
    assert next(stream).HasField("output")
    stack.controller.QuarantineWorker(
        controller_pb2.QuarantineWorkerRequest(
            request_id=request_id(), worker_id=root.worker_id, reason="look"
        )
    )
    assert stack.sandboxes()[root.worker_id].worker.state == State.STATE_QUARANTINED
    stack.controller.ReleaseQuarantine(
        controller_pb2.ReleaseQuarantineRequest(
            request_id=request_id(), worker_id=root.worker_id, reason="fine"
        )
    )
    for _ in range(100):
        response = next(stream)
        assert response.output.stream != 2, response  # STREAM_STDERR: a traceback
    stream.cancel()
    stack.stop(root)
