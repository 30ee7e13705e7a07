"""Files through the SDK."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from replication import (
    Controller,
    EndReason,
    NotAllowed,
    NotFound,
    ReplicationContract,
    ReplicationDenied,
    ResourceSpec,
    SandboxOrchestrator,
    TaskError,
    TaskKilled,
    TaskTimeout,
    TooLarge,
    Worker,
    WorkerEnded,
)
from replication.testing import embedded


@pytest.fixture(scope="module")
def farm() -> Iterator[tuple[ReplicationContract, Controller, SandboxOrchestrator]]:
    """Services, and a contract."""
    with embedded():
        contract = ReplicationContract(max_depth=1, max_replicas=10, cooldown_seconds=0)
        yield contract, Controller(contract, "only-for-tests"), SandboxOrchestrator()


def born(farm: Any, **resources: Any) -> Worker:
    """Return a worker."""
    contract, controller, orchestrator = farm
    manifest = controller.issue_manifest(None, 0, {}, ResourceSpec(1.0, 128, **resources))
    return Worker(manifest, contract, controller, orchestrator)


def test_there_and_back(farm: Any, tmp_path: Path) -> None:
    """Bytes and open files go in, bytes come out or go to an open file, and tasks see them."""
    data = os.urandom(1_500_000)
    digest = hashlib.sha256(data).hexdigest()
    orchestrator = farm[2]
    (tmp_path / "in").write_bytes(data)
    with born(farm) as worker:
        with (tmp_path / "in").open("rb") as file:
            assert worker.put_file("d/in", file).sha256 == digest
        assert (
            orchestrator.put_file(
                worker.worker_id, "tool", b"#!/bin/sh\nexit 3\n", executable=True
            ).size_bytes
            == 17
        )

        def task(me: Worker) -> str:
            import hashlib
            from pathlib import Path

            Path("out").write_bytes(b"made inside")
            return hashlib.sha256(Path("d/in").read_bytes()).hexdigest()

        assert worker.perform_task(task) == digest
        assert worker.get_file("out") == b"made inside"
        with (tmp_path / "out").open("wb") as file:
            assert orchestrator.get_file(worker, "d/in", into=file) == b""
        assert (tmp_path / "out").read_bytes() == data


def test_errors_of_files(farm: Any) -> None:
    """Each refusal is an exception of its own kind, and a reader that fails writes nothing."""

    class Broken(io.BytesIO):
        def read(self, *_: Any) -> bytes:
            if self.tell():
                raise RuntimeError("the disk is gone")
            return super().read(10)

    with born(farm, workspace_limit_mb=1) as worker:
        worker.perform_command(["ln", "-s", "/etc/passwd", "link"])
        for path, kind in (("link", NotAllowed), ("no", NotFound)):
            with pytest.raises(kind):
                worker.get_file(path)
        with pytest.raises(TooLarge):
            worker.put_file("big", bytes(2 << 20))
        with pytest.raises(RuntimeError, match="disk"):
            worker.put_file("broken", Broken(bytes(100)))
        with pytest.raises(NotFound):
            worker.get_file("broken")
        for wrong in ("text", io.StringIO("text"), None):
            with pytest.raises(ValueError, match=r"^data: "):
                worker.put_file("x", wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"\.\."):
            worker.put_file("../x", b"")
        with pytest.raises(TaskError, match="only from outside"):
            worker.perform_task(lambda me: me.put_file("x", b""))
    with pytest.raises((WorkerEnded, ReplicationDenied)):
        worker.get_file("link")


def test_limits_have_names(farm: Any) -> None:
    """A task over its output or its time is killed by name, and its worker ended under it."""
    worker = born(farm, output_limit_mb=0.125)
    with pytest.raises(TaskKilled) as killed:
        worker.perform_command(["yes"])
    assert killed.value.reason == "OUTPUT_EXCEEDED"
    assert worker.state.exit is not None
    assert worker.state.exit.reason is EndReason.OUTPUT_EXCEEDED
    worker = born(farm)
    with pytest.raises(TaskTimeout):
        worker.perform_command(["sleep", "60"], 0.2)
    assert worker.state.exit is not None
    assert worker.state.exit.reason is EndReason.WALL_TIME_EXCEEDED
