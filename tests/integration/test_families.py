"""What a family may use together, and that no child has more than its parent: as the kernel holds it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
import pytest

from hayflick.v1 import orchestrator_pb2 as opb
from hayflick.v1.resources_pb2 import FamilyBudget, NetworkPolicy, State
from hayflick_sandbox.bounds import LIMIT_FILES, limit_in

from .conftest import MIB, Stack, call, duration, groups, info_of, shell, until

if TYPE_CHECKING:
    from collections.abc import Callable


def in_force(stack: Stack, path: str) -> dict[str, int | None]:
    """Return the limits of a control group, by controller, as the kernel states them."""
    return {
        controller: limit_in(file.read_text())
        for (controller, _), name in LIMIT_FILES.items()
        for file in groups(f"{stack.node_id}/{path}/{name}")
    }


def refusal(launch: Callable[[], Any]) -> tuple[str, dict[str, str]]:
    """Return the reason and the metadata of what refuses *launch*."""
    with pytest.raises(grpc.RpcError) as caught:
        launch()
    info = info_of(caught.value)
    return info.reason, dict(info.metadata)


def hold(megabytes: int) -> Callable[[Any], None]:
    """Return a task that fills so much memory, says so, and keeps it."""

    def task(worker: Any) -> None:
        import time

        kept = bytearray(megabytes * 2**20)
        kept[::4096] = b"x" * len(kept[::4096])
        print("full", flush=True)
        time.sleep(60)

    return task


@pytest.mark.layers("memory", "cpu", "pids")
def test_a_budget_is_on_the_roots_own_control_group(stack: Stack) -> None:
    """The budget is one limit above the whole family; each member keeps its own below it."""
    budget = FamilyBudget(memory_limit_bytes=100 * MIB, cpu_millis=300, pids_limit=40)
    contract = stack.contract(family_budget=budget)
    root = stack.launch(contract, cpu_millis=1_000, memory_limit_bytes=64 * MIB, pids_limit=20)
    child = stack.launch(contract, root.worker_id, cpu_millis=200, memory_limit_bytes=32 * MIB)
    top = f"{contract}/{root.worker_id}"
    assert in_force(stack, top) == {"memory": 100 * MIB, "cpu": 30_000, "pids": 40}
    # No member has more CPU than its family.
    assert in_force(stack, f"{top}/self") == {"memory": 64 * MIB, "cpu": 30_000, "pids": 21}
    assert in_force(stack, f"{top}/{child.worker_id}/self") == {"memory": 32 * MIB, "cpu": 20_000, "pids": 21}
    assert in_force(stack, f"{top}/{child.worker_id}")["memory"] != 100 * MIB
    stack.stop(root)


@pytest.mark.layers("memory")
def test_a_family_that_is_over_its_memory_loses_a_member(stack: Stack) -> None:
    """Two members, each within its own limit, are together over the family's: one is killed, and told why."""
    contract = stack.contract(family_budget=FamilyBudget(memory_limit_bytes=120 * MIB))
    root = stack.launch(contract, memory_limit_bytes=100 * MIB)
    one, other = (stack.launch(contract, root.worker_id, memory_limit_bytes=100 * MIB) for _ in range(2))
    stranger = stack.launch(contract, memory_limit_bytes=100 * MIB)
    unharmed = stack.begin(stranger, call(hold(70)))
    filled = stack.begin(one, call(hold(60)))
    second = stack.orchestrator.RunTask(opb.RunTaskRequest(worker_id=other.worker_id, task=call(hold(70))))
    killed = until(lambda: {one.worker_id, other.worker_id} - set(stack.sandboxes()))
    assert len(killed) == 1
    (victim,) = killed
    assert stack.end_reason(victim) == "OOM_KILLED"
    assert "family budget" in stack.worker(victim).exit.detail
    assert {root.worker_id, stranger.worker_id} <= set(stack.sandboxes())
    for stream in (filled, second, unharmed):
        stream.cancel()
    stack.kill(contract_id=contract)


@pytest.mark.layers("memory")
def test_a_member_over_its_own_memory_is_not_the_familys_doing(stack: Stack) -> None:
    """Within a budget that is not used up, a worker that is over its own limit is told so."""
    contract = stack.contract(family_budget=FamilyBudget(memory_limit_bytes=500 * MIB))
    worker = stack.launch(contract, memory_limit_bytes=48 * MIB)
    assert stack.run(worker, call(hold(80))).outcome == "OOM_KILLED"
    assert stack.end_reason(worker.worker_id) == "OOM_KILLED"
    assert "family" not in stack.worker(worker.worker_id).exit.detail
    stack.kill(contract_id=contract)


@pytest.mark.layers("pids")
def test_a_family_shares_its_processes(stack: Stack) -> None:
    """What one member's processes take from the budget is not there for another's."""
    contract = stack.contract(family_budget=FamilyBudget(pids_limit=24))
    root = stack.launch(contract, pids_limit=20)
    child = stack.launch(contract, root.worker_id, pids_limit=20)
    crowd = "for i in $(seq 16); do sleep 60 & done; echo up; wait"
    stream = stack.begin(root, shell(crowd))
    ran = stack.run(
        child, shell("for i in 1 2 3 4 5 6 7 8; do sleep 9 & done; echo all", timeout=20), keep=True
    )
    assert ran.stdout != b"all\n"
    assert b"fork" in ran.stderr
    stream.cancel()
    stack.kill(contract_id=contract)


def test_a_family_ends_with_its_time(stack: Stack) -> None:
    """At the end of the family's time its members end as expired, those born late as well."""
    contract = stack.contract(family_budget=FamilyBudget(wall_time_limit=duration(1.0)))
    root = stack.launch(contract)
    child = stack.launch(contract, root.worker_id)
    assert stack.end_reason(root.worker_id) == "EXPIRED"
    assert stack.end_reason(child.worker_id) in ("EXPIRED", "KILLED")


@pytest.mark.layers("pids")
def test_a_default_of_the_node_is_the_parents_limit_too(stack: Stack) -> None:
    """A parent that named no limit has its node's; the kernel's facts show that its child wants more."""
    contract = stack.contract()
    root = stack.launch(contract)
    for wanted, field, limit in (
        ({"pids_limit": 200}, "cgroup.pids", "129"),
        ({"open_files_limit": 1_000}, "rlimit.Max open files", "256"),
        ({"tmp_limit_bytes": 65 * MIB}, "size.tmp_bytes", str(64 * MIB)),
    ):
        manifest_refused = refusal(lambda wanted=wanted: stack.launch(contract, root.worker_id, **wanted))
        assert manifest_refused == ("EXCEEDS_PARENT", {"field": field, "limit": limit})
    # Nothing of them is left, and less is good.
    assert list(stack.sandboxes()).count(root.worker_id) == 1
    assert not groups(f"{stack.node_id}/{contract}/{root.worker_id}/*/self")
    child = stack.launch(contract, root.worker_id, pids_limit=100, open_files_limit=100)
    assert child.state == State.STATE_RUNNING
    stack.kill(contract_id=contract)


def test_a_child_is_granted_no_licence_that_its_parent_lacks(stack: Stack) -> None:
    """The controller refuses a licence that the parent has not got, before there is anything to compare."""
    contract = stack.contract()
    root = stack.launch(contract)
    wider = NetworkPolicy(allow_controller=True, allow_loopback=True)
    expected = {"field": "resources.network.allow_loopback", "limit": "false"}
    assert refusal(lambda: stack.launch(contract, root.worker_id, network=wider)) == (
        "EXCEEDS_PARENT",
        expected,
    )
    stack.stop(root)
