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
