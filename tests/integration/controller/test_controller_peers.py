"""Several controllers on one PostgreSQL database."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from postgres_cluster import Cluster

from hayflick.v1 import controller_pb2 as pb
from hayflick.v1 import resources_pb2
from hayflick_controller import render
from hayflick_controller.model import Event
from hayflick_controller.store import outbox
from hayflick_controller.store.protocol import BOOT_SHIFT
from hayflick_rpc import wire
from hayflick_rpc.channel import connect
from hayflick_rpc.errors import HayflickError


@pytest.fixture
async def two(cluster: Cluster, logger: Any, bench_class: Any) -> AsyncIterator[tuple[Any, Any]]:
    """Two controllers, each with its own data directory."""
    url = cluster.new_database()
    async with contextlib.AsyncExitStack() as stack:
        benches = []
        for _ in range(2):
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="hf-"))
            bench = bench_class(Path(directory), logger, database=url)
            await bench.start()
            stack.push_async_callback(bench.stop)
            await bench.wait_audit()
            benches.append(bench)
        yield benches[0], benches[1]


async def test_two_controllers_admit_what_one_would(two: tuple[Any, Any]) -> None:
    """Births asked of both at once fill a contract exactly."""
    contract = await two[0].contract(max_replicas=9)
    nodes = [await bench.node() for bench in two]

    async def born(number: int) -> bool:
        place = number % 2
        try:
            await two[place].born(nodes[place], contract.contract_id)
        except HayflickError as error:
            assert error.reason_name == "REPLICA_QUOTA_EXCEEDED", error  # noqa: PT017
            return False
        return True

    outcomes = await asyncio.gather(*map(born, range(40)))
    assert sum(outcomes) == 9
    assert sum(len(node.workers) for node in nodes) == 9


async def test_a_kill_switch_reaches_the_nodes_of_the_other(
    two: tuple[Any, Any], request_id: Callable[[], str]
) -> None:
    """A kill asked of one controller ends the workers of both, and is confirmed for both."""
    contract = await two[0].contract()
    nodes = [await bench.node() for bench in two]
    workers = [await bench.born(node, contract.contract_id) for bench, node in zip(two, nodes, strict=True)]
    request = pb.EngageKillSwitchRequest(request_id=request_id(), reason="test", timeout=wire.duration(5))
    request.scope.contract_id = contract.contract_id
    response = await two[0].ask(two[0].stub.EngageKillSwitch(request))
    assert set(response.worker_ids) == {worker.worker_id for worker in workers}
    assert not response.unconfirmed_worker_ids
    assert not any(node.workers for node in nodes)


async def test_the_record_shows_who_decided_first(two: tuple[Any, Any]) -> None:
    """Each event states the turn of its commit, so that two controllers' decisions have one order."""
    contract = await two[0].contract()
    for number in range(6):
        await two[number % 2].issue(contract.contract_id)
    issued = [
        event
        for event in await two[0].events(contract_id=contract.contract_id, events=["audit"])
        if event.details["decision"] == "replication_requested"
    ]
    in_time = sorted(issued, key=lambda event: wire.instant(event.timestamp))
    turns = [event.details["turn"] for event in in_time]
    assert len(turns) == len(set(turns)) == 6
    assert turns == sorted(turns)


async def test_a_release_that_is_taken_back_ends_who_was_born_by_it(
    two: tuple[Any, Any], tmp_path_factory: Any, logger_process: Any, request_id: Callable[[], str]
) -> None:
    """A release that one controller cannot record ends whom another let be born meanwhile."""
    with tempfile.TemporaryDirectory(prefix="hf-") as directory:
        own = logger_process(Path(directory))
        own.start()
        released = type(two[0])(Path(directory), own, database=two[0].settings["database"])
        await released.start()
        try:
            await released.wait_audit()
            contract = await released.contract()
            scope = {"scope": pb.Scope(contract_id=contract.contract_id), "reason": "test"}
            engage = pb.EngageKillSwitchRequest(request_id=request_id(), **scope)
            await released.ask(released.stub.EngageKillSwitch(engage))
            node = await two[1].node()
            with own.frozen():  # its logger alone: the other's goes on
                release = pb.ReleaseKillSwitchRequest(request_id=request_id(), **scope)
                releasing = asyncio.create_task(released.ask(released.stub.ReleaseKillSwitch(release)))
                worker = await _born_at_last(two[1], node, contract.contract_id)
                with pytest.raises(HayflickError) as caught:
                    await releasing
                assert caught.value.reason_name == "AUDIT_UNAVAILABLE"
                ended = await two[1].ended(worker.worker_id)
            assert ended.exit.reason == resources_pb2.END_REASON_KILL_SWITCH
        finally:
            await released.stop()
            own.stop()


