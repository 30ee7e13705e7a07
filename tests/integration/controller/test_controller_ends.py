"""How workers end: reported, killed, reaped, lost; frozen and thawed."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime
from typing import Any

import pytest

from hayflick.v1 import controller_pb2 as pb
from hayflick.v1 import resources_pb2
from hayflick_controller import pursuit
from hayflick_rpc import wire

ENDED = resources_pb2.STATE_ENDED
LAUNCH_FAILED = resources_pb2.END_REASON_LAUNCH_FAILED


async def engage(
    bench: Any, request: str, seconds: float = 10.0, **scope: Any
) -> pb.EngageKillSwitchResponse:
    """Engage a kill switch."""
    response: pb.EngageKillSwitchResponse = await bench.ask(
        bench.stub.EngageKillSwitch(
            pb.EngageKillSwitchRequest(
                request_id=request, scope=pb.Scope(**scope), reason="enough", timeout=wire.duration(seconds)
            )
        )
    )
    return response


async def test_a_worker_ends(bench: Any) -> None:
    """A report of a worker's end frees its slot, keeps its record, and is in the log in its owner's words."""
    contract = await bench.contract()
    node = await bench.node()
    worker = await bench.born(node, contract.contract_id)
    usage = resources_pb2.Usage(memory_peak_bytes=5, cpu_time=wire.duration(1.5))
    ended = await node.deregister(worker.worker_id, detail="done", usage=usage)
    assert ended.state == ENDED
    assert ended.exit.reason == resources_pb2.END_REASON_COMPLETED
    (event,) = await bench.events(worker_id=worker.worker_id, events=["worker_shutdown"])
    assert event.details["reason"] == "done"
    assert event.details["end_reason"] == "completed"
    assert event.details["cpu_seconds"] == 1.5
    assert event.details["memory_peak_bytes"] == 5
    again = await node.deregister(worker.worker_id, "KILLED", "late")
    assert again == ended
    assert len(await bench.events(worker_id=worker.worker_id, events=["worker_shutdown"])) == 1


async def test_descendants_end_with_their_ancestor(bench: Any) -> None:
    """When a worker ends, all its descendants are ended too, on whichever node."""
    contract = await bench.contract()
    here, there = await bench.node(), await bench.node()
    root = await bench.born(here, contract.contract_id)
    child = await bench.born(there, contract.contract_id, root.worker_id)
    grandchild = await bench.born(here, contract.contract_id, child.worker_id)
    await here.deregister(root.worker_id)
    for worker in (child, grandchild):
        ended = await bench.ended(worker.worker_id)
        assert ended.exit.reason == resources_pb2.END_REASON_KILLED
        assert ended.exit.detail == "ancestor ended"
    assert not here.workers
    assert not there.workers


async def test_a_contract_is_killed(bench: Any, request_id: Any) -> None:
    """A kill switch answers when every worker in its scope is dead and recorded, and spares the others."""
    contract, other = await bench.contract(), await bench.contract()
    nodes = [await bench.node(), await bench.node()]
    workers = [await bench.born(nodes[n % 2], contract.contract_id) for n in range(6)]
    spared = await bench.born(nodes[0], other.contract_id)
    response = await engage(bench, request_id(), contract_id=contract.contract_id)
    assert response.active_before == 6
    assert set(response.worker_ids) == {worker.worker_id for worker in workers}
    assert not response.unconfirmed_worker_ids
    assert response.kill_switch.engaged
    assert response.kill_switch.epoch == 1
    assert sum(node.confirmed_count for node in response.nodes) == 6
    shutdowns = await bench.events(contract_id=contract.contract_id, events=["worker_shutdown"])
    assert {event.details["end_reason"] for event in shutdowns} == {"kill_switch"}
    assert len(shutdowns) == 6
    assert (await bench.decisions(contract.contract_id))[-2:] == [
        "kill_switch_engaged",
        "kill_switch_confirmed",
    ]
    assert (await bench.worker(spared.worker_id)).state != ENDED


@pytest.mark.parametrize("wrong", [False, True], ids=["told", "told wrongly"])
async def test_a_kill_tells_how_it_ended_them(bench: Any, request_id: Any, wrong: bool) -> None:
    """What a kill's result tells of an end is recorded, under the order's reason; nonsense is left out."""
    contract = await bench.contract()
    node = await bench.node()
    worker = await bench.born(node, contract.contract_id)
    node.obedient = False
    killing = asyncio.create_task(engage(bench, request_id(), contract_id=contract.contract_id))
    (order,) = await node.wait_order("kill")
    end = pb.WorkerEnd(
        worker_id=worker.worker_id,
        exit=resources_pb2.Exit(reason=resources_pb2.END_REASON_KILLED, signal=9),
        usage=resources_pb2.Usage(memory_peak_bytes=2**60 if wrong else 7, cpu_time=wire.duration(0.5)),
    )
    await node.answer(order, ends=[end])
    assert (await killing).worker_ids == [worker.worker_id]
    ended = await bench.worker(worker.worker_id)
    assert ended.exit.reason == resources_pb2.END_REASON_KILL_SWITCH
    assert (ended.exit.signal, ended.usage.memory_peak_bytes) == ((0, 0) if wrong else (9, 7))
    (event,) = await bench.events(worker_id=worker.worker_id, events=["worker_shutdown"])
    assert event.details["cpu_seconds"] == (0 if wrong else 0.5)


async def test_a_kill_ends_only_whom_it_is_for(bench: Any, request_id: Any) -> None:
    """A worker that a kill's result names though it was not to be ended stays as it is in the record."""
    contract, other = await bench.contract(), await bench.contract()
    node = await bench.node()
    worker = await bench.born(node, contract.contract_id)
    spared = await bench.born(node, other.contract_id)
    node.obedient = False
    killing = asyncio.create_task(engage(bench, request_id(), contract_id=contract.contract_id))
    (order,) = await node.wait_order("kill")
    order.kill.worker_ids.append(spared.worker_id)
    await node.answer(order)
    assert (await killing).worker_ids == [worker.worker_id]
    assert (await bench.worker(worker.worker_id)).state == ENDED
    assert await bench.worker(spared.worker_id) == spared


