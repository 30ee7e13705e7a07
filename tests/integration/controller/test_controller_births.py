"""The life of a manifest: issued, registered, refused."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from hayflick.v1 import controller_pb2 as pb
from hayflick.v1 import resources_pb2
from hayflick_rpc import wire
from hayflick_rpc.clock import SteadyClock


class Clock:
    """The real time, which a test can move forward."""

    def __init__(self) -> None:
        self.ahead_us = 0
        self._real = SteadyClock()

    def __call__(self) -> int:
        return self._real() + self.ahead_us

    def forward(self, seconds: float) -> None:
        """Let *seconds* pass."""
        self.ahead_us += round(seconds * 1_000_000)


@pytest.fixture
def clock(bench: Any) -> Clock:
    """A clock that everything in the controller reads."""
    clock = Clock()
    controller = bench.controller
    for part in (controller, controller.births, controller.nodes, controller.deaths, controller.kill_switch):
        name = "clock" if part is controller else "_clock"
        setattr(part, name, clock)
    return clock


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
    assert await bench.worker(worker.worker_id) == worker
    events = await bench.events(contract_id=contract.contract_id)
    assert [event.event for event in events] == ["audit", "audit", "worker_registered"]
    assert events[1].details["decision"] == "replication_requested"
    assert events[1].details["reason"] == "because"
    assert events[2].details["node_id"] == node.node_id
    assert '"task"' not in str(events)


async def test_a_child_inherits(bench: Any) -> None:
    """A child has its parent's resources where it asks for none, its root, and its depth plus one."""
    contract = await bench.contract()
    node = await bench.node()
    root = await bench.born(node, contract.contract_id)
    child = await node.register(await bench.issue(contract.contract_id, root.worker_id, depth=77))
    grandchild = await bench.born(node, contract.contract_id, child.worker_id)
    assert (child.depth, child.root_id, child.parent_id) == (1, root.worker_id, root.worker_id)
    assert child.resources == root.resources
    family = await bench.stub.GetLineage(pb.GetLineageRequest(worker_id=child.worker_id))
    assert [worker.worker_id for worker in family.ancestors] == [root.worker_id]
    assert family.worker.worker_id == child.worker_id
    assert [worker.worker_id for worker in family.descendants] == [grandchild.worker_id]


async def test_two_hundred_at_once(bench: Any) -> None:
    """Of 200 concurrent births under max_replicas=10 exactly 10 are admitted."""
    contract = await bench.contract(max_replicas=10)
    node = await bench.node()
    births = [bench.born(node, contract.contract_id) for _ in range(200)]
    outcomes = await asyncio.gather(*births, return_exceptions=True)
    refused = [outcome.reason_name for outcome in outcomes if isinstance(outcome, Exception)]
    assert refused == ["REPLICA_QUOTA_EXCEEDED"] * 190
    read = await bench.stub.GetContract(pb.GetContractRequest(contract_id=contract.contract_id))
    assert (read.contract.active_count, read.contract.reserved_count) == (10, 0)
    assert (await bench.decisions(contract.contract_id)).count("deny_quota") == 190


async def test_two_hundred_registrations_of_ten_manifests(bench: Any) -> None:
    """Of 200 concurrent registrations of the 10 manifests that a quota allows, each manifest wins once."""
    contract = await bench.contract(max_replicas=10)
    node = await bench.node()
    manifests = [await bench.issue(contract.contract_id) for _ in range(10)]
    outcomes = await asyncio.gather(*map(node.register, manifests * 20), return_exceptions=True)
    refused = [outcome.reason_name for outcome in outcomes if isinstance(outcome, Exception)]
    assert refused == ["MANIFEST_ALREADY_USED"] * 190


async def test_hole_quota(bench: Any, denied: Any) -> None:
    """Manifests issued ahead cannot pass the quota: each reserves a slot when it is issued."""
    contract = await bench.contract(max_replicas=2)
    await bench.node()
    await bench.issue(contract.contract_id)
    await bench.issue(contract.contract_id)
    refusal = await denied(bench.issue(contract.contract_id))
    assert refusal.reason_name == "REPLICA_QUOTA_EXCEEDED"
    assert refusal.metadata == {"max_replicas": "2", "active_count": "0", "reserved_count": "2"}


