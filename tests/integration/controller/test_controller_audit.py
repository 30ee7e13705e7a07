"""Promise 3: nothing is decided that is not recorded, and stopping needs no record."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from hayflick.v1 import controller_pb2 as pb
from hayflick.v1 import logger_pb2
from hayflick_rpc.clock import SteadyClock


@pytest.fixture(scope="module")
def logger(logger_process: Any) -> Iterator[Any]:
    """A logger that this module's tests stop and start."""
    with tempfile.TemporaryDirectory(prefix="hf-") as directory:
        process = logger_process(Path(directory))
        process.start()
        yield process
        process.stop()


@pytest.fixture
async def bench(open_bench: Any, logger: Any) -> AsyncIterator[Any]:
    """A bench whose logger is up again after the test."""
    async with open_bench(audit_timeout_seconds=0.5) as made:
        yield made
        logger.start()


async def down(bench: Any) -> None:
    """Stop the logger and wait until the controller has noticed."""
    bench.logger.stop()
    await bench.wait_audit_down()


async def reserved(bench: Any, contract_id: str) -> tuple[int, int]:
    """Read a contract's slots."""
    read = await bench.stub.GetContract(pb.GetContractRequest(contract_id=contract_id))
    return read.contract.active_count, read.contract.reserved_count


async def test_without_a_record_nothing_is_granted(bench: Any, denied: Any, request_id: Any) -> None:
    """Without a logger births are refused at once, hold no slot, and can be asked for again later."""
    contract = await bench.contract()
    node = await bench.node()
    manifest = await bench.issue(contract.contract_id)
    await down(bench)
    name, register = request_id(), request_id()
    refusal = await denied(bench.issue(contract.contract_id, request_id=name))
    assert refusal.reason_name == "AUDIT_UNAVAILABLE"
    assert refusal.retry_after_seconds
    assert (await denied(node.register(manifest, register))).reason_name == "AUDIT_UNAVAILABLE"
    assert (await denied(bench.contract())).reason_name == "AUDIT_UNAVAILABLE"
    assert await reserved(bench, contract.contract_id) == (0, 1)
    bench.logger.start()
    await bench.wait_audit()
    await bench.issue(contract.contract_id, request_id=name)
    await node.register(manifest, register)
    assert await reserved(bench, contract.contract_id) == (1, 1)
    bench.logger.stop()


async def test_a_denial_needs_no_record(bench: Any, denied: Any) -> None:
    """A denial is answered without a logger, and recorded when it returns."""
    contract = await bench.contract(max_replicas=1)
    await bench.issue(contract.contract_id)
    await down(bench)
    refusal = await denied(bench.issue(contract.contract_id))
    assert refusal.reason_name == "REPLICA_QUOTA_EXCEEDED"
    bench.logger.start()
    await bench.wait_audit()
    assert await bench.recorded(contract.contract_id, "deny_quota")
    bench.logger.stop()


async def test_a_kill_needs_no_record(bench: Any, request_id: Any) -> None:
    """The kill switch acts without a logger, and all that it did is recorded when the logger returns."""
    contract = await bench.contract()
    node = await bench.node()
    worker = await bench.born(node, contract.contract_id)
    await down(bench)
    request = pb.EngageKillSwitchRequest(
        request_id=request_id(), scope=pb.Scope(contract_id=contract.contract_id), reason="now"
    )
    response = await bench.stub.EngageKillSwitch(request)
    assert response.worker_ids == [worker.worker_id]
    assert not node.workers
    bench.logger.start()
    await bench.wait_audit()
    assert await bench.recorded(contract.contract_id, "kill_switch_confirmed")
    assert len(await bench.events(worker_id=worker.worker_id, events=["worker_shutdown"])) == 1
    bench.logger.stop()


async def test_a_release_needs_a_record(bench: Any, denied: Any, request_id: Any) -> None:
    """What lets births happen again is not done without a record."""
    contract = await bench.contract()
    scope = pb.Scope(contract_id=contract.contract_id)
    await bench.stub.EngageKillSwitch(
        pb.EngageKillSwitchRequest(request_id=request_id(), scope=scope, reason="stop")
    )
    await down(bench)
    release = pb.ReleaseKillSwitchRequest(request_id=request_id(), scope=scope, reason="go")
    refusal = await denied(bench.ask(bench.stub.ReleaseKillSwitch(release)))
    assert refusal.reason_name == "AUDIT_UNAVAILABLE"
    read = await bench.stub.GetContract(pb.GetContractRequest(contract_id=contract.contract_id))
    assert read.contract.kill_switch.engaged


