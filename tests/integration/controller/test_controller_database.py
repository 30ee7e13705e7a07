"""A kill while the database stands still: the nodes are told all the same, and the latch follows."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from postgres_cluster import Cluster

from hayflick.v1 import controller_pb2 as pb
from hayflick.v1 import resources_pb2
from hayflick_controller.killswitch import LATCH_TIMEOUT_SECONDS
from hayflick_rpc import wire

ORDER_SECONDS = LATCH_TIMEOUT_SECONDS + 2.0
"""By when a node has heard, on a machine that does other things too."""


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    blocker = sqlite3.connect(path, isolation_level=None)
    try:
        blocker.execute("BEGIN EXCLUSIVE")
        yield
    finally:
        blocker.rollback()
        blocker.close()


@pytest.fixture(params=["sqlite", "postgresql"])
async def still(
    request: pytest.FixtureRequest, logger: Any, bench_class: Any
) -> AsyncIterator[tuple[Any, Callable[[], contextlib.AbstractContextManager[None]]]]:
    """A controller, and what makes its database stand still."""
    settings, cluster = {}, None
    if request.param == "postgresql":
        cluster = request.getfixturevalue("cluster")
        assert isinstance(cluster, Cluster)
        settings = {"database": cluster.new_database()}
    with tempfile.TemporaryDirectory(prefix="hf-") as directory:
        bench = bench_class(Path(directory), logger, **settings)
        await bench.start()
        try:
            await bench.wait_audit()
            file = Path(directory) / "controller" / "controller.db"
            yield bench, (lambda: _locked(file)) if cluster is None else cluster.stopped
        finally:
            await bench.stop()


async def test_a_kill_does_not_wait_for_a_database_that_stands_still(still: Any, request_id: Any) -> None:
    """Nodes are told within moments, the answer says that no latch is on record, and later one is."""
    bench, stopped = still
    contract = await bench.contract_when_ready()
    node = await bench.node()
    worker = await bench.born(node, contract.contract_id)
    request = pb.EngageKillSwitchRequest(
        request_id=request_id(), scope=pb.Scope(contract_id=contract.contract_id), reason="enough"
    )
    node.carry_out = lambda order: pb.OrderResult(worker_ids=[worker.worker_id])
    with stopped():
        begun = time.monotonic()
        killing = asyncio.create_task(bench.ask(bench.stub.EngageKillSwitch(request)))
        (order,) = await node.wait_order("kill")
        assert time.monotonic() - begun < ORDER_SECONDS
        assert order.kill.scope.contract_id == contract.contract_id
        (refusal,) = await asyncio.gather(killing, return_exceptions=True)
        assert refusal.reason_name == "SERVICE_UNAVAILABLE"
        assert "no latch is on record" in refusal.message
        assert refusal.metadata == {"service": "database", "dead_count": "1", "node_count": "1"}
    ended = await bench.ended(worker.worker_id)
    assert ended.exit.reason == resources_pb2.END_REASON_KILL_SWITCH
    read = await bench.ask(bench.stub.GetContract(pb.GetContractRequest(contract_id=contract.contract_id)))
    assert (read.contract.kill_switch.engaged, read.contract.kill_switch.epoch) == (True, 1)
    answer = await bench.ask(bench.stub.EngageKillSwitch(request))
    assert list(answer.worker_ids) == [worker.worker_id]


async def test_a_kill_under_a_slow_database_is_answered_with_its_latch(still: Any, request_id: Any) -> None:
    """A latch that comes too late for the orders, and before the answer, is the answer's."""
    bench, stopped = still
    contract = await bench.contract_when_ready()
    node = await bench.node()
    worker = await bench.born(node, contract.contract_id)
    request = pb.EngageKillSwitchRequest(
        request_id=request_id(),
        scope=pb.Scope(contract_id=contract.contract_id),
        reason="enough",
        timeout=wire.duration(20.0),
    )
    node.carry_out = lambda order: pb.OrderResult(worker_ids=[worker.worker_id])
    with stopped():
        killing = asyncio.create_task(bench.ask(bench.stub.EngageKillSwitch(request)))
        await node.wait_order("kill")
    answer = await killing
    assert answer.kill_switch.engaged
    assert list(answer.worker_ids) == [worker.worker_id]
    assert answer.receipt.document_json