async def test_a_repeated_kill_spares_those_born_after_a_release(bench: Any, request_id: Any) -> None:
    """A kill that is repeated after its release gives no order and ends nobody who was born since."""
    contract = await bench.contract()
    scope = {"contract_id": contract.contract_id}
    node = await bench.node()
    worker = await bench.born(node, contract.contract_id)
    node.obedient = False
    name = request_id()
    killing = asyncio.create_task(engage(bench, name, **scope))
    (order,) = await node.wait_order("kill")
    release = pb.ReleaseKillSwitchRequest(request_id=request_id(), scope=pb.Scope(**scope), reason="go on")
    await bench.stub.ReleaseKillSwitch(release)
    later = await bench.born(node, contract.contract_id)
    repeating = asyncio.create_task(engage(bench, name, **scope))
    assert (await bench.worker(later.worker_id)).state != resources_pb2.STATE_STOPPING
    await node.answer(order)
    assert (await killing).worker_ids == [worker.worker_id]
    repeated = await repeating
    assert repeated.kill_switch.epoch == 1
    assert repeated.worker_ids == [worker.worker_id]
    assert node.orders == [order]
    assert (await bench.worker(later.worker_id)).state != ENDED


async def test_a_subtree_is_killed(bench: Any, request_id: Any, denied: Any) -> None:
    """A kill switch over a worker ends it and its descendants, and forbids births there alone."""
    contract = await bench.contract()
    node = await bench.node()
    root = await bench.born(node, contract.contract_id)
    child = await bench.born(node, contract.contract_id, root.worker_id)
    grandchild = await bench.born(node, contract.contract_id, child.worker_id)
    ahead = await bench.issue(contract.contract_id, child.worker_id)
    response = await engage(bench, request_id(), worker_id=child.worker_id)
    assert set(response.worker_ids) == {child.worker_id, grandchild.worker_id}
    assert (await denied(node.register(ahead))).reason_name == "KILL_SWITCH_ENGAGED"
    await bench.born(node, contract.contract_id, root.worker_id)


