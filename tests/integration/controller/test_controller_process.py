"""The process: it says where it listens, keeps its secrets, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hayflick_rpc.channel import connect

SECRET = "my-secret-key"


class Process:
    """``python -m hayflick_controller``."""

    def __init__(self, directory: Path, logger: str) -> None:
        self.directory = directory
        self.address = f"unix://{directory}/controller.sock"
        reader, self.lifeline = os.pipe()
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "hayflick_controller"),
                *("--listen", self.address, "--data-dir", str(directory / "controller")),
                *("--logger", logger, "--lifeline-fd", str(reader)),
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
