"""Launching workers: what the host shows of them, and what is refused."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from hayflick.v1 import controller_pb2
from hayflick.v1 import orchestrator_pb2 as opb
from hayflick.v1.resources_pb2 import Manifest, NetworkPolicy, State

from .conftest import (
    MIB,
    Stack,
    command,
    duration,
    groups,
    reason_of,
    refused,
    request_id,
    running_stack,
    until,
)

NAMESPACES = ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup")


def launch(stack: Stack, manifest: Manifest, request: str | None = None) -> opb.LaunchWorkerResponse:
    """Launch with *manifest*."""
    return stack.orchestrator.LaunchWorker(
        opb.LaunchWorkerRequest(request_id=request or request_id(), manifest=manifest)
    )


def fields(text: str) -> dict[str, str]:
    """Return the fields of /proc/PID/status."""
    return dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)


def test_a_worker_runs_and_is_on_record(stack: Stack) -> None:
    """A launched worker runs at once, under the identity of its manifest, and the log has its birth."""
    worker = stack.launch()
    assert worker.state == State.STATE_RUNNING
    assert worker.manifest.state_snapshot_json == '{"job": "test"}'
    assert worker.worker_id in stack.sandboxes()
    assert {"worker_registered", "worker_started"} <= set(stack.events(worker.worker_id))
    stack.stop(worker)


@pytest.mark.root  #  who else may look into another user's process
def test_the_host_proves_the_confinement(stack: Stack) -> None:
    """Seen from the host, a worker has namespaces and a uid of its own, no capability, and filters."""
    worker = stack.launch()
    sandbox = stack.sandboxes()[worker.worker_id]
    proc = Path("/proc") / str(sandbox.host_pid)
    status = fields((proc / "status").read_text())
    assert set(status["Uid"].split()) == set(status["Gid"].split()) == {str(sandbox.host_uid)}
    assert sandbox.host_uid >= 100_000
    assert status["Groups"].split() in ([], [str(sandbox.host_uid)])
    assert (proc / "uid_map").read_text().split()[1:] == [str(sandbox.host_uid), "1"]
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert {int(status[f"Cap{kind}"], 16) for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {0}
    for name in NAMESPACES:
        assert (proc / "ns" / name).readlink() != Path(f"/proc/self/ns/{name}").readlink(), name
    limits = (proc / "limits").read_text()
    # 1 also stops a core_pattern that is a pipe; see core(5).
    assert re.search(r"Max core file size +1 +1 ", limits)
    assert sandbox.cgroup_path == f"{worker.contract_id}/{worker.worker_id}"
    membership = (proc / "cgroup").read_text()
    assert f"/hayflick/{stack.node_id}/{sandbox.cgroup_path}/self" in membership
    stack.stop(worker)


@pytest.mark.layers("memory", "cpu", "pids")
def test_limits_are_in_the_kernel(stack: Stack) -> None:
    """The limits of the manifest are what the worker's control groups say."""
    worker = stack.launch(cpu_millis=250, memory_limit_bytes=48 * MIB, pids_limit=9)
    path = f"{stack.node_id}/{stack.sandboxes()[worker.worker_id].cgroup_path}/self"
    found = {
        name: next((file.read_text().split() for file in groups(f"{path}/{name}")), None)
        for name in ("memory.limit_in_bytes", "memory.max", "cpu.cfs_quota_us", "cpu.max", "pids.max")
    }
    assert [str(48 * MIB)] in (found["memory.limit_in_bytes"], found["memory.max"])
    assert found["cpu.cfs_quota_us"] == ["25000"] or found["cpu.max"] == ["25000", "100000"]
    assert found["pids.max"] == ["10"]  # and its init
    stack.stop(worker)


@pytest.mark.layers("uid-range")
def test_every_worker_has_its_own_uid(stack: Stack) -> None:
    """No two live workers share a host user."""
    contract = stack.contract()
    workers = [stack.launch(contract) for _ in range(4)]
    uids = [stack.sandboxes()[worker.worker_id].host_uid for worker in workers]
    assert len(set(uids)) == len(uids)
    stack.kill(contract_id=contract)