async def test_hole_kill_switch(bench: Any, denied: Any) -> None:
    """A manifest issued before a kill can be registered neither under it nor after its release."""
    contract = await bench.contract()
    node = await bench.node()
    manifest = await bench.issue(contract.contract_id)
    scope = pb.Scope(contract_id=contract.contract_id)
    await bench.stub.EngageKillSwitch(
        pb.EngageKillSwitchRequest(request_id="e" + contract.contract_id, scope=scope, reason="stop")
    )
    assert (await denied(node.register(manifest))).reason_name == "KILL_SWITCH_ENGAGED"
    assert (await denied(bench.issue(contract.contract_id))).reason_name == "KILL_SWITCH_ENGAGED"
    released = await bench.stub.ReleaseKillSwitch(
        pb.ReleaseKillSwitchRequest(request_id="r" + contract.contract_id, scope=scope, reason="go")
    )
    assert (released.kill_switch.engaged, released.kill_switch.epoch) == (False, 2)
    assert (await denied(node.register(manifest))).reason_name == "KILL_SWITCH_ENGAGED"
    await bench.born(node, contract.contract_id)


async def test_hole_cooldown(bench: Any, denied: Any, clock: Clock) -> None:
    """Manifests issued ahead cannot pass the cooldown, neither when issued nor when registered."""
    contract = await bench.contract(cooldown=20)
    node = await bench.node()
    root = await bench.born(node, contract.contract_id)
    first = await bench.issue(contract.contract_id, root.worker_id)
    refusal = await denied(bench.issue(contract.contract_id, root.worker_id))
    assert refusal.reason_name == "COOLDOWN_NOT_SATISFIED"
    assert 19 < refusal.retry_after_seconds <= 20
    clock.forward(21)
    second = await bench.issue(contract.contract_id, root.worker_id)
    await node.register(first)
    assert (await denied(node.register(second))).reason_name == "COOLDOWN_NOT_SATISFIED"
    clock.forward(21)
    await node.register(second)


async def test_hole_replay(bench: Any, denied: Any) -> None:
    """A manifest cannot be registered again, neither while its worker lives nor after."""
    contract = await bench.contract()
    node = await bench.node()
    manifest = await bench.issue(contract.contract_id)
    worker = await node.register(manifest)
    assert (await denied(node.register(manifest))).reason_name == "MANIFEST_ALREADY_USED"
    await node.deregister(worker.worker_id)
    assert (await denied(node.register(manifest))).reason_name == "MANIFEST_ALREADY_USED"
    assert (await bench.decisions(contract.contract_id))[-2:] == ["deny_replay"] * 2


async def test_forgeries(bench: Any, denied: Any) -> None:
    """A manifest that was edited, made up, or signed for another contract is forged."""
    contract, other = await bench.contract(), await bench.contract()
    node = await bench.node()
    good = await bench.issue(contract.contract_id)
    edits: list[dict[str, Any]] = [
        {"worker_id": "someone"},
        {"depth": 3},
        {"epoch": 7},
        {"contract_id": other.contract_id},
        {"contract_id": "\n"},
        {"key_id": other.key_id},
        {"signature": b""},
        {"signature": bytes(32)},
        {"state_snapshot_json": "{ }"},
        {"resources": resources_pb2.Resources(cpu_millis=1)},
    ]
    for edit in edits:
        forged = resources_pb2.Manifest()
        forged.CopyFrom(good)
        forged.MergeFrom(resources_pb2.Manifest(**edit))
        if "signature" in edit:
            forged.signature = edit["signature"]
        assert (await denied(node.register(forged))).reason_name == "MANIFEST_SIGNATURE_INVALID", edit
    later = resources_pb2.Manifest()
    later.CopyFrom(good)
    later.expire_time.nanos += 1
    assert (await denied(node.register(later))).reason_name == "MANIFEST_SIGNATURE_INVALID"
    await node.register(good)


async def test_a_late_manifest(bench: Any, denied: Any, clock: Clock) -> None:
    """A manifest whose time is over is refused, and what it reserved is free."""
    contract = await bench.contract(max_replicas=2, cooldown=1_000, manifest_ttl=10)
    node = await bench.node()
    root = await bench.born(node, contract.contract_id)
    late = await bench.issue(contract.contract_id, root.worker_id)
    assert (await denied(bench.issue(contract.contract_id))).reason_name == "REPLICA_QUOTA_EXCEEDED"
    clock.forward(11)
    assert (await denied(node.register(late))).reason_name == "MANIFEST_EXPIRED"
    in_time = await bench.issue(contract.contract_id, root.worker_id)
    await node.register(in_time)
    assert "reservations_returned" in await bench.decisions(contract.contract_id)