async def test_a_death_is_a_fact(bench: Any, denied: Any) -> None:
    """A worker's end frees its slot without a logger; the node is told to ask again until it is recorded."""
    contract = await bench.contract()
    node = await bench.node()
    worker = await bench.born(node, contract.contract_id)
    await down(bench)
    assert (await denied(node.deregister(worker.worker_id))).reason_name == "AUDIT_UNAVAILABLE"
    assert await reserved(bench, contract.contract_id) == (0, 0)
    bench.logger.start()
    await bench.wait_audit()
    await node.deregister(worker.worker_id)
    assert len(await bench.events(worker_id=worker.worker_id, events=["worker_shutdown"])) == 1
    bench.logger.stop()


@pytest.mark.parametrize("what", ["issue", "register"])
async def test_a_decision_that_is_not_recorded_in_time_is_undone(bench: Any, denied: Any, what: str) -> None:
    """A decision that was committed but not acknowledged in time is taken back, and the record says so."""
    contract = await bench.contract()
    node = await bench.node()
    manifest = await bench.issue(contract.contract_id)
    with bench.logger.frozen():  # it holds its connections and answers nothing
        call = bench.issue(contract.contract_id) if what == "issue" else node.register(manifest)
        assert (await denied(call)).reason_name == "AUDIT_UNAVAILABLE"
        assert await reserved(bench, contract.contract_id) == (0, 1)
    await bench.wait_audit()
    undone = {"issue": "replication_undone", "register": "registration_undone"}[what]
    assert await bench.recorded(contract.contract_id, undone)
    await node.register(manifest)
    assert await reserved(bench, contract.contract_id) == (1, 0)
    bench.logger.stop()


async def test_a_restart_delivers_what_was_left(bench: Any, denied: Any) -> None:
    """Events that a controller could not deliver before it stopped are delivered by its next start."""
    contract = await bench.contract(max_replicas=1)
    await bench.issue(contract.contract_id)
    await down(bench)
    for _ in range(3):
        await denied(bench.issue(contract.contract_id))
    await bench.stop()
    bench.logger.start()
    await bench.start()
    await bench.wait_audit()
    decisions = await bench.decisions(contract.contract_id)
    assert decisions == ["contract_created", "replication_requested", *["deny_quota"] * 3]
    bench.logger.stop()


async def test_a_wall_clock_that_is_set_is_on_record(logger: Any, bench_class: Any, denied: Any) -> None:
    """Each time that somebody sets the wall clock is on record, and no cooldown ends by it."""
    set_by_seconds = [0.0]
    with tempfile.TemporaryDirectory(prefix="hf-") as directory:
        bench = bench_class(Path(directory), logger)
        bench.now_us = SteadyClock(lambda: time.time() + set_by_seconds[0])
        await bench.start()
        try:
            await bench.wait_audit()
            contract = await bench.contract(cooldown=600)
            parent = await bench.born(await bench.node(), contract.contract_id)
            await bench.issue(contract.contract_id, parent.worker_id)
            filter_ = logger_pb2.EventFilter(events=["clock_stepped"])
            steps = bench.records.TailEvents(logger_pb2.TailEventsRequest(filter=filter_, start_index=0))
            for seconds in (3_600.0, 0.0, -3_600.0):
                set_by_seconds[0] = seconds
                async with asyncio.timeout(10):
                    step = (await steps.read()).event.event
                assert step.details["step_seconds"] == pytest.approx(seconds, abs=1)
                assert step.timestamp.seconds == pytest.approx(time.time(), abs=60)
                refusal = await denied(bench.issue(contract.contract_id, parent.worker_id))
                assert refusal.reason_name == "COOLDOWN_NOT_SATISFIED"
            steps.cancel()
        finally:
            await bench.stop()
