"""What nodes attest: kept and shown, and believed only when it verifies and is enough."""

from __future__ import annotations

from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hayflick.v1 import controller_pb2 as pb
from hayflick.v1 import resources_pb2
from hayflick_rpc import attestation

KEY = Ed25519PrivateKey.generate()
PUBLIC = KEY.public_key().public_bytes_raw()
FLOOR_B = [resources_pb2.GradeFloor(min_grade=resources_pb2.ISOLATION_GRADE_B)]


def attested(
    worker_id: str, grade: str, key: Ed25519PrivateKey = KEY
) -> dict[str, resources_pb2.Attestation]:
    """Return what a node would say of a worker."""
    message = resources_pb2.Attestation(
        grade=attestation.grade_of(grade),
        probes=[resources_pb2.ProbeResult(name="clone3", held=True, seen="ENOSYS")],
        kernel_release="6.18.0",
        landlock_abi=7,
        seccomp_sha256="00",
    )
    message.attest_time.GetCurrentTime()
    attestation.sign(message, worker_id, key)
    return {worker_id: message}


async def refusals(bench: Any, contract_id: str) -> list[Any]:
    """Return what was recorded of workers that were not held well enough."""
    events = await bench.events(contract_id=contract_id, events=["audit"])
    return [event.details for event in events if event.details["decision"] == "isolation_refused"]


async def test_an_attestation_is_kept(bench: Any) -> None:
    """A worker shows what its node found: all of it when asked for alone, without the checks in a list."""
    contract = await bench.contract(grade_floors=FLOOR_B)
    node = await bench.node(public_key=PUBLIC)
    worker = await bench.born(node, contract.contract_id)
    told = attested(worker.worker_id, "A")
    await node.beat(attested=told)
    await bench.controller.nodes.settle()
    assert (await bench.worker(worker.worker_id)).attestation == told[worker.worker_id]
    listed = await bench.ask(bench.stub.ListWorkers(pb.ListWorkersRequest(contract_id=contract.contract_id)))
    (shown,) = listed.workers
    assert shown.attestation.grade == resources_pb2.ISOLATION_GRADE_A
    assert shown.attestation.signature == told[worker.worker_id].signature
    assert not shown.attestation.probes
    await node.beat()  # further beats say nothing of it, and it stays
    await bench.controller.nodes.settle()
    running = await bench.worker(worker.worker_id)
    assert running.state == resources_pb2.STATE_RUNNING
    assert running.attestation == told[worker.worker_id]


@pytest.mark.parametrize(
    ("grade", "key", "cause"),
    [("C", KEY, "grade"), ("A", Ed25519PrivateKey.generate(), "signature"), (None, KEY, "absent")],
)
async def test_too_little_is_not_enough(bench: Any, grade: str | None, key: Any, cause: str) -> None:
    """A worker whose node attests too little, not at all, or with another's key, is ended, on record."""
    contract = await bench.contract(grade_floors=FLOOR_B)
    node = await bench.node(public_key=PUBLIC)
    worker = await bench.born(node, contract.contract_id)
    await node.beat(attested=None if grade is None else attested(worker.worker_id, grade, key))
    (order,) = await node.wait_order("kill")
    assert order.kill.worker_ids == [worker.worker_id]
    ended = await bench.ended(worker.worker_id)
    assert ended.exit.reason == resources_pb2.END_REASON_KILLED
    assert ended.exit.detail == f"isolation: {cause}"
    assert await bench.recorded(contract.contract_id, "isolation_refused")
    (found,) = await refusals(bench, contract.contract_id)
    assert (found["cause"], found["min_grade"], found["node_id"]) == (cause, "B", node.node_id)


async def test_floors_are_by_generation(bench: Any) -> None:
    """What is enough for a root may be too little for its child."""
    floors = [resources_pb2.GradeFloor(from_depth=1, min_grade=resources_pb2.ISOLATION_GRADE_A)]
    contract = await bench.contract(grade_floors=floors)
    node = await bench.node(public_key=PUBLIC)
    root = await bench.born(node, contract.contract_id)
    child = await bench.born(node, contract.contract_id, root.worker_id)
    await node.beat(attested={**attested(root.worker_id, "C"), **attested(child.worker_id, "B")})
    assert (await bench.ended(child.worker_id)).exit.detail == "isolation: grade"
    assert (await bench.worker(root.worker_id)).state == resources_pb2.STATE_RUNNING


async def test_a_contract_that_asks_for_nothing(bench: Any) -> None:
    """Without a floor, a node that attests nothing may run workers, but none that holds no grade at all."""
    contract = await bench.contract()
    node = await bench.node(public_key=PUBLIC)
    silent = await bench.born(node, contract.contract_id)
    holed = await bench.born(node, contract.contract_id)
    await node.beat(attested=attested(holed.worker_id, ""))
    assert (await bench.ended(holed.worker_id)).exit.detail == "isolation: grade"
    assert (await bench.worker(silent.worker_id)).state == resources_pb2.STATE_RUNNING


async def test_another_workers_attestation(bench: Any) -> None:
    """What was found of one worker says nothing of another."""
    contract = await bench.contract()
    node = await bench.node(public_key=PUBLIC)
    one = await bench.born(node, contract.contract_id)
    two = await bench.born(node, contract.contract_id)
    (message,) = attested(one.worker_id, "A").values()
    await node.beat(attested={one.worker_id: message, two.worker_id: message})
    assert (await bench.ended(two.worker_id)).exit.detail == "isolation: signature"
    assert (await bench.worker(one.worker_id)).attestation == message


async def test_the_key_is_on_record(bench: Any, denied: Any) -> None:
    """Each connection records the key that verifies what the node attests; it is 32 bytes or none."""
    node = await bench.node(public_key=PUBLIC)
    contract = await bench.contract()
    await bench.recorded(contract.contract_id, "contract_created")
    events = await bench.events(events=["node_connected"])
    (event,) = [one for one in events if one.details["node_id"] == node.node_id]
    assert event.details["attestation_public_key"] == PUBLIC.hex()
    assert event.details["attestation_key_id"] == attestation.key_id(PUBLIC)
    refusal = await denied(bench.node(public_key=b"short"))
    assert refusal.metadata["field"] == "hello.attestation_public_key"
