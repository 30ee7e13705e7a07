"""What a contract says about containment: kept, told to nodes, held by the controller's own rules."""

from __future__ import annotations

from typing import Any

from hayflick.v1 import controller_pb2 as pb
from hayflick.v1 import resources_pb2
from hayflick_rpc import wire

TERMS: dict[str, Any] = {
    "grade_floors": [
        resources_pb2.GradeFloor(min_grade=resources_pb2.ISOLATION_GRADE_C),
        resources_pb2.GradeFloor(from_depth=1, min_grade=resources_pb2.ISOLATION_GRADE_A),
    ],
    "family_budget": resources_pb2.FamilyBudget(memory_limit_bytes=2**30, pids_limit=64),
    "tripwires": [resources_pb2.Tripwire(name="t", count=3, window=wire.duration(10))],
}


def rendered(contract: resources_pb2.Contract) -> dict[str, Any]:
    """Return the terms of *contract* in the form in which they were given."""
    wires = [
        resources_pb2.Tripwire(name=one.name, count=one.count, window=one.window)
        for one in contract.tripwires
        if one.scope == resources_pb2.TRIPWIRE_SCOPE_WORKER
    ]
    return {
        "grade_floors": list(contract.grade_floors),
        "family_budget": contract.family_budget,
        "tripwires": wires,
    }


async def test_terms_are_kept_over_a_restart(bench: Any) -> None:
    """What a contract says about containment is what it says after the controller was started anew."""
    contract = await bench.contract(**TERMS)
    assert rendered(contract) == TERMS
    await bench.stop()
    await bench.start()
    kept = await bench.ask(bench.stub.GetContract(pb.GetContractRequest(contract_id=contract.contract_id)))
    assert rendered(kept.contract) == TERMS


async def test_a_node_is_told_the_terms_of_each_generation(bench: Any) -> None:
    """With each birth comes what the node must hold the worker to, and again with a repeated request."""
    contract = await bench.contract(max_depth=2, max_replicas=5, **TERMS)
    node = await bench.node()
    root = await node.register(await bench.issue(contract.contract_id))
    manifest = await bench.issue(contract.contract_id, root.worker_id)
    child = await node.register(manifest, "birth-of-the-child")
    of_root, of_child = node.terms[root.worker_id], node.terms[child.worker_id]
    assert (of_root.max_replicas, of_root.max_depth) == (5, 2)
    assert of_root.family_budget == TERMS["family_budget"]
    assert [one.name for one in of_root.tripwires] == ["t"]
    assert of_root.min_grade == resources_pb2.ISOLATION_GRADE_C
    assert of_child.min_grade == resources_pb2.ISOLATION_GRADE_A
    del node.terms[child.worker_id]
    await node.register(manifest, "birth-of-the-child")
    assert node.terms[child.worker_id] == of_child


async def test_a_contract_without_terms_asks_for_nothing_more(bench: Any) -> None:
    """Its population and depth are told; no grade, no budget and no tripwire is made up."""
    contract = await bench.contract()
    node = await bench.node()
    root = await node.register(await bench.issue(contract.contract_id))
    assert node.terms[root.worker_id] == pb.ContractTerms(max_replicas=10, max_depth=3)


LIMITS = {"cpu_millis": 500, "memory_limit_bytes": 64 * 2**20}


