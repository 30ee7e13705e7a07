"""The life of a manifest: issued, registered, refused."""

from __future__ import annotations

import asyncio
from typing import Any

from hayflick.v1 import controller_pb2 as pb
from hayflick.v1 import resources_pb2
from hayflick_rpc import wire


async def test_a_birth(bench: Any) -> None:
    """A manifest that was issued can be registered, and both are in the record before the answer."""
    contract = await bench.contract(expiration=60)
    node = await bench.node()
    manifest = await bench.issue(contract.contract_id, state_snapshot_json='{"task": 1}', reason="because")
    worker = await node.register(manifest)
    assert worker.worker_id == worker.root_id == manifest.worker_id
    assert worker.state == resources_pb2.STATE_STARTING
    assert worker.manifest == manifest
    assert wire.instant(worker.expire_time) > wire.instant(worker.create_time)
    events = await bench.events(contract_id=contract.contract_id)
    assert [event.event for event in events] == ["audit", "audit", "worker_registered"]
    assert events[1].details["decision"] == "replication_requested"
    assert events[1].details["reason"] == "because"
    assert events[2].details["node_id"] == node.node_id
    assert "task" not in str(events)


async def test_two_hundred_at_once(bench: Any, denied: Any) -> None:
    """Of 200 concurrent registrations under max_replicas=10 exactly 10 are admitted."""
    contract = await bench.contract(max_replicas=10)
    node = await bench.node()

    async def birth() -> bool:
        try:
            await bench.born(node, contract.contract_id)
        except Exception as error:
            assert error.reason_name == "REPLICA_QUOTA_EXCEEDED"  # type: ignore[attr-defined]
            return False
        return True

    assert sum(await asyncio.gather(*(birth() for _ in range(200)))) == 10
    read = await bench.stub.GetContract(pb.GetContractRequest(contract_id=contract.contract_id))
    assert (read.contract.active_count, read.contract.reserved_count) == (10, 0)
