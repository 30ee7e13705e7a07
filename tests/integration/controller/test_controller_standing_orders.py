"""Freezes, thaws and narrowings stand: they are given again until they are in force, and on record then."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from hayflick.v1 import controller_pb2 as pb
from hayflick.v1 import resources_pb2
from hayflick_controller import standing_orders

WAIT_SECONDS = 20.0


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A controller that takes a node for slow after a moment."""
    monkeypatch.setattr(standing_orders, "ORDER_TIMEOUT_SECONDS", 0.2)


async def quarantine(bench: Any, request: str, worker_id: str) -> Any:
    """Ask for a quarantine."""
    asked = pb.QuarantineWorkerRequest(request_id=request, worker_id=worker_id, reason="odd")
    return await bench.ask(bench.stub.QuarantineWorker(asked))


async def release(bench: Any, request: str, worker_id: str) -> Any:
    """Ask for a release."""
    asked = pb.ReleaseQuarantineRequest(request_id=request, worker_id=worker_id, reason="fine")
    return await bench.ask(bench.stub.ReleaseQuarantine(asked))


async def becomes(bench: Any, worker_id: str, state: resources_pb2.State.ValueType) -> bool:
    """Wait until a worker is recorded in a state."""
    call = bench.stub.WatchWorkers(pb.WatchWorkersRequest())
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            if (await bench.worker(worker_id)).state == state:
                return True
            async for change in call:
                if (change.worker.worker_id, change.worker.state) == (worker_id, state):
                    return True
    finally:
        call.cancel()
    return False


async def test_a_node_that_was_away_is_told_and_it_is_on_record(
    bench: Any, request_id: Any, denied: Any
) -> None:
    """A quarantine asked for while the node is away is QUARANTINED in the record once it returns."""
    contract = await bench.contract()
    node = await bench.node()
    root = await bench.born(node, contract.contract_id)
    child = await bench.born(node, contract.contract_id, root.worker_id)
    await node.beat()
    await node.hang_up()
    refusal = await denied(quarantine(bench, request_id(), root.worker_id))
    assert refusal.reason_name == "SERVICE_UNAVAILABLE"
    await node.connect()
    (order,) = await node.wait_order("freeze")
    assert order.freeze.worker_id == root.worker_id
    for worker in (root, child):
        assert await becomes(bench, worker.worker_id, resources_pb2.STATE_QUARANTINED)


@pytest.mark.usefixtures("impatient")
async def test_a_slow_node_is_told_again(bench: Any, request_id: Any, denied: Any) -> None:
    """A freeze or thaw that was not confirmed in time is ordered again on its stream, and put on record."""
    contract = await bench.contract()
    node = await bench.node()
    worker = await bench.born(node, contract.contract_id)
    await node.beat()
    for ask, verb, state in (
        (quarantine, "freeze", resources_pb2.STATE_QUARANTINED),
        (release, "thaw", resources_pb2.STATE_RUNNING),
    ):
        node.obedient = False
        refusal = await denied(ask(bench, request_id(), worker.worker_id))
        assert refusal.reason_name == "SERVICE_UNAVAILABLE"
        assert len(await node.wait_order(verb, 1)) >= 1
        node.obedient = True
        assert await becomes(bench, worker.worker_id, state)


@pytest.mark.usefixtures("impatient")
async def test_nobody_stays_frozen_whose_freeze_was_not_on_record(
    bench: Any, request_id: Any, denied: Any
) -> None:
    """A thaw that was not confirmed is ordered again although no freeze ever was confirmed either."""
    contract = await bench.contract()
    node = await bench.node()
    worker = await bench.born(node, contract.contract_id)
    await node.beat()
    node.obedient = False
    for ask in (quarantine, release):
        refusal = await denied(ask(bench, request_id(), worker.worker_id))
        assert refusal.reason_name == "SERVICE_UNAVAILABLE"
    assert (await bench.worker(worker.worker_id)).state == resources_pb2.STATE_RUNNING
    given = await node.wait_order("thaw")
    again = await node.wait_order("thaw", len(given) + 1)
    assert again[-1].thaw.worker_id == worker.worker_id