@pytest.mark.root
def test_workers_uids_come_from_the_range_that_root_chose() -> None:
    """With --uid-range every worker's host user lies in it, and a range for people stops the start."""
    with running_stack(orchestrator={"uid-range": "3000000-3000015"}) as stack:
        worker = stack.launch()
        assert 3_000_000 <= stack.sandboxes()[worker.worker_id].host_uid <= 3_000_015
        stack.stop(worker)
    settings = {"node-id": "n", "data-dir": "/x", "uid-range": "1000-2000"}
    settings |= dict.fromkeys(("listen", "controller", "logger"), "unix:///x")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "hayflick_orchestrator",
            *(f"--{name}={text}" for name, text in settings.items()),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, "uid_range: 1000-2000" in done.stderr) == (2, True)


def test_lineage_is_a_cgroup_tree(stack: Stack) -> None:
    """A child's control group lies below its parent's, and the parent's end is the child's."""
    root = stack.launch()
    child = stack.launch(root.contract_id, root.worker_id)
    assert (
        stack.sandboxes()[child.worker_id].cgroup_path
        == f"{root.contract_id}/{root.worker_id}/{child.worker_id}"
    )
    ended = stack.stop(root, detail="done")
    assert ended.state == State.STATE_ENDED
    assert stack.end_reason(root.worker_id) == "COMPLETED"
    assert stack.end_reason(child.worker_id) == "KILLED"
    assert root.worker_id not in stack.sandboxes()
    assert child.worker_id not in stack.sandboxes()


def test_a_request_repeated_launches_once(stack: Stack) -> None:
    """The same request gets the same worker; the same manifest in another request gets none."""
    manifest = stack.manifest(stack.contract())
    once = request_id()
    first = launch(stack, manifest, once)
    assert launch(stack, manifest, once) == first
    with refused("MANIFEST_ALREADY_USED"):
        launch(stack, manifest)
    with refused("REQUEST_ID_REUSED"):
        launch(stack, stack.manifest(first.worker.contract_id), once)
    stack.stop(first.worker)


def test_a_manifest_after_its_worker_has_gone(stack: Stack) -> None:
    """A manifest is good for one worker, also when that worker has ended."""
    manifest = stack.manifest(stack.contract())
    worker = launch(stack, manifest).worker
    stack.stop(worker)
    with refused("MANIFEST_ALREADY_USED"):
        launch(stack, manifest)


def test_forged_manifests(stack: Stack) -> None:
    """A manifest that was edited in any field that matters starts nothing."""
    good = stack.manifest(stack.contract())
    before = set(stack.sandboxes())
    for name, value in {"depth": 1, "epoch": 9, "state_snapshot_json": "{}", "signature": b"x" * 32}.items():
        manifest = Manifest()
        manifest.CopyFrom(good)
        setattr(manifest, name, value)
        with refused("MANIFEST_SIGNATURE_INVALID"):
            launch(stack, manifest)
    manifest.CopyFrom(good)
    manifest.resources.memory_limit_bytes *= 2
    with refused("MANIFEST_SIGNATURE_INVALID"):
        launch(stack, manifest)
    assert set(stack.sandboxes()) == before


def test_bad_manifests(stack: Stack) -> None:
    """A manifest that is missing, or whose names could leave their place, is refused by field."""
    with refused("INVALID_FIELD"):
        stack.orchestrator.LaunchWorker(opb.LaunchWorkerRequest(request_id=request_id()))
    manifest = stack.manifest(stack.contract())
    manifest.worker_id = "../../../system.slice"
    with refused("INVALID_FIELD"):
        launch(stack, manifest)


def test_outside_network_is_not_pretended() -> None:
    """Where nothing can connect it, a worker that needs the outside network is refused with the remedy."""
    with running_stack(node_prefix=("/usr/bin/env", "PATH=/nowhere")) as stack:
        contract = stack.contract()
        with pytest.raises(grpc.RpcError) as caught:
            stack.launch(contract, network=NetworkPolicy(allow_external=True))
        assert reason_of(caught.value) == "LIMIT_NOT_ENFORCEABLE"
        assert "pasta is not installed" in str(caught.value)
        stack.launch(contract)  # and nothing else is missing


def test_a_failed_launch_gives_the_slot_back(stack: Stack) -> None:
    """A child whose parent ended meanwhile is refused, and its slot is free again."""
    contract = stack.contract(max_replicas=2)
    root = stack.launch(contract)
    manifest = stack.manifest(contract, root.worker_id)
    stack.stop(root)
    with refused("PARENT_UNKNOWN"):
        launch(stack, manifest)
    assert (
        stack.controller.GetContract(
            controller_pb2.GetContractRequest(contract_id=contract)
        ).contract.active_count
        == 0
    )
    stack.stop(stack.launch(contract))


