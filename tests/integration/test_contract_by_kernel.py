"""The contract, decided a second time: what the kernel holds when nobody else does."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from hayflick.v1 import orchestrator_pb2 as opb
from hayflick.v1.resources_pb2 import NetworkPolicy

from .conftest import MIB, Stack, groups, info_of, refused, request_id, running_stack, until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.layers("kill")  # the kernel counts cgroups


def unified(stack: Stack, path: str) -> Path:
    """Return a control group of a node in the version 2 hierarchy."""
    (found,) = [one for one in groups(f"{stack.node_id}/{path}") if (one / "cgroup.kill").exists()]
    return found


class TurnedStack(Stack):
    """A stack whose controller allows everything."""

    def program(self, name: str) -> list[str]:
        """Run the turned controller, and every other service as it is."""
        turned = str(Path(__file__).with_name("yes_controller.py"))
        return [turned] if name == "controller" else super().program(name)


@pytest.fixture(scope="module")
def turned() -> Iterator[Stack]:
    """A stack whose controller allows everything."""
    with running_stack(TurnedStack) as running:
        yield running


def pid_namespaces(stack: Stack, contract_id: str) -> set[str]:
    """Return the pid namespaces in which processes of a contract live, as the host sees them."""
    top = unified(stack, contract_id)
    pids = [pid for file in top.rglob("cgroup.procs") for pid in file.read_text().split()]
    return {str(Path(f"/proc/{pid}/ns/pid").readlink()) for pid in pids}


def refusal(stack: Stack, contract_id: str, parent_id: str = "") -> tuple[str, dict[str, str]] | None:
    """Launch a worker; return the reason and metadata of the refusal, if it was one."""
    try:
        stack.launch(contract_id, parent_id)
    except grpc.RpcError as error:
        info = info_of(error)
        return info.reason, dict(info.metadata)
    return None


@pytest.mark.root  # who else may look into another user's process
def test_a_turned_controller_cannot_exceed_the_population(turned: Stack) -> None:
    """Of many births at once that the controller allows, the kernel makes as many as the contract says."""
    contract = turned.contract(max_replicas=3)
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda _: refusal(turned, contract), range(10)))
    held = [answer for answer in answers if answer is not None]
    assert held == [("HELD_BY_KERNEL", {"limit": "max_replicas"})] * 7
    assert len(pid_namespaces(turned, contract)) == 3
    # A place that was left is free again, and only that one.
    living = [one.worker for one in turned.sandboxes().values() if one.worker.contract_id == contract]
    assert len(living) == 3
    turned.stop(living[0])
    assert refusal(turned, contract) is None
    assert refusal(turned, contract) == ("HELD_BY_KERNEL", {"limit": "max_replicas"})
    assert len(pid_namespaces(turned, contract)) == 3
    turned.kill(contract_id=contract)


@pytest.mark.root  # who else may look into another user's process
def test_a_turned_controller_cannot_exceed_the_depth(turned: Stack) -> None:
    """A generation deeper than the contract allows is born nowhere, though the controller allowed it."""
    contract = turned.contract(max_replicas=10, max_depth=1)
    root = turned.launch(contract)
    child = turned.launch(contract, root.worker_id)
    assert refusal(turned, contract, child.worker_id) == ("HELD_BY_KERNEL", {"limit": "max_depth"})
    assert len(pid_namespaces(turned, contract)) == 2
    # What was begun for it counts for nothing: eight more fit, and no ninth.
    others = [refusal(turned, contract, root.worker_id) for _ in range(9)]
    assert others == [*[None] * 8, ("HELD_BY_KERNEL", {"limit": "max_replicas"})]
    turned.kill(contract_id=contract)


def test_what_the_kernel_held_is_on_record(turned: Stack) -> None:
    """A birth that the kernel refused is told to the controller as over, and the log says who refused."""
    contract = turned.contract(max_replicas=1)
    turned.launch(contract)
    manifest = turned.manifest(contract)
    request = opb.LaunchWorkerRequest(request_id=request_id(), manifest=manifest)
    with pytest.raises(grpc.RpcError):
        turned.orchestrator.LaunchWorker(request)
    assert turned.end_reason(manifest.worker_id) == "LAUNCH_FAILED"
    assert turned.recorded(manifest.worker_id, "deny_held_by_kernel")["limit"] == "max_replicas"
    turned.kill(contract_id=contract)


def test_the_limits_are_the_contracts(stack: Stack) -> None:
    """Two control groups for each worker, and one level for each generation, are what the kernel allows."""
    contract = stack.contract(max_replicas=5, max_depth=2)
    root = stack.launch(contract)
    child = stack.launch(contract, root.worker_id)
    top = unified(stack, contract)
    assert (top / "cgroup.max.descendants").read_text() == "10\n"
    assert (top / "cgroup.max.depth").read_text() == "4\n"
    assert {str(path.relative_to(top)) for path in top.rglob("*") if path.is_dir()} == {
        root.worker_id,
        f"{root.worker_id}/self",
        f"{root.worker_id}/{child.worker_id}",
        f"{root.worker_id}/{child.worker_id}/self",
    }
    stack.kill(contract_id=contract)


def test_no_slot_is_given_back_while_its_place_is_held(stack: Stack) -> None:
    """As long as a control group of a dead worker cannot be removed, the controller counts the worker."""
    contract = stack.contract(max_replicas=1)
    worker = stack.launch(contract)
    place = unified(stack, f"{contract}/{worker.worker_id}")
    legacy = [one for one in groups(f"{stack.node_id}/{contract}/{worker.worker_id}") if one != place]
    if not legacy:
        pytest.skip("on this host every hierarchy obeys cgroup.kill")
    group = legacy[0]
    # cgroup.kill reaches the version 2 hierarchy alone.
    with subprocess.Popen(["/bin/sleep", "60"]) as holder, ThreadPoolExecutor(1) as pool:
        try:
            (group / "self/cgroup.procs").write_text(str(holder.pid))
            stopped = pool.submit(stack.stop, worker)
            until(lambda: not place.exists())
            with refused("REPLICA_QUOTA_EXCEEDED"):
                stack.manifest(contract)
            assert group.exists()
        finally:
            holder.kill()
    assert stopped.result().HasField("exit")
    assert not group.exists()
    stack.stop(stack.launch(contract))


def test_a_place_is_free_before_its_slot_is(stack: Stack) -> None:
    """Over hundreds of births and ends in a full contract, the kernel refuses nothing that was allowed."""
    contract = stack.contract(max_replicas=3)

    def live(_: int) -> list[tuple[str, dict[str, str]]]:
        held, born = [], 0
        while born < 40:
            try:
                # More want to live than may, so a slot is taken the moment it is given back.
                manifest = stack.manifest(contract)
            except grpc.RpcError as error:
                if info_of(error).reason != "REPLICA_QUOTA_EXCEEDED":
                    raise
                continue
            try:
                request = opb.LaunchWorkerRequest(request_id=request_id(), manifest=manifest)
                stack.stop(stack.orchestrator.LaunchWorker(request).worker)
            except grpc.RpcError as error:
                info = info_of(error)
                held.append((info.reason, dict(info.metadata)))
            born += 1
        return held

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(live, range(6))) == [[]] * 6


@pytest.mark.parametrize(
    ("wanted", "field"),
    [
        ({"memory_limit_bytes": 65 * MIB}, "cgroup.memory"),
        ({"cpu_millis": 1_001}, "cgroup.cpu"),
        ({"network": NetworkPolicy(allow_controller=True, allow_loopback=True)}, "seccomp.inet"),
    ],
)
def test_a_turned_controller_cannot_widen_a_child(turned: Stack, wanted: dict[str, Any], field: str) -> None:
    """A child that would hold more than its parent is undone by its node, though it was allowed."""
    contract = turned.contract()
    root = turned.launch(contract)
    manifest = turned.manifest(contract, root.worker_id, **wanted)
    request = opb.LaunchWorkerRequest(request_id=request_id(), manifest=manifest)
    with pytest.raises(grpc.RpcError) as caught:
        turned.orchestrator.LaunchWorker(request)
    info = info_of(caught.value)
    assert (info.reason, info.metadata["field"]) == ("EXCEEDS_PARENT", field)
    assert turned.end_reason(manifest.worker_id) == "LAUNCH_FAILED"
    assert turned.recorded(manifest.worker_id, "deny_exceeds_parent")["field"] == field
    assert len(pid_namespaces(turned, contract)) == 1
    turned.kill(contract_id=contract)
