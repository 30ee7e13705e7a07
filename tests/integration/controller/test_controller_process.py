"""The process: it says where it listens, keeps its secrets, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hayflick.v1 import controller_pb2 as pb
from hayflick.v1 import resources_pb2
from hayflick_rpc.channel import connect

SECRET = "my-secret-key"


class Process:
    """``python -m hayflick_controller``."""

    def __init__(self, directory: Path, logger: str, *options: str) -> None:
        self.directory = directory
        self.address = f"unix://{directory}/controller.sock"
        reader, self.lifeline = os.pipe()
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "hayflick_controller"),
                *("--listen", self.address, "--data-dir", str(directory / "controller")),
                *("--logger", logger, "--lifeline-fd", str(reader), *options),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=(reader,),
        )
        os.close(reader)
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()

    def end(self) -> str:
        """Wait for the end; return what it logged."""
        _, log = self.process.communicate(timeout=15)
        if self.lifeline >= 0:
            os.close(self.lifeline)
            self.lifeline = -1
        return log


@pytest.fixture
def process(logger: Any) -> Iterator[Process]:
    """A controller in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="hf-") as directory:
        made = Process(Path(directory), logger.address)
        try:
            yield made
        finally:
            if made.process.poll() is None:
                made.process.kill()
            made.end()


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "lifeline"])
async def test_it_stops_and_leaves_nothing(process: Process, how: str, bench_of: Any) -> None:
    """A signal, or the end of its parent, stops it with status 0, streams and all, and its socket is gone."""
    assert process.said == f"hayflick_controller listening on {process.address}\n"
    bench = bench_of(process.address)
    await bench.node()  # a stream that would never end by itself
    if how == "lifeline":
        os.close(process.lifeline)
        process.lifeline = -1
    else:
        process.process.send_signal(signal.Signals[how])
    log = process.end()
    await bench.hang_up()
    assert process.process.returncode == 0, log
    assert not (process.directory / "controller.sock").exists()
    assert "Traceback" not in log


async def test_a_crash_loses_nothing(process: Process, logger: Any, bench_of: Any) -> None:
    """After a crash a contract, its workers and its slots are there, and its manifests still count once."""
    bench = bench_of(process.address)
    contract = await bench.contract_when_ready()
    node = await bench.node()
    manifest = await bench.issue(contract.contract_id)
    worker = await node.register(manifest)
    process.process.kill()
    log = process.end()
    await bench.hang_up()
    assert SECRET not in log
    again = Process(process.directory, logger.address)
    try:
        bench = bench_of(again.address)
        await bench.contract_when_ready()
        assert (await bench.worker(worker.worker_id)).worker_id == worker.worker_id
        back = await bench.node(node.node_id)
        with pytest.raises(Exception, match="registered before"):
            await back.register(manifest)
        await bench.hang_up()
    finally:
        again.process.terminate()
        again.end()


@pytest.mark.parametrize("answered", [True, False], ids=["in time", "too late"])
async def test_sigterm_amid_requests_loses_none(
    logger: Any, bench_of: Any, request_id: Any, answered: bool
) -> None:
    """What runs when the signal comes is answered, if it is recorded; sent again, it is done once."""
    with tempfile.TemporaryDirectory(prefix="hf-") as directory:
        first = Process(Path(directory), logger.address, "--drain-seconds", "20" if answered else "0.5")
        bench = bench_of(first.address)
        contract_id = (await bench.contract_when_ready(max_replicas=20)).contract_id
        node = await bench.node()
        births = {request_id(): await bench.issue(contract_id) for _ in range(5)}
        issues = [request_id() for _ in range(5)]

        def everything(by: Any, of: Any) -> list[Any]:
            asked = [of.issue(contract_id, request_id=name) for name in issues]
            return asked + [by.register(manifest, name) for name, manifest in births.items()]

        with logger.frozen():  # so that all are decided, and none is answered
            tasks = [asyncio.create_task(request) for request in everything(node, bench)]
            while await _population(bench, contract_id) != (5, 5):
                pass
            first.process.send_signal(signal.SIGTERM)
            await node.wait_closed()  # it is draining
            if not answered:
                log = await asyncio.to_thread(first.end)
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        if answered:
            log = await asyncio.to_thread(first.end)
        assert first.process.returncode == 0, log
        assert [isinstance(one, Exception) for one in answers] == [not answered] * 10, answers
        await bench.hang_up()
        again = Process(Path(directory), logger.address)
        try:
            bench = bench_of(again.address)
            await bench.contract_when_ready()
            back = await bench.node(node.node_id, birth_worker_ids=_workers(births))
            repeated = await asyncio.gather(*everything(back, bench))
            if answered:
                assert repeated == answers
            assert {one.worker_id for one in repeated[5:]} == set(_workers(births))
            assert await _population(bench, contract_id) == (5, 5)
            await bench.hang_up()
        finally:
            again.process.terminate()
            again.end()


