"""Stop means stopped: kill switches, dead services, lost leases."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from hayflick.v1 import controller_pb2, orchestrator_pb2
from hayflick.v1.resources_pb2 import EndReason, State, Worker

from .conftest import (
    Stack,
    command,
    duration,
    groups,
    reason_of,
    refused,
    request_id,
    running_stack,
    shell,
    until,
)

STUBBORN = {
    "ignores": "trap '' TERM INT HUP QUIT; echo x; while :; do sleep 1; done",
    "forks": "trap '' TERM; (while :; do setsid sleep 100 & sleep 0.01; done) & echo x; wait",
    "hangs": "echo x; exec sleep 1000",
    "spins": "echo x; while :; do :; done",
    "stopped": "echo x; kill -STOP $$; sleep 100",
}


def processes_of(uid: int) -> list[int]:
    """Return the processes of a host user that run; one that waits to be reaped does not."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if entry.stat().st_uid == uid and state not in "ZX":
                    found.append(int(entry.name))
    return found


def uids(stack: Stack, *workers: Worker) -> list[int]:
    """Return the host users of *workers*."""
    sandboxes = stack.sandboxes()
    return [sandboxes[worker.worker_id].host_uid for worker in workers]


@pytest.mark.parametrize("kind", STUBBORN)
@pytest.mark.layers("uid-range")
def test_no_worker_outlives_the_switch(stack: Stack, kind: str) -> None:
    """When the kill switch answers, no process runs, whatever the worker does against it."""
    worker = stack.launch(pids_limit=40)
    (uid,) = uids(stack, worker)
    stream = stack.begin(worker, shell(STUBBORN[kind]))
    answer = stack.kill(contract_id=worker.contract_id)
    assert processes_of(uid) == []
    assert list(answer.worker_ids) == [worker.worker_id]
    assert not answer.unconfirmed_worker_ids
    assert stack.worker(worker.worker_id).state == State.STATE_ENDED
    assert stack.end_reason(worker.worker_id) == "KILL_SWITCH"
    assert "worker_shutdown" in stack.events(worker.worker_id)
    assert list(stream)[-1].HasField("result")
    with refused("KILL_SWITCH_ENGAGED"):
        stack.run(worker, command("true"))


def test_a_subtree(stack: Stack) -> None:
    """A kill switch over a worker ends it and its descendants, and nobody else."""
    contract = stack.contract()
    root = stack.launch(contract)
    left, right = stack.launch(contract, root.worker_id), stack.launch(contract, root.worker_id)
    leaf = stack.launch(contract, left.worker_id)
    answer = stack.kill(worker_id=left.worker_id)
    assert set(answer.worker_ids) == {left.worker_id, leaf.worker_id}
    assert {root.worker_id, right.worker_id} <= set(stack.sandboxes())
    stack.kill(contract_id=contract)


def test_a_storm_of_launches_under_the_switch(stack: Stack) -> None:
    """Launches that are under way when the switch is engaged leave no process behind."""
    contract = stack.contract(max_replicas=100)
    manifests = [stack.manifest(contract) for _ in range(40)]
    first = threading.Event()

    def attempt(index: int) -> str:
        from .test_orchestrator_launch import launch

        try:
            worker = launch(stack, manifests[index]).worker
            return worker.worker_id
        except grpc.RpcError as error:
            return reason_of(error)
        finally:
            first.set()

    with ThreadPoolExecutor(16) as pool:
        futures = [pool.submit(attempt, index) for index in range(len(manifests))]
        first.wait()
        answer = stack.kill(contract_id=contract)
        alive_after = {
            name for name, sandbox in stack.sandboxes().items() if sandbox.worker.contract_id == contract
        }
        answers = [future.result() for future in futures]
    assert alive_after == set()
    assert not answer.unconfirmed_worker_ids
    assert "KILL_SWITCH_ENGAGED" in answers
    assert {name for name, it in stack.sandboxes().items() if it.worker.contract_id == contract} == set()
    request = controller_pb2.ListWorkersRequest(contract_id=contract, page_size=1_000)
    assert {worker.state for worker in stack.controller.ListWorkers(request).workers} <= {State.STATE_ENDED}