async def _born_at_last(bench: Any, node: Any, contract_id: str) -> Any:
    """Return a worker, born as soon as no kill switch forbids it."""
    async with asyncio.timeout(5):
        while True:
            try:
                return await bench.born(node, contract_id)
            except HayflickError as error:
                if error.reason_name != "KILL_SWITCH_ENGAGED":
                    raise


async def test_a_request_repeated_to_the_other_gets_its_answer(
    two: tuple[Any, Any], request_id: Callable[[], str]
) -> None:
    """The same request to another controller is answered once."""
    contract = await two[0].contract()
    name = request_id()
    first = await two[0].issue(contract.contract_id, request_id=name)
    second = await two[1].issue(contract.contract_id, request_id=name)
    assert first == second


async def test_a_server_that_restarts_is_found_again(two: tuple[Any, Any], cluster: Cluster) -> None:
    """Without its database a controller refuses with a typed error, and works on when it is back."""
    contract = await two[0].contract()
    cluster.stop()
    try:
        with pytest.raises(HayflickError) as caught:
            await two[0].issue(contract.contract_id)
        assert caught.value.reason_name == "SERVICE_UNAVAILABLE"
    finally:
        cluster.start()
    async with asyncio.timeout(10):
        while True:
            try:
                await two[1].issue(contract.contract_id)
                break
            except HayflickError as error:
                assert error.reason_name in ("SERVICE_UNAVAILABLE", "AUDIT_UNAVAILABLE")  # noqa: PT017


async def test_what_a_dead_controller_left_is_delivered_by_another(two: tuple[Any, Any]) -> None:
    """Events of a controller that is gone reach the logger by way of another, under its own name."""
    contract = await two[0].contract()

    def leave(tx: Any) -> None:
        tx._driver.run(
            outbox.ADD_EVENT,
            {
                "position": 1 << BOOT_SHIFT << 10 | 1,
                "body": render.event(Event("audit", 1, contract_id=contract.contract_id)).SerializeToString(),
                "controller_id": "gone",
            },
        )

    store = two[1].controller._store
    await store.transact(leave)
    assert await store.transact(lambda tx: tx.left_over()) == ["gone"]
    await two[1].controller._outbox.deliver_left_over()
    assert await store.transact(lambda tx: tx.left_over()) == []
    found = await two[1].events(contract_id=contract.contract_id, events=["audit"])
    assert len([event for event in found if "decision" not in event.details]) == 1
    assert await store.transact(lambda tx: tx.alive(two[0].controller._store.identity.controller_id))


async def test_the_time_is_the_databases(cluster: Cluster, logger: Any, bench_class: Any) -> None:
    """A controller whose machine's wall clock is off goes by the database's, as the others on it do."""
    program = Path(__file__).parents[1] / "other_wall_clock.py"
    with tempfile.TemporaryDirectory(prefix="hf-") as directory:
        address = f"unix://{directory}/controller.sock"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, program, "-3600", "--listen", address, "--logger", logger.address),
            *("--data-dir", f"{directory}/controller", "--database", cluster.new_database()),
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            assert process.stdout is not None
            assert b"listening" in await process.stdout.readline()
            bench = bench_class(Path("/"), logger)
            bench.use(connect(address))
            before = time.time()
            created = (await bench.contract_when_ready()).create_time
            assert before - 60 < created.seconds < before + 60
            await bench.hang_up()
        finally:
            process.terminate()
            await process.wait()