@pytest.mark.usefixtures("impatient")
async def test_a_slow_node_is_told_again_what_was_taken(bench: Any, request_id: Any, denied: Any) -> None:
    """A narrowing that was not confirmed is ordered again until it is, and then no more."""
    contract = await bench.contract()
    node = await bench.node()
    resources = resources_pb2.Resources(
        cpu_millis=500,
        memory_limit_bytes=64 << 20,
        network=resources_pb2.NetworkPolicy(allow_controller=True),
    )
    told, deaf = [
        await node.register(await bench.issue(contract.contract_id, resources=resources)) for _ in range(2)
    ]
    await node.beat()
    node.obedient = False

    def orders(worker: resources_pb2.Worker) -> list[pb.Order]:
        given = [order for order in node.orders if order.HasField("narrow_network")]
        return [order for order in given if order.narrow_network.worker_id == worker.worker_id]

    async def wait_orders(worker: resources_pb2.Worker, count: int) -> list[pb.Order]:
        async with node.ordered, asyncio.timeout(WAIT_SECONDS):
            await node.ordered.wait_for(lambda: len(orders(worker)) >= count)
            return orders(worker)

    for worker in (told, deaf):
        asked = pb.NarrowNetworkRequest(
            request_id=request_id(),
            worker_id=worker.worker_id,
            network=resources_pb2.NetworkPolicy(),
            reason="less",
        )
        refusal = await denied(bench.ask(bench.stub.NarrowNetwork(asked)))
        assert refusal.reason_name == "SERVICE_UNAVAILABLE"
    count = len(await wait_orders(told, 2))
    again = (await wait_orders(told, count + 1))[-1]
    assert not again.narrow_network.network.allow_controller
    await node.send(pb.ConnectNodeRequest(result=pb.OrderResult(order_id=again.order_id)))
    await node.beat()  # after the result, on the same stream
    confirmed = len(orders(told))
    await wait_orders(deaf, len(orders(deaf)) + 3)
    assert len(orders(told)) == confirmed


async def test_nobody_is_thawed_before_the_release_is_on_record(
    open_bench: Any, request_id: Any, logger: Any, denied: Any
) -> None:
    """A release that the logger did not take gives no order, and the freeze stands."""
    async with open_bench(audit_timeout_seconds=2.5) as bench:
        contract = await bench.contract()
        node = await bench.node()
        worker = await bench.born(node, contract.contract_id)
        await node.beat()
        await quarantine(bench, request_id(), worker.worker_id)
        with logger.frozen():  # for more than two ticks
            refusal = await denied(release(bench, request_id(), worker.worker_id))
        assert refusal.reason_name == "AUDIT_UNAVAILABLE"
        assert not [order for order in node.orders if order.HasField("thaw")]
        assert (await bench.worker(worker.worker_id)).state == resources_pb2.STATE_QUARANTINED


async def test_a_release_does_not_undo_a_later_quarantine(
    open_bench: Any, request_id: Any, logger: Any
) -> None:
    """A release that still waits for its record when the worker is quarantined anew thaws nobody."""
    async with open_bench(audit_timeout_seconds=10.0) as bench:
        contract = await bench.contract()
        node = await bench.node()
        worker = await bench.born(node, contract.contract_id)
        await node.beat()
        await quarantine(bench, request_id(), worker.worker_id)
        with logger.frozen():
            releasing = asyncio.create_task(release(bench, request_id(), worker.worker_id))
            async with asyncio.timeout(WAIT_SECONDS):
                while await bench.controller._store.transact(lambda tx: tx.engaged()):  # noqa: ASYNC110
                    await asyncio.sleep(0)  # each turn of the loop may bring the commit
            again = asyncio.create_task(quarantine(bench, request_id(), worker.worker_id))
            await node.wait_order("freeze", 2)
        assert not (await releasing).worker_ids
        assert (await again).worker_ids == [worker.worker_id]
        assert [order.WhichOneof("order") for order in node.orders] == ["freeze", "freeze"]
        assert (await bench.worker(worker.worker_id)).state == resources_pb2.STATE_QUARANTINED