@pytest.mark.layers("kill")
def test_quarantine(stack: Stack) -> None:
    """A quarantined family stands still, takes nothing, and goes on where it stood."""
    root = stack.launch()
    child = stack.launch(root.contract_id, root.worker_id)
    stream = stack.begin(child, shell("i=0; while :; do echo $i; i=$((i+1)); sleep 0.02; done"))
    stack.controller.QuarantineWorker(
        controller_pb2.QuarantineWorkerRequest(
            request_id=request_id(), worker_id=root.worker_id, reason="look"
        )
    )
    states = {name: it.worker.state for name, it in stack.sandboxes().items()}
    assert {states[root.worker_id], states[child.worker_id]} == {State.STATE_QUARANTINED}
    for worker in (root, child):
        with refused("QUARANTINED"):
            stack.run(worker, command("true"))
    with refused("QUARANTINED"):
        stack.manifest(root.contract_id, child.worker_id)
    stack.controller.ReleaseQuarantine(
        controller_pb2.ReleaseQuarantineRequest(
            request_id=request_id(), worker_id=root.worker_id, reason="fine"
        )
    )
    assert next(stream).output.data
    assert stack.run(root, command("true")).outcome == "SUCCEEDED"
    stack.stop(root)


@pytest.mark.layers("kill")
def test_a_frozen_worker_can_be_killed(stack: Stack) -> None:
    """The switch ends also those who stand still."""
    worker = stack.launch()
    (uid,) = uids(stack, worker)
    stack.controller.QuarantineWorker(
        controller_pb2.QuarantineWorkerRequest(
            request_id=request_id(), worker_id=worker.worker_id, reason="look"
        )
    )
    assert list(stack.kill(contract_id=worker.contract_id).worker_ids) == [worker.worker_id]
    assert processes_of(uid) == []


# Services that die


@pytest.mark.layers("uid-range")
def test_sigterm_leaves_nothing(own_stack: Stack) -> None:
    """An orchestrator that is told to stop ends its workers, says so, and leaves nothing."""
    stack = own_stack
    worker = stack.launch()
    stream = stack.begin(worker, shell(STUBBORN["ignores"]))
    (uid,) = uids(stack, worker)
    assert stack.end("orchestrator") == 0
    assert processes_of(uid) == []
    assert set(stack.left_behind()) == {f"{stack.directory}/{name}.sock" for name in ("controller", "logger")}
    assert stack.end_reason(worker.worker_id) == "KILLED"
    assert list(stream)[-1].result.end_reason == EndReason.END_REASON_KILLED


@pytest.mark.layers("uid-range")
def test_sigkill_leaves_no_worker(own_stack: Stack) -> None:
    """When the orchestrator is killed, its workers die with it, within a second."""
    stack = own_stack
    root = stack.launch()
    child = stack.launch(root.contract_id, root.worker_id)
    stack.begin(child, shell(STUBBORN["ignores"]))
    everyone = uids(stack, root, child)
    stack.end("orchestrator", signal.SIGKILL)
    until(lambda: not any(processes_of(uid) for uid in everyone), seconds=1.0)
    until(lambda: not groups(stack.node_id))
    # Its successor takes over the name, and its workers are recorded as lost.
    stack.start("orchestrator")
    assert stack.end_reason(root.worker_id) == "NODE_LOST"
    stack.stop(stack.launch())