async def test_a_family_spawns_as_often_as_its_budget_says(bench: Any, denied: Any) -> None:
    """Births below a root count over its whole life: promised ones, and those of workers that ended."""
    budget = resources_pb2.FamilyBudget(max_spawns=3)
    contract = await bench.contract(family_budget=budget, max_replicas=20)
    node = await bench.node()
    root = await node.register(await bench.issue(contract.contract_id))
    sister = await node.register(await bench.issue(contract.contract_id))
    child = await node.register(await bench.issue(contract.contract_id, root.worker_id))
    grandchild = await node.register(await bench.issue(contract.contract_id, child.worker_id))
    await node.deregister(grandchild.worker_id)
    promised = await bench.issue(contract.contract_id, root.worker_id)
    refusal = await denied(bench.issue(contract.contract_id, child.worker_id))
    assert refusal.reason_name == "FAMILY_BUDGET_EXCEEDED"
    expected = {"field": "family_budget.max_spawns", "limit": "3", "root_id": root.worker_id}
    assert refusal.metadata == expected
    # Another family has a budget of its own, and a birth that failed cost nothing.
    await node.register(await bench.issue(contract.contract_id, sister.worker_id))
    stillborn = await node.register(promised)
    assert (await denied(bench.issue(contract.contract_id, root.worker_id))).metadata == expected
    await node.deregister(stillborn.worker_id, "LAUNCH_FAILED")
    await node.register(await bench.issue(contract.contract_id, root.worker_id))
    assert "deny_family_budget" in await bench.decisions(contract.contract_id)


async def test_a_family_ends_when_its_time_is_over(bench: Any) -> None:
    """No descendant lives longer than its root may, however late it is born or long its own life is."""
    budget = resources_pb2.FamilyBudget(wall_time_limit=wire.duration(60))
    contract = await bench.contract(family_budget=budget, expiration=50)
    node = await bench.node()
    root = await node.register(await bench.issue(contract.contract_id))
    child = await node.register(await bench.issue(contract.contract_id, root.worker_id))
    born, ends = wire.instant(root.create_time), wire.instant(root.expire_time)
    assert (ends - born).total_seconds() == 50
    assert (wire.instant(child.expire_time) - wire.instant(child.create_time)).total_seconds() == 50
    long = await bench.contract(family_budget=budget, expiration=3_600)
    root = await node.register(await bench.issue(long.contract_id))
    child = await node.register(await bench.issue(long.contract_id, root.worker_id))
    end = wire.instant(root.expire_time)
    assert (end - wire.instant(root.create_time)).total_seconds() == 60
    assert wire.instant(child.expire_time) == end


async def test_a_child_gets_what_it_leaves_out_from_its_parent(bench: Any) -> None:
    """The manifest of a child that names two limits states all that its parent's does."""
    contract = await bench.contract()
    node = await bench.node()
    own = resources_pb2.Resources(
        **LIMITS, pids_limit=9, tmp_limit_bytes=4_096, cpu_time_limit=wire.duration(5), output_limit_bytes=99
    )
    root = await node.register(await bench.issue(contract.contract_id, resources=own))
    child = await bench.issue(
        contract.contract_id, root.worker_id, resources=resources_pb2.Resources(**LIMITS)
    )
    assert child.resources.pids_limit == 9
    assert child.resources.tmp_limit_bytes == 4_096
    assert child.resources.output_limit_bytes == 99
    assert child.resources.cpu_time_limit == wire.duration(5)
    assert child.resources.open_files_limit == 0


async def test_a_child_that_wants_more_than_its_parent_has_is_refused(bench: Any, denied: Any) -> None:
    """The refusal names the field and the parent's limit, and the record keeps it."""
    contract = await bench.contract()
    node = await bench.node()
    own = resources_pb2.Resources(**LIMITS, network={"allow_controller": True})
    root = await node.register(await bench.issue(contract.contract_id, resources=own))
    more = resources_pb2.Resources(**{**LIMITS, "cpu_millis": 501})
    refusal = await denied(bench.issue(contract.contract_id, root.worker_id, resources=more))
    assert refusal.reason_name == "EXCEEDS_PARENT"
    assert refusal.metadata == {"field": "resources.cpu_millis", "limit": "500"}
    wider = resources_pb2.Resources(**LIMITS, network={"allow_loopback": True})
    refusal = await denied(bench.issue(contract.contract_id, root.worker_id, resources=wider))
    assert refusal.metadata == {"field": "resources.network.allow_loopback", "limit": "false"}
    assert (await bench.decisions(contract.contract_id)).count("deny_exceeds_parent") == 2