def test_a_main_task_is_the_workers_life(stack: Stack) -> None:
    """A worker with a main task ends with it: completed when it succeeded, a task error when not."""
    for argv, reason in ((("true",), "COMPLETED"), (("false",), "TASK_ERROR")):
        manifest = stack.manifest(stack.contract())
        request = opb.LaunchWorkerRequest(
            request_id=request_id(), manifest=manifest, main_task=command(*argv)
        )
        worker = stack.orchestrator.LaunchWorker(request).worker
        assert stack.end_reason(worker.worker_id) == reason


def test_expiration_needs_nobody_to_ask(stack: Stack) -> None:
    """A worker ends when its contract says so, though nobody calls it, and later callers learn why."""
    worker = stack.launch(stack.contract(expiration=duration(0.5)))
    assert stack.end_reason(worker.worker_id) == "EXPIRED"
    with refused("WORKER_EXPIRED"):
        stack.run(worker, command("true"))


@pytest.mark.slow
def test_quota_under_a_storm(stack: Stack) -> None:
    """Of 200 launches at once against a quota of 10, exactly 10 workers come to live."""
    contract = stack.contract(max_replicas=10)

    def attempt(_: int) -> str:
        try:
            return stack.launch(contract).worker_id
        except grpc.RpcError as error:
            return reason_of(error)

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(attempt, range(200)))
    born = [answer for answer in answers if not answer.isupper()]
    assert len(born) == 10
    assert set(answers) - set(born) == {"REPLICA_QUOTA_EXCEEDED"}
    assert set(born) <= set(stack.sandboxes())
    assert len(stack.kill(contract_id=contract).worker_ids) == 10


def test_unknown_workers(stack: Stack) -> None:
    """Nothing can be asked of a worker that never was."""
    with refused("WORKER_UNKNOWN"):
        stack.orchestrator.StopWorker(opb.StopWorkerRequest(request_id=request_id(), worker_id="0" * 16))
    with refused("WORKER_UNKNOWN"):
        list(stack.orchestrator.RunTask(opb.RunTaskRequest(worker_id="0" * 16, task=command("true"))))


def test_an_ended_worker_does_nothing(stack: Stack) -> None:
    """A worker that ended takes no task; stopping it again says how it ended."""
    worker = stack.launch()
    ended = stack.stop(worker, detail="first")
    assert stack.stop(worker, detail="second").exit == ended.exit
    with refused("WORKER_NOT_RUNNING"):
        stack.run(worker, command("true"))


def test_get_node(stack: Stack) -> None:
    """A node says what it enforces, layer by layer."""
    node = stack.orchestrator.GetNode(opb.GetNodeRequest())
    assert node.node_id == stack.node_id
    assert {"seccomp", "memory", "cpu", "pids"} <= {layer.name for layer in node.layers}
    assert all(layer.enforced or layer.remedy for layer in node.layers)


def test_pages_of_sandboxes(stack: Stack) -> None:
    """Listing page by page finds every sandbox once, oldest first."""
    contract = stack.contract()
    workers = [stack.launch(contract).worker_id for _ in range(5)]
    found, token = [], ""
    while True:
        page = stack.orchestrator.ListSandboxes(opb.ListSandboxesRequest(page_size=2, page_token=token))
        found += [sandbox.worker.worker_id for sandbox in page.sandboxes]
        if not (token := page.next_page_token):
            break
    assert [worker for worker in found if worker in workers] == workers
    with refused("PAGE_TOKEN_INVALID"):
        stack.orchestrator.ListSandboxes(opb.ListSandboxesRequest(page_token="x"))
    stack.kill(contract_id=contract)


def test_an_init_that_is_killed_from_outside(stack: Stack) -> None:
    """A signal from outside ends the worker as that, with the signal on record."""
    worker = stack.launch()
    # A pid of our own sandbox, read from our own orchestrator.
    pid = stack.sandboxes()[worker.worker_id].host_pid
    until(lambda: Path(f"/proc/{pid}").exists())
    import os

    os.kill(pid, signal.SIGKILL)
    assert stack.end_reason(worker.worker_id) == "SIGNALED"
    assert stack.worker(worker.worker_id).exit.signal == signal.SIGKILL