@pytest.mark.layers("uid-range")
def test_the_zygote_dies(own_stack: Stack) -> None:
    """Without its zygote a node ends everything and says that it failed."""
    stack = own_stack
    worker = stack.launch()
    (uid,) = uids(stack, worker)
    orchestrator = stack.processes["orchestrator"].pid
    children = Path(f"/proc/{orchestrator}/task/{orchestrator}/children").read_text().split()
    (zygote,) = children
    os.kill(int(zygote), signal.SIGKILL)
    assert stack.processes["orchestrator"].wait(20) == 1
    assert processes_of(uid) == []
    stack.processes.pop("orchestrator").stdout.close()  # type: ignore[union-attr]
    assert stack.end_reason(worker.worker_id) == "NODE_LOST"


@pytest.mark.layers("uid-range")
def test_a_controller_that_is_silent(own_stack: Stack) -> None:
    """When the controller is not heard for a whole lease, the node ends its workers by itself."""
    stack = own_stack
    worker = stack.launch()
    (uid,) = uids(stack, worker)
    controller = stack.processes["controller"]
    controller.send_signal(signal.SIGSTOP)
    try:
        until(lambda: processes_of(uid) == [], seconds=30)
        lost_at = time.monotonic()
    finally:
        controller.send_signal(signal.SIGCONT)
    assert lost_at
    assert stack.end_reason(worker.worker_id) in ("LEASE_LOST", "NODE_LOST")
    until(lambda: stack.controller.ListNodes(controller_pb2.ListNodesRequest()).nodes)
    stack.stop(stack.launch())


@pytest.mark.slow
def test_grace_ends_with_the_lease() -> None:
    """A worker that is stopping with grace does not outlive the lease of its node."""
    with running_stack(controller={"lease-seconds": "3"}) as stack:
        worker = stack.launch()
        (uid,) = uids(stack, worker)
        stream = stack.begin(worker, shell(STUBBORN["ignores"]))
        stop = stack.orchestrator.StopWorker.future(
            orchestrator_pb2.StopWorkerRequest(
                request_id=request_id(), worker_id=worker.worker_id, grace=duration(60)
            )
        )
        controller = stack.processes["controller"]
        controller.send_signal(signal.SIGSTOP)
        try:
            until(lambda: processes_of(uid) == [], seconds=20)
        finally:
            controller.send_signal(signal.SIGCONT)
        stream.cancel()
        stop.cancel()


def test_an_init_that_is_silent() -> None:
    """A worker whose init says nothing for the heartbeat timeout is ended as that; its neighbour lives on."""
    with running_stack(orchestrator={"heartbeat-timeout-seconds": "2"}) as stack:
        worker, neighbour = stack.launch(), stack.launch()
        init = stack.sandboxes()[worker.worker_id].host_pid
        stack.run(worker, command("true"), keep=True)  # it is heard
        os.kill(init, signal.SIGSTOP)
        assert stack.end_reason(worker.worker_id) == "HEARTBEAT_TIMEOUT"
        until(lambda: set(stack.sandboxes()) == {neighbour.worker_id})
        assert not Path(f"/proc/{init}").exists()
        stack.stop(neighbour)


def test_a_controller_that_restarts(own_stack: Stack) -> None:
    """Workers live through a restart of the controller that is shorter than their lease."""
    stack = own_stack
    worker = stack.launch()
    assert stack.end("controller") == 0
    stack.start("controller")
    until(lambda: stack.controller.ListNodes(controller_pb2.ListNodesRequest(), wait_for_ready=True).nodes)
    assert stack.run(worker, command("echo", "still here")).stdout == b"still here\n"
    stack.stop(worker)
    assert stack.end_reason(worker.worker_id) == "COMPLETED"


def test_launches_outlive_a_restart_of_the_controller(own_stack: Stack) -> None:
    """A launch that waits for a controller which is being restarted brings its worker to life."""
    stack = own_stack
    contract = stack.contract()
    manifests = [stack.manifest(contract) for _ in range(3)]
    assert stack.end("controller") == 0
    launches = [
        stack.orchestrator.LaunchWorker.future(
            orchestrator_pb2.LaunchWorkerRequest(request_id=request_id(), manifest=manifest)
        )
        for manifest in manifests
    ]
    assert stack.sandboxes() == {}  # asked on the same connection: the launches came first
    stack.start("controller")
    born = {launch.result(timeout=30).worker.worker_id for launch in launches}
    assert born == {manifest.worker_id for manifest in manifests} == set(stack.sandboxes())
    for worker_id in born:
        assert not stack.worker(worker_id).HasField("exit")