async def test_everything_is_killed(bench: Any, request_id: Any, denied: Any) -> None:
    """A kill switch over everything ends all and forbids every birth until it is released."""
    contract, other = await bench.contract(), await bench.contract()
    node = await bench.node()
    await bench.born(node, contract.contract_id)
    await bench.born(node, other.contract_id)
    response = await engage(bench, request_id(), everything=True)
    assert len(response.worker_ids) == 2
    refusal = await denied(bench.issue(contract.contract_id))
    assert refusal.reason_name == "KILL_SWITCH_ENGAGED"
    assert refusal.metadata["scope"] == "everything"
    release = pb.ReleaseKillSwitchRequest(
        request_id=request_id(), scope=pb.Scope(everything=True), reason="go on"
    )
    await bench.stub.ReleaseKillSwitch(release)
    await bench.born(node, contract.contract_id)


async def test_the_unconfirmed_are_pursued(bench: Any, request_id: Any) -> None:
    """Workers not seen dead in time are named, keep their slots, and are ended when their node obeys."""
    contract = await bench.contract()
    node = await bench.node()
    worker = await bench.born(node, contract.contract_id)
    node.obedient = False
    name = request_id()
    response = await engage(bench, name, 0.05, contract_id=contract.contract_id)
    assert response.unconfirmed_worker_ids == [worker.worker_id]
    assert response.nodes[0].error
    assert (await bench.worker(worker.worker_id)).state == resources_pb2.STATE_STOPPING
    assert await engage(bench, name, 0.05, contract_id=contract.contract_id) == response
    (order,) = await node.wait_order("kill")
    await node.answer(order)
    ended = await bench.ended(worker.worker_id)
    assert ended.exit.reason == resources_pb2.END_REASON_KILL_SWITCH