async def test_parents(bench: Any, denied: Any, clock: Clock) -> None:
    """A parent must live, in the same contract, within its own life."""
    contract, other = await bench.contract(expiration=30), await bench.contract()
    node = await bench.node()
    root = await bench.born(node, contract.contract_id)

    async def reason(contract_id: str, parent_id: str) -> str:
        name: str = (await denied(bench.issue(contract_id, parent_id))).reason_name
        return name

    assert await reason(contract.contract_id, "nobody") == "PARENT_UNKNOWN"
    assert await reason(other.contract_id, root.worker_id) == "PARENT_UNKNOWN"
    early = await bench.issue(contract.contract_id, root.worker_id)
    clock.forward(31)
    assert await reason(contract.contract_id, root.worker_id) == "PARENT_UNKNOWN"
    assert (await denied(node.register(early))).reason_name == "PARENT_UNKNOWN"
    await node.deregister(root.worker_id)
    assert await reason(contract.contract_id, root.worker_id) == "PARENT_UNKNOWN"


async def test_depth(bench: Any, denied: Any) -> None:
    """The generation after the last is refused, and a root that claims a depth."""
    contract = await bench.contract(max_depth=1)
    node = await bench.node()
    root = await bench.born(node, contract.contract_id)
    child = await bench.born(node, contract.contract_id, root.worker_id)
    refusal = await denied(bench.issue(contract.contract_id, child.worker_id))
    assert refusal.reason_name == "DEPTH_EXCEEDED"
    assert refusal.metadata == {"depth": "2", "max_depth": "1"}
    *_, event = await bench.events(contract_id=contract.contract_id, events=["audit"])
    assert (event.details["depth"], event.details["max_depth"]) == (2, 1)  # numbers, as in other events
    assert (await denied(bench.issue(contract.contract_id, depth=1))).reason_name == "ROOT_DEPTH_NOT_ZERO"
    assert (await bench.decisions(contract.contract_id))[-2:] == ["deny_depth"] * 2


async def test_a_failed_launch_gives_everything_back(bench: Any) -> None:
    """A worker that could not be started frees its slot and its parent's cooldown."""
    contract = await bench.contract(max_replicas=2, cooldown=1_000)
    node = await bench.node()
    root = await bench.born(node, contract.contract_id)
    child = await bench.born(node, contract.contract_id, root.worker_id)
    ended = await node.deregister(child.worker_id, "LAUNCH_FAILED", "no room")
    assert ended.exit.reason == resources_pb2.END_REASON_LAUNCH_FAILED
    await bench.born(node, contract.contract_id, root.worker_id)


async def test_unknown_contracts_and_bad_fields(bench: Any, denied: Any) -> None:
    """A request about nothing, or with a bad field, is refused by name and leaves nothing behind."""
    assert (await denied(bench.issue("nothing"))).reason_name == "CONTRACT_UNKNOWN"
    contract = await bench.contract()
    for fields, field in (
        ({"state_snapshot_json": "[]"}, "state_snapshot_json"),
        ({"resources": resources_pb2.Resources()}, "resources.cpu_millis"),
        ({"request_id": ""}, "request_id"),
        ({"request_id": "a b"}, "request_id"),
        ({"reason": "x" * 257}, "reason"),
        ({"parent_id": "/"}, "parent_id"),
    ):
        refusal = await denied(bench.issue(contract.contract_id, **fields))
        assert (refusal.reason_name, refusal.metadata["field"]) == ("INVALID_FIELD", field)
    read = await bench.stub.GetContract(pb.GetContractRequest(contract_id=contract.contract_id))
    assert read.contract.reserved_count == 0


async def test_a_node_must_hold_its_session(bench: Any, denied: Any) -> None:
    """Only the node that is connected, with the session it was given, registers and deregisters."""
    contract = await bench.contract()
    node, other = await bench.node(), await bench.node()
    worker = await bench.born(node, contract.contract_id)
    manifest = await bench.issue(contract.contract_id)
    session = node.welcome.session
    node.welcome.session = other.welcome.session
    assert (await denied(node.register(manifest))).reason_name == "NODE_SESSION_INVALID"
    assert (await denied(node.deregister(worker.worker_id))).reason_name == "NODE_SESSION_INVALID"
    assert (await denied(other.deregister(worker.worker_id))).reason_name == "NODE_SESSION_INVALID"
    node.welcome.session = session
    await node.register(manifest)