def test_a_birth_whose_answer_was_lost_comes_to_life(own_stack: Stack) -> None:
    """A node whose controller crashes before it answers for a birth asks again, and is answered."""
    stack = own_stack
    manifest = stack.manifest(stack.contract())
    logger = stack.processes["logger"]
    logger.send_signal(signal.SIGSTOP)  # committed, and not answered before it is recorded
    try:
        request = orchestrator_pb2.LaunchWorkerRequest(request_id=request_id(), manifest=manifest)
        launch = stack.orchestrator.LaunchWorker.future(request)
        until(lambda: _on_record(stack, manifest.worker_id))
        stack.end("controller", signal.SIGKILL)
    finally:
        logger.send_signal(signal.SIGCONT)
    stack.start("controller")
    assert launch.result(timeout=30).worker.worker_id == manifest.worker_id
    assert set(stack.sandboxes()) == {manifest.worker_id}
    assert not stack.worker(manifest.worker_id).HasField("exit")


def _on_record(stack: Stack, worker_id: str) -> bool:
    try:
        return bool(stack.worker(worker_id).worker_id)
    except grpc.RpcError as error:
        if reason_of(error) != "WORKER_UNKNOWN":
            raise
        return False


def test_a_logger_that_is_away(own_stack: Stack) -> None:
    """Without the logger nothing is born, and nothing of the attempt is left."""
    stack = own_stack
    contract = stack.contract()
    manifest = stack.manifest(contract)
    stack.end("logger", signal.SIGKILL)
    from .test_orchestrator_launch import launch

    with pytest.raises(grpc.RpcError) as caught:
        launch(stack, manifest)
    assert reason_of(caught.value) in ("AUDIT_UNAVAILABLE", "SERVICE_UNAVAILABLE")
    assert stack.sandboxes() == {}
    stack.start("logger")
    until(lambda: _launches(stack))


def _launches(stack: Stack) -> bool:
    try:
        stack.stop(stack.launch())
    except grpc.RpcError:
        return False
    return True


@pytest.mark.layers("kill")
def test_a_name_that_is_taken(stack: Stack) -> None:
    """A second orchestrator under a known name does not start, and the first goes on."""
    process = subprocess.run(
        [
            sys.executable,
            *("-m", "hayflick_orchestrator", "--node-id", stack.node_id),
            *(
                "--listen",
                f"unix://{stack.directory}/second.sock",
                "--data-dir",
                str(stack.directory / "second"),
            ),
            *("--controller", stack.address("controller"), "--logger", stack.address("logger")),
        ],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert process.returncode == 1
    assert "holds the node name" in process.stderr
    stack.stop(stack.launch())


@pytest.mark.layers("uid-range")
def test_what_a_predecessor_left_is_cleared(own_stack: Stack) -> None:
    """When orchestrator and zygote are killed together, their successor clears what they left."""
    stack = own_stack
    worker = stack.launch()
    (uid,) = uids(stack, worker)
    orchestrator = stack.processes["orchestrator"].pid
    zygote = int(Path(f"/proc/{orchestrator}/task/{orchestrator}/children").read_text().split()[0])
    # Stopped first, so that it cannot clear up when it sees its orchestrator die.
    os.kill(zygote, signal.SIGSTOP)
    stack.end("orchestrator", signal.SIGKILL)
    os.kill(zygote, signal.SIGKILL)
    assert groups(f"{stack.node_id}/{worker.contract_id}")
    stack.start("orchestrator")
    assert processes_of(uid) == []
    assert not groups(f"{stack.node_id}/{worker.contract_id}")
    until(lambda: _launches(stack))
