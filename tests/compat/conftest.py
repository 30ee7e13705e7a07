"""A worker large enough for real programs, and the files that they run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hayflick.v1 import logger_pb2
from hayflick.v1 import orchestrator_pb2 as opb
from hayflick.v1.resources_pb2 import NetworkPolicy, Worker

from ..integration.conftest import MIB, Ran, Stack, command, running_stack

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRAMS = Path(__file__).with_name("programs")
# How the names of the tripwire's events begin.
DENIAL = "denial"


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """One stack for all programs."""
    with running_stack() as running:
        yield running


class Machine:
    """A worker, seen as a machine that programs run on."""

    def __init__(self, stack: Stack, worker: Worker) -> None:
        self.stack = stack
        self.worker = worker

    def put(self, path: str, data: bytes, *, executable: bool = False) -> None:
        """Write a file into its workspace."""

        def parts() -> Iterator[opb.PutFileRequest]:
            header = opb.PutFileHeader(worker_id=self.worker.worker_id, path=path, executable=executable)
            yield opb.PutFileRequest(header=header)
            for at in range(0, len(data), MIB):
                yield opb.PutFileRequest(data=data[at : at + MIB])
            yield opb.PutFileRequest(summary=opb.FileSummary(size_bytes=len(data)))

        self.stack.orchestrator.PutFile(parts())

    def run(self, *argv: str) -> str:
        """Run a program to its end and return what it printed; it must succeed."""
        ran: Ran = self.stack.run(self.worker, command(*argv, timeout=60), keep=True)
        assert ran.outcome == "SUCCEEDED", (argv, ran.outcome, ran.result.exit_code, ran.stdout, ran.stderr)
        return ran.stdout.decode()

    def shell(self, interpreter: str, name: str) -> str:
        """Run one of our programs by *interpreter*."""
        self.put(name, (PROGRAMS / name).read_bytes())
        return self.run(interpreter, name)

    def python(self, name: str) -> str:
        """Run one of our Python programs by a fresh interpreter."""
        return self.shell(sys.executable, name)

    def counted(self) -> int:
        """Return how many such attempts its node has refused, which is known at once."""
        return sum(one.count for one in self.stack.sandboxes()[self.worker.worker_id].denials)

    def denials(self) -> list[str]:
        """Return what the record says of refused attempts that only an attack makes."""
        names = logger_pb2.EventFilter(worker_id=self.worker.worker_id)
        events = self.stack.logger.ListEvents(logger_pb2.ListEventsRequest(filter=names)).events
        return [str(one.event.details) for one in events if one.event.event.startswith(DENIAL)]


@pytest.fixture
def machine(stack: Stack) -> Iterator[Machine]:
    """A worker with the room that programs want; none of them may look like an attack."""
    worker = stack.launch(
        memory_limit_bytes=1024 * MIB,
        cpu_millis=2_000,
        pids_limit=256,
        open_files_limit=1_024,
        network=NetworkPolicy(allow_controller=True),
    )
    one = Machine(stack, worker)
    yield one
    denials, counted = one.denials(), one.counted()
    stack.stop(worker)
    assert denials == []
    assert counted == 0


@pytest.fixture
def go_program(tmp_path: Path) -> bytes:
    """The program beside this file, compiled offline and without C."""
    if shutil.which("go") is None:
        pytest.skip("go is not installed on this machine")
    target = tmp_path / "program"
    environment = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=mod", "GOPROXY": "off", "GOWORK": "off"}
    source = PROGRAMS / "goroutines.go"
    subprocess.run(
        ["go", "build", "-o", target, source], check=True, env=environment, cwd=tmp_path, timeout=110
    )
    return target.read_bytes()


def need(program: str) -> str:
    """Return where a program is, or skip saying that it is not installed."""
    path = shutil.which(program, path="/usr/local/bin:/usr/bin:/bin")
    if path is None:
        pytest.skip(f"{program} is not installed on this machine")
    return path