async def test_a_crash_lifts_no_restraint(
    process: Process, logger: Any, bench_of: Any, denied: Any, request_id: Any
) -> None:
    """A controller that was killed comes back with every quarantine, cooldown and reservation that it had."""
    bench = bench_of(process.address)
    await bench.contract_when_ready()
    contract_id = (await bench.contract(max_replicas=5, cooldown=600)).contract_id
    node = await bench.node()
    suspect, parent = await bench.born(node, contract_id), await bench.born(node, contract_id)
    await node.beat()
    engage = pb.QuarantineWorkerRequest(request_id=request_id(), worker_id=suspect.worker_id, reason="test")
    assert (await bench.stub.QuarantineWorker(engage)).worker_ids
    child = await bench.issue(contract_id, parent.worker_id)  # begins a cooldown, and reserves
    reserved = await bench.issue(contract_id)
    process.process.kill()
    process.end()
    await bench.hang_up()
    again = Process(process.directory, logger.address)
    try:
        bench = bench_of(again.address)
        await bench.contract_when_ready()
        back = await bench.node(node.node_id, worker_ids=[suspect.worker_id, parent.worker_id])
        (freeze, *_) = await back.wait_order("freeze")
        assert freeze.freeze.worker_id == suspect.worker_id
        assert (await bench.worker(suspect.worker_id)).state == resources_pb2.STATE_QUARANTINED
        birth = bench.issue(contract_id, suspect.worker_id)
        assert (await denied(birth)).reason_name == "QUARANTINED"
        refusal = await denied(bench.issue(contract_id, parent.worker_id))
        assert refusal.reason_name == "COOLDOWN_NOT_SATISFIED"
        assert 500 < refusal.retry_after_seconds <= 600
        await bench.issue(contract_id)
        assert (await denied(bench.issue(contract_id))).reason_name == "REPLICA_QUOTA_EXCEEDED"
        for manifest in (child, reserved):
            assert (await back.register(manifest)).worker_id == manifest.worker_id
        await bench.hang_up()
    finally:
        again.process.terminate()
        again.end()


async def _population(bench: Any, contract_id: str) -> tuple[int, int]:
    """Return how many hold a slot of a contract: workers, and manifests."""
    read = await bench.stub.GetContract(pb.GetContractRequest(contract_id=contract_id))
    return read.contract.active_count, read.contract.reserved_count


def _workers(births: dict[str, resources_pb2.Manifest]) -> list[str]:
    return [manifest.worker_id for manifest in births.values()]


def test_bad_settings_are_refused() -> None:
    """A setting that cannot be meant ends the process with status 2 and its name."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "hayflick_controller", "--listen", "unix:///x"),
            *("--data-dir", "/nowhere", "--logger", "unix:///y", "--lease-seconds", "nan"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "lease_seconds" in done.stderr


@pytest.fixture
def bench_of(bench_class: Any, logger: Any) -> Any:
    """The maker of clients of a controller in another process."""

    def make(address: str) -> Any:
        bench = bench_class(Path("/"), logger)
        bench.use(connect(address))
        return bench

    return make
