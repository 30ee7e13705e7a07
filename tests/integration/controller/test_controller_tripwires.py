"""What a controller makes of a node's report that a tripwire froze workers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from hayflick.v1 import controller_pb2 as pb
from hayflick.v1 import resources_pb2
from hayflick.v1.resources_pb2 import DenialClass, DenialCount


def report(worker: Any, frozen: Any, **fields: Any) -> pb.ConnectNodeRequest:
    """Return a report that *worker* had *frozen* frozen."""
    denials = [DenialCount(denial_class=DenialClass.DENIAL_CLASS_MOUNTS, count=3)]
    wanted = {"tripwire": "three", "denials": denials, **fields}
    tripped = pb.TripwireReport(worker_id=worker.worker_id, frozen_worker_id=frozen.worker_id, **wanted)
    return pb.ConnectNodeRequest(tripped=tripped)


async def state_becomes(bench: Any, worker: Any, state: int) -> None:
    """Wait until the controller records *worker* in *state*."""
    async with asyncio.timeout(10):
        # The record gives no event to wait for.
        while (await bench.worker(worker.worker_id)).state != state:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_report_becomes_a_quarantine(bench: Any, request_id: Any, denied: Any) -> None:
    """A report becomes a quarantine like any other, recorded once however often it comes."""
    contract = await bench.contract()
    node = await bench.node()
    root = await bench.born(node, contract.contract_id)
    child = await bench.born(node, contract.contract_id, root.worker_id)
    await node.beat()
    for count in (1, 2, 3):
        await node.send(report(child, root))
        (*_, order) = await node.wait_order("freeze", count)
        assert order.freeze.worker_id == root.worker_id
    for one in (root, child):
        await state_becomes(bench, one, resources_pb2.STATE_QUARANTINED)
    refusal = await denied(bench.issue(contract.contract_id, child.worker_id))
    assert refusal.reason_name == "QUARANTINED"
    assert (await bench.decisions(contract.contract_id)).count("quarantined") == 1
    (event,) = [
        one
        for one in await bench.events(worker_id=root.worker_id)
        if one.details.fields["decision"].string_value == "quarantined"
    ]
    assert event.details["reason"] == "tripwire three: mounts 3"
    assert event.details["actor"] == f"node {node.node_id}"
    release = pb.ReleaseQuarantineRequest(request_id=request_id(), worker_id=root.worker_id, reason="fine")
    await bench.ask(bench.stub.ReleaseQuarantine(release))
    await state_becomes(bench, child, resources_pb2.STATE_RUNNING)
    # Released, it can trip again.
    node.carry_out = lambda order: pb.OrderResult(worker_ids=[order.freeze.worker_id])
    await node.send(report(child, child))
    await state_becomes(bench, child, resources_pb2.STATE_QUARANTINED)
    assert (await bench.worker(root.worker_id)).state == resources_pb2.STATE_RUNNING


async def test_a_node_quarantines_its_own_workers_alone(bench: Any) -> None:
    """A report about another node's worker, an unknown one, or one that is no ancestor changes nothing."""
    contract = await bench.contract()
    node, other = await bench.node(), await bench.node()
    mine = await bench.born(node, contract.contract_id)
    mine_too = await bench.born(node, contract.contract_id)
    theirs = await bench.born(other, contract.contract_id)
    node.carry_out = lambda order: pb.OrderResult(worker_ids=[order.freeze.worker_id])
    for frozen in (theirs, mine_too, resources_pb2.Worker(worker_id="nobody")):
        await node.send(report(mine, frozen))
    await node.send(report(theirs, theirs))
    await node.send(report(theirs, mine))
    await node.send(report(mine, mine))  # which is right, and taken after the others
    await state_becomes(bench, mine, resources_pb2.STATE_QUARANTINED)
    assert (await bench.decisions(contract.contract_id)).count("quarantined") == 1
    for one in (mine_too, theirs):
        assert (await bench.worker(one.worker_id)).state != resources_pb2.STATE_QUARANTINED


@pytest.mark.parametrize(
    "fields", [{"tripwire": ""}, {"tripwire": "x" * 65}, {"denials": [DenialCount()] * 12}]
)
async def test_a_malformed_report_ends_the_stream(bench: Any, fields: dict[str, Any]) -> None:
    """A node that sends what no node sends is cut off."""
    contract = await bench.contract()
    node = await bench.node()
    worker = await bench.born(node, contract.contract_id)
    await node.send(report(worker, worker, **fields))
    await node.wait_closed()
    assert (await bench.worker(worker.worker_id)).state != resources_pb2.STATE_QUARANTINED
