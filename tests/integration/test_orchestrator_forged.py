"""What a manifest that nobody has believed yet can do: nothing."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from hayflick.v1 import orchestrator_pb2 as opb
from hayflick.v1.resources_pb2 import Manifest, State

from .conftest import refused, request_id, running_stack, until


@pytest.mark.slow
def test_a_forged_manifest_cannot_end_a_living_worker() -> None:
    """A manifest that names somebody's worker, shown while the controller is away, ends nobody."""
    with running_stack(controller={"lease-seconds": "60"}) as stack:
        worker = stack.launch()
        host_pid = stack.sandboxes()[worker.worker_id].host_pid
        forged = Manifest()
        forged.CopyFrom(worker.manifest)
        forged.signature = b"\0" * 32
        stack.end("controller", signal.SIGKILL)
        with refused("SERVICE_UNAVAILABLE"):
            stack.orchestrator.LaunchWorker(opb.LaunchWorkerRequest(request_id=request_id(), manifest=forged))
        stack.start("controller")
        # Its next beat proves it: the node is back, and had its chance to do harm.
        until(lambda: stack.worker(worker.worker_id).state == State.STATE_RUNNING)
        until(lambda: stack.worker(worker.worker_id).usage.memory_bytes > 0)
        assert stack.worker(worker.worker_id).state == State.STATE_RUNNING
        assert Path(f"/proc/{host_pid}").exists()
        assert stack.stop(worker).state == State.STATE_ENDED