async def test_an_order_is_given_again(bench: Any, request_id: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An order that a connected node never answers is given again, as a new one, until one is answered."""
    monkeypatch.setattr(pursuit, "ORDER_TIMEOUT_SECONDS", 0.05)
    contract = await bench.contract()
    node = await bench.node()
    worker = await bench.born(node, contract.contract_id)
    node.obedient = False
    await engage(bench, request_id(), 0.05, contract_id=contract.contract_id)
    orders = await node.wait_order("kill", 3)
    assert len({order.order_id for order in orders}) == len(orders)
    assert all(list(order.kill.worker_ids) == [worker.worker_id] for order in orders)
    assert (await bench.worker(worker.worker_id)).state == resources_pb2.STATE_STOPPING
    node.obedient = True
    ended = await bench.ended(worker.worker_id)
    assert ended.exit.reason == resources_pb2.END_REASON_KILL_SWITCH


async def test_the_stillborn_are_ended(open_bench: Any) -> None:
    """A worker that never began to run is ended on its node and gives its slot back; who runs is left."""
    async with open_bench(start_timeout_seconds=0.3) as bench:
        contract = await bench.contract()
        node = await bench.node()
        running = await bench.born(node, contract.contract_id)
        await node.beat()
        stillborn = await bench.born(node, contract.contract_id)
        ended = await bench.ended(stillborn.worker_id)
        assert ended.exit.reason == resources_pb2.END_REASON_LAUNCH_FAILED
        assert ended.exit.detail == "never began to run"
        assert node.workers == {running.worker_id}
        assert (await bench.worker(running.worker_id)).state == resources_pb2.STATE_RUNNING


@pytest.mark.parametrize("told", [True, False])
async def test_who_dies_with_an_ancestor_was_killed(open_bench: Any, told: bool) -> None:
    """A worker that ran and died with an ancestor that never did was killed, and did not fail to launch."""
    async with open_bench(start_timeout_seconds=2.0) as bench:
        contract = await bench.contract()
        node = await bench.node()
        root = await bench.born(node, contract.contract_id)
        child = await bench.born(node, contract.contract_id, root.worker_id)
        family = [root.worker_id, child.worker_id]
        ends = [
            pb.WorkerEnd(worker_id=name, exit=resources_pb2.Exit(reason=LAUNCH_FAILED)) for name in family
        ]
        # As a node does: it ends the whole subtree, and says of all why it was told to.
        node.carry_out = lambda _: pb.OrderResult(worker_ids=family, ends=ends if told else [])
        await node.beat(workers=[child.worker_id])
        assert (await bench.ended(child.worker_id)).exit.reason == resources_pb2.END_REASON_KILLED
        assert (await bench.ended(root.worker_id)).exit.reason == LAUNCH_FAILED


async def test_a_pursuit_outlives_the_controller(bench: Any, request_id: Any) -> None:
    """A controller that restarts knows its kill switch and ends what it had not seen dead."""
    contract = await bench.contract()
    node = await bench.node()
    worker = await bench.born(node, contract.contract_id)
    node.obedient = False
    await engage(bench, request_id(), 0.05, contract_id=contract.contract_id)
    await bench.stop()
    await bench.start()
    await bench.wait_audit()
    read = await bench.stub.GetContract(pb.GetContractRequest(contract_id=contract.contract_id))
    assert read.contract.kill_switch.engaged
    again = await bench.node(node.node_id)
    again.workers = {worker.worker_id}
    await again.hang_up()
    await again.connect()
    ended = await bench.ended(worker.worker_id)
    assert ended.exit.reason in (resources_pb2.END_REASON_KILL_SWITCH, resources_pb2.END_REASON_NODE_LOST)


@pytest.mark.parametrize("released", [False, True])
async def test_a_kill_that_is_repeated_after_a_crash_is_answered_as_it_was_begun(
    bench: Any, request_id: Any, monkeypatch: pytest.MonkeyPatch, *, released: bool
) -> None:
    """The receipt of a kill whose controller died counts whom the latch found, from when it was set."""
    contract = await bench.contract()
    scope = {"contract_id": contract.contract_id}
    node = await bench.node()
    first, second = [await bench.born(node, contract.contract_id) for _ in range(2)]
    node.obedient = False
    name = request_id()
    dead = asyncio.Event()
    monkeypatch.setattr(bench.controller.kill_switch, "_carry_out", lambda *_: dead.wait())
    killing = asyncio.create_task(engage(bench, name, 0.5, **scope))
    assert await bench.recorded(contract.contract_id, "kill_switch_engaged")
    await bench.stop()  # with its latch on record, and nothing of what follows
    (lost,) = await asyncio.gather(killing, return_exceptions=True)
    assert isinstance(lost, BaseException)
    await bench.start()
    await bench.wait_audit()
    node.stub, node.workers = bench.stub, {second.worker_id}
    await node.connect()
    assert (await bench.ended(first.worker_id)).exit.reason == resources_pb2.END_REASON_KILL_SWITCH
    if released:
        release = pb.ReleaseKillSwitchRequest(
            request_id=request_id(), scope=pb.Scope(**scope), reason="go on"
        )
        await bench.ask(bench.stub.ReleaseKillSwitch(release))
        later = await bench.born(node, contract.contract_id)
    response = await engage(bench, name, 0.5, **scope)
    said = json.loads(response.receipt.document_json)
    assert (said["epoch"], said["running"]) == (1, 2)
    assert [worker["worker_id"] for worker in said["dead"]] == [first.worker_id]
    assert [worker["worker_id"] for worker in said["unconfirmed"]] == [second.worker_id]
    lasted = datetime.fromisoformat(said["issue_time"]) - datetime.fromisoformat(said["engage_time"])
    assert said["elapsed_seconds"] == pytest.approx(lasted.total_seconds(), abs=0.1)
    assert await engage(bench, name, 0.5, **scope) == response
    if released:
        assert (await bench.worker(later.worker_id)).state == resources_pb2.STATE_STARTING


async def test_three_hundred_are_killed_by_one_order(bench: Any, request_id: Any) -> None:
    """A kill of many workers takes one order per node, not one per worker."""
    contract = await bench.contract(max_replicas=300)
    node = await bench.node()
    await asyncio.gather(*(bench.born(node, contract.contract_id) for _ in range(300)))
    response = await engage(bench, request_id(), contract_id=contract.contract_id)
    assert len(response.worker_ids) == 300
    assert len(await node.wait_order("kill")) == 1


async def test_unknown_scopes(bench: Any, request_id: Any, denied: Any) -> None:
    """A kill switch over nothing is refused, and reading what is not there."""
    refusal = await denied(engage(bench, request_id(), contract_id="nothing"))
    assert refusal.reason_name == "CONTRACT_UNKNOWN"
    refusal = await denied(engage(bench, request_id(), worker_id="nobody"))
    assert refusal.reason_name == "WORKER_UNKNOWN"
    assert (await denied(bench.worker("nobody"))).reason_name == "WORKER_UNKNOWN"


async def test_quarantine(bench: Any, request_id: Any, denied: Any) -> None:
    """A quarantine freezes a worker and its descendants and forbids births below; release undoes both."""
    contract = await bench.contract()
    node = await bench.node()
    root = await bench.born(node, contract.contract_id)
    child = await bench.born(node, contract.contract_id, root.worker_id)
    await node.beat()
    quarantine = pb.QuarantineWorkerRequest(request_id=request_id(), worker_id=root.worker_id, reason="odd")
    frozen = await bench.ask(bench.stub.QuarantineWorker(quarantine))
    assert set(frozen.worker_ids) == {root.worker_id, child.worker_id}
    assert await bench.ask(bench.stub.QuarantineWorker(quarantine)) == frozen
    assert (await bench.worker(child.worker_id)).state == resources_pb2.STATE_QUARANTINED
    refusal = await denied(bench.issue(contract.contract_id, child.worker_id))
    assert refusal.reason_name == "QUARANTINED"
    assert refusal.metadata == {"worker_id": root.worker_id}
    reap = pb.ReapStaleWorkersRequest(request_id=request_id(), timeout=wire.duration(0))
    assert not (await bench.ask(bench.stub.ReapStaleWorkers(reap))).worker_ids  # the frozen cannot beat
    release = pb.ReleaseQuarantineRequest(request_id=request_id(), worker_id=root.worker_id, reason="fine")
    assert await bench.ask(bench.stub.ReleaseQuarantine(release))
    assert (await bench.worker(child.worker_id)).state == resources_pb2.STATE_RUNNING
    await bench.born(node, contract.contract_id, child.worker_id)
    decisions = await bench.decisions(contract.contract_id)
    assert "quarantined" in decisions
    assert "quarantine_released" in decisions


async def test_a_freeze_that_nobody_confirms(bench: Any, request_id: Any, denied: Any) -> None:
    """A freeze that no node confirms is an error that says so, and births stay forbidden."""
    contract = await bench.contract()
    node = await bench.node()
    root = await bench.born(node, contract.contract_id)
    node.carry_out = lambda _: pb.OrderResult(error="no freezer here")
    quarantine = pb.QuarantineWorkerRequest(request_id=request_id(), worker_id=root.worker_id, reason="odd")
    refusal = await denied(bench.ask(bench.stub.QuarantineWorker(quarantine)))
    assert refusal.reason_name == "SERVICE_UNAVAILABLE"
    assert "no freezer here" in refusal.message
    refusal = await denied(bench.issue(contract.contract_id, root.worker_id))
    assert refusal.reason_name == "QUARANTINED"


async def test_a_freeze_by_a_node_that_returns(bench: Any, request_id: Any, denied: Any) -> None:
    """Who is quarantined while its node is away is frozen when it returns, and not ended for its silence."""
    contract = await bench.contract()
    node = await bench.node()
    root = await bench.born(node, contract.contract_id)
    await node.beat()
    await node.hang_up()
    quarantine = pb.QuarantineWorkerRequest(request_id=request_id(), worker_id=root.worker_id, reason="odd")
    refusal = await denied(bench.ask(bench.stub.QuarantineWorker(quarantine)))
    assert refusal.reason_name == "SERVICE_UNAVAILABLE"
    await node.connect()
    changes = bench.stub.WatchWorkers(pb.WatchWorkersRequest(contract_id=contract.contract_id))
    async with asyncio.timeout(10.0):
        async for change in changes:
            if change.worker.state == resources_pb2.STATE_QUARANTINED:
                break
    changes.cancel()
    reap = pb.ReapStaleWorkersRequest(
        request_id=request_id(), contract_id=contract.contract_id, timeout=wire.duration(0)
    )
    assert not (await bench.ask(bench.stub.ReapStaleWorkers(reap))).worker_ids


async def test_the_silent_are_reaped(bench: Any, request_id: Any) -> None:
    """Workers not heard of for too long are ended as heartbeat_timeout; those that beat live on."""
    contract = await bench.contract()
    node = await bench.node()
    silent = await bench.born(node, contract.contract_id)
    reap = pb.ReapStaleWorkersRequest(
        request_id=request_id(), contract_id=contract.contract_id, timeout=wire.duration(3_600)
    )
    assert not (await bench.ask(bench.stub.ReapStaleWorkers(reap))).worker_ids
    reap = pb.ReapStaleWorkersRequest(
        request_id=request_id(), contract_id=contract.contract_id, timeout=wire.duration(0)
    )
    reaped = await bench.ask(bench.stub.ReapStaleWorkers(reap))
    assert reaped.worker_ids == [silent.worker_id]
    ended = await bench.worker(silent.worker_id)
    assert ended.exit.reason == resources_pb2.END_REASON_HEARTBEAT_TIMEOUT
    assert "reap_stale" in await bench.decisions(contract.contract_id)


@pytest.mark.parametrize("returns", [False, True], ids=["it stays away", "it returns"])
async def test_a_node_is_lost(open_bench: Any, returns: bool) -> None:
    """The workers of a node that stays away for a whole lease are lost, and only then."""
    async with open_bench(lease_seconds=0.3, beat_interval_seconds=0.1) as bench:
        contract = await bench.contract()
        node = await bench.node()
        worker = await bench.born(node, contract.contract_id)
        await node.hang_up()
        if returns:
            await node.connect()
            await node.beat()
            assert (await bench.worker(worker.worker_id)).state == resources_pb2.STATE_RUNNING
        else:
            ended = await bench.ended(worker.worker_id)
            assert ended.exit.reason == resources_pb2.END_REASON_NODE_LOST
            lived = wire.instant(ended.exit.end_time) - wire.instant(ended.create_time)
            assert lived.total_seconds() > 1.0  # the margin, and a lease that began when it connected


async def test_who_was_not_seen_dead_is_never_called_killed(open_bench: Any, request_id: Any) -> None:
    """A kill that outlasts a silent node's lease lists its workers as unconfirmed; they end as lost."""
    async with open_bench(lease_seconds=0.3, beat_interval_seconds=0.1) as bench:
        contract = await bench.contract()
        node = await bench.node()
        worker = await bench.born(node, contract.contract_id)
        await node.hang_up()
        response = await engage(bench, request_id(), contract_id=contract.contract_id)
        ended = await bench.worker(worker.worker_id)
        assert ended.exit.reason == resources_pb2.END_REASON_NODE_LOST  # the kill waited for it
        assert (list(response.worker_ids), list(response.unconfirmed_worker_ids)) == ([], [worker.worker_id])
        document = json.loads(response.receipt.document_json)
        assert ([one["worker_id"] for one in document["unconfirmed"]], document["dead"]) == (
            [worker.worker_id],
            [],
        )
        (event,) = await bench.events(worker_id=worker.worker_id, events=["worker_shutdown"])
        assert event.details["silent_seconds"] >= event.details["lease_seconds"] == 0.3
        assert "kill_switch" in event.details["detail"]
        decisions = await bench.events(contract_id=contract.contract_id, events=["audit"])
        confirmed = dict(decisions[-1].details)
        assert (confirmed["decision"], confirmed["epoch"], confirmed["dead_count"]) == (
            "kill_switch_confirmed",
            1,
            0,
        )
        assert list(confirmed["unconfirmed_worker_ids"]) == [worker.worker_id]


async def test_a_repeated_kill_calls_nobody_dead_who_was_lost_meanwhile(
    open_bench: Any, request_id: Any
) -> None:
    """Asked again after a restart, a kill lists as unconfirmed whom their node's lease ended in between."""
    async with open_bench(lease_seconds=0.3, beat_interval_seconds=0.1) as bench:
        contract = await bench.contract()
        node = await bench.node()
        worker = await bench.born(node, contract.contract_id)
        await node.hang_up()
        name = request_id()
        killing = asyncio.create_task(engage(bench, name, contract_id=contract.contract_id))
        assert await bench.recorded(contract.contract_id, "kill_switch_engaged")
        await bench.stop()
        await asyncio.gather(killing, return_exceptions=True)
        await bench.start()
        await bench.wait_audit()
        assert (await bench.ended(worker.worker_id)).exit.reason == resources_pb2.END_REASON_NODE_LOST
        response = await engage(bench, name, contract_id=contract.contract_id)
        assert (list(response.worker_ids), list(response.unconfirmed_worker_ids)) == ([], [worker.worker_id])


async def test_a_silent_node_is_cut_off(open_bench: Any) -> None:
    """A node that keeps its stream but does not beat loses it, and then its workers."""
    async with open_bench(lease_seconds=0.3, beat_interval_seconds=0.1) as bench:
        contract = await bench.contract()
        node = await bench.node()
        worker = await bench.born(node, contract.contract_id)
        ended = await bench.ended(worker.worker_id)
        assert ended.exit.reason == resources_pb2.END_REASON_NODE_LOST
        assert not (await bench.stub.ListNodes(pb.ListNodesRequest())).nodes


async def test_one_node_per_name(bench: Any, denied: Any) -> None:
    """A second orchestrator under a live name is refused; after the first has gone it may come."""
    first = await bench.node("twin")
    refusal = await denied(bench.node("twin"))
    assert refusal.reason_name == "NODE_ALREADY_CONNECTED"
    assert refusal.metadata == {"node_id": "twin"}
    await first.hang_up()
    second = await bench.node("twin")
    assert second.welcome.session != first.welcome.session
    (listed,) = (await bench.stub.ListNodes(pb.ListNodesRequest())).nodes
    assert listed.node_id == "twin"


async def test_a_hello_is_reconciled(bench: Any) -> None:
    """Workers that a returning node does not name are lost; those it names and may not run, it must end."""
    contract = await bench.contract()
    node = await bench.node()
    kept = await bench.born(node, contract.contract_id)
    missing = await bench.born(node, contract.contract_id)
    ended = await bench.born(node, contract.contract_id)
    await node.deregister(ended.worker_id)
    await node.hang_up()
    node.workers = {kept.worker_id, ended.worker_id, "stranger"}
    await node.connect()
    assert set(node.welcome.stop_worker_ids) == {ended.worker_id, "stranger"}
    lost = await bench.worker(missing.worker_id)
    assert (lost.state, lost.exit.reason) == (ENDED, resources_pb2.END_REASON_NODE_LOST)
    assert (await bench.worker(kept.worker_id)).state != ENDED


async def test_launches_in_a_hello_are_reconciled(bench: Any, request_id: Any) -> None:
    """Of launches in progress a node must end those alone whose worker has ended or is ending."""
    contract = await bench.contract()
    node = await bench.node()
    node.obedient = False
    unheard = await bench.born(node, contract.contract_id)  # its answer was lost, say
    ended = await bench.born(node, contract.contract_id)
    await node.deregister(ended.worker_id)
    stopping = await bench.born(node, contract.contract_id)
    scope = pb.Scope(worker_id=stopping.worker_id)
    await bench.stub.EngageKillSwitch(
        pb.EngageKillSwitchRequest(
            request_id=request_id(), scope=scope, reason="test", timeout=wire.duration(0.1)
        )
    )
    ran = await bench.born(node, contract.contract_id)
    await node.beat(workers=[ran.worker_id])
    async with asyncio.timeout(10):
        while (await bench.worker(ran.worker_id)).state != resources_pb2.STATE_RUNNING:
            pass
    await node.hang_up()
    manifest = await bench.issue(contract.contract_id)  # not presented yet
    node.workers = set()
    node.births = {manifest.worker_id, *(one.worker_id for one in (unheard, ended, stopping, ran))}
    await node.connect()
    assert set(node.welcome.stop_worker_ids) == {one.worker_id for one in (ended, stopping, ran)}
    assert (await bench.worker(unheard.worker_id)).state == resources_pb2.STATE_STARTING
    # What began to run and is launched again is neither: it ran, and does no more.
    assert (await bench.worker(ran.worker_id)).exit.reason == resources_pb2.END_REASON_NODE_LOST
    await node.register(manifest)


async def test_beats_are_fresh(bench: Any) -> None:
    """What a beat says is read at once, and a worker runs from its first beat on."""
    contract = await bench.contract()
    node = await bench.node()
    worker = await bench.born(node, contract.contract_id)
    watch = bench.stub.WatchWorkers(pb.WatchWorkersRequest(contract_id=contract.contract_id))
    assert (await watch.read()).worker.state == resources_pb2.STATE_STARTING
    await node.beat(usage=resources_pb2.Usage(memory_bytes=7, pids=2))
    assert (await watch.read()).worker.state == resources_pb2.STATE_RUNNING
    watch.cancel()
    read = await bench.worker(worker.worker_id)
    assert (read.usage.memory_bytes, read.usage.pids) == (7, 2)
    assert wire.instant(read.last_heartbeat_time) > wire.instant(worker.last_heartbeat_time)
    listed = await bench.stub.ListWorkers(pb.ListWorkersRequest(contract_id=contract.contract_id))
    assert listed.workers[0].usage == read.usage


async def test_who_may_not_run_is_ended(bench: Any) -> None:
    """A node that beats for a worker that the record has as ended is ordered to end it."""
    contract = await bench.contract()
    node = await bench.node()
    worker = await bench.born(node, contract.contract_id)
    await node.deregister(worker.worker_id)
    node.workers = {worker.worker_id}
    await node.beat()
    (order,) = await node.wait_order("kill")
    assert order.kill.worker_ids == [worker.worker_id]


async def test_a_node_must_keep_to_the_protocol(bench: Any, ask: Any, denied: Any) -> None:
    """A stream that begins without a hello, or whose beats do not rise, is refused."""
    call = bench.stub.ConnectNode()
    await call.write(pb.ConnectNodeRequest(beat=pb.NodeBeat(sequence=1)))
    assert (await denied(ask(call.read()))).metadata["field"] == "hello"
    node = await bench.node()
    await node.beat()
    node._sequence = 0
    beat = asyncio.create_task(node.beat())
    assert "rise" in await node._call.details()
    beat.cancel()


async def test_a_watch_sees_every_change(bench: Any) -> None:
    """A watcher gets the living first, then every change of its contract."""
    contract, other = await bench.contract(), await bench.contract()
    node = await bench.node()
    first = await bench.born(node, contract.contract_id)
    watch = bench.stub.WatchWorkers(pb.WatchWorkersRequest(contract_id=contract.contract_id))
    assert (await watch.read()).worker.worker_id == first.worker_id
    await bench.born(node, other.contract_id)
    second = await bench.born(node, contract.contract_id)
    assert (await watch.read()).worker.worker_id == second.worker_id
    await node.deregister(first.worker_id)
    change = (await watch.read()).worker
    assert (change.worker_id, change.state) == (first.worker_id, ENDED)
    watch.cancel()