async def test_repeated_requests(bench: Any, denied: Any, request_id: Any) -> None:
    """The same request gets the same answer and changes nothing; other contents are refused."""
    contract = await bench.contract()
    node = await bench.node()
    name = request_id()
    snapshot = '{"a": "b"}'
    first, again = await asyncio.gather(
        *(bench.issue(contract.contract_id, request_id=name, state_snapshot_json=snapshot) for _ in range(2))
    )
    assert first == again
    assert first.state_snapshot_json == snapshot
    assert (
        await denied(bench.issue(contract.contract_id, request_id=name))
    ).reason_name == "REQUEST_ID_REUSED"
    name = request_id()
    worker = await node.register(first, name)
    assert await node.register(first, name) == worker
    read = await bench.stub.GetContract(pb.GetContractRequest(contract_id=contract.contract_id))
    assert (read.contract.active_count, read.contract.reserved_count) == (1, 0)


async def test_a_node_that_connected_again_repeats_what_it_asked(
    bench: Any, denied: Any, request_id: Any
) -> None:
    """A request repeated under a later session gets its first answer, unless its worker may not run now."""
    contract = await bench.contract()
    node = await bench.node()
    manifest = await bench.issue(contract.contract_id, state_snapshot_json='{"a": "b"}')
    name, stale = request_id(), node.welcome.session
    worker = await node.register(manifest, name)
    await node.hang_up()
    node.births, node.workers = {worker.worker_id}, set()
    await node.connect()
    assert await node.register(manifest, name) == worker
    live, node.welcome.session = node.welcome.session, stale
    assert (await denied(node.register(manifest, name))).reason_name == "NODE_SESSION_INVALID"
    end = request_id()
    node.welcome.session = live
    ended = await node.deregister(worker.worker_id, request=end)
    await node.hang_up()
    await node.connect()
    assert await node.deregister(worker.worker_id, request=end) == ended
    refusal = await denied(node.register(manifest, name))
    assert (refusal.reason_name, refusal.metadata["state"]) == ("WORKER_NOT_RUNNING", "ended")


async def test_a_denial_is_not_kept(bench: Any, denied: Any, request_id: Any) -> None:
    """A request that was denied may be made again, and is then decided anew."""
    contract = await bench.contract(max_replicas=1)
    node = await bench.node()
    worker = await bench.born(node, contract.contract_id)
    name = request_id()
    await denied(bench.issue(contract.contract_id, request_id=name))
    await node.deregister(worker.worker_id)
    await bench.issue(contract.contract_id, request_id=name)


async def test_conditions_in_cel(bench: Any, denied: Any) -> None:
    """A condition in CEL that is true when a worker registers denies the birth by its name."""
    rule = resources_pb2.StopCondition(name="active_limit", cel="active_count >= 2")
    contract = await bench.contract(stop_conditions=[rule])
    assert contract.stop_conditions[0] == rule
    node = await bench.node()
    for _ in range(2):
        await bench.born(node, contract.contract_id)
    manifest = await bench.issue(contract.contract_id)
    refusal = await denied(node.register(manifest))
    assert refusal.reason_name == "STOP_CONDITION_TRIGGERED"
    assert refusal.metadata == {"condition": "active_limit", "cause": "triggered"}
    assert (await bench.decisions(contract.contract_id))[-1] == "deny_stop_condition"


async def test_conditions_see_every_birth(bench: Any) -> None:
    """Concurrent registrations cannot slip past a condition on the population together."""
    rule = resources_pb2.StopCondition(name="five", cel="active_count >= 5")
    contract = await bench.contract(max_replicas=50, stop_conditions=[rule])
    node = await bench.node()
    births = [bench.born(node, contract.contract_id) for _ in range(50)]
    outcomes = await asyncio.gather(*births, return_exceptions=True)
    assert sum(not isinstance(outcome, Exception) for outcome in outcomes) == 5


async def test_contracts_are_read(bench: Any, denied: Any, ask: Any) -> None:
    """Contracts are listed newest first in pages, and a token serves its own listing only."""
    made = [(await bench.contract()).contract_id for _ in range(3)]
    page = await bench.stub.ListContracts(pb.ListContractsRequest(page_size=2))
    assert [contract.contract_id for contract in page.contracts] == made[:0:-1]
    token = page.next_page_token
    rest = await bench.stub.ListContracts(pb.ListContractsRequest(page_size=2, page_token=token))
    assert [contract.contract_id for contract in rest.contracts] == made[:1]
    assert rest.next_page_token == ""
    wrong = bench.stub.ListWorkers(pb.ListWorkersRequest(page_token=token))
    assert (await denied(ask(wrong))).reason_name == "PAGE_TOKEN_INVALID"
    large = bench.stub.ListContracts(pb.ListContractsRequest(page_size=1_001))
    assert (await denied(ask(large))).metadata["field"] == "page_size"
