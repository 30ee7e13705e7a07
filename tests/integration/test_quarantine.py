"""Quarantine from outside: a family stands still, its channels are cut, and nothing of it is lost."""

from __future__ import annotations

import json
import os
import queue
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from hayflick.v1 import controller_pb2
from hayflick.v1.orchestrator_pb2 import LaunchWorkerRequest
from hayflick.v1.resources_pb2 import State, Worker

from .conftest import Stack, call, command, duration, refused, request_id, running_stack, shell, until

if TYPE_CHECKING:
    from hayflick.v1.orchestrator_pb2 import RunTaskResponse, TaskResult

pytestmark = pytest.mark.layers("kill")  # quarantine is a freeze


def quarantine(stack: Stack, worker: Worker) -> list[str]:
    """Freeze a worker; return who stands still."""
    request = controller_pb2.QuarantineWorkerRequest(
        request_id=request_id(), worker_id=worker.worker_id, reason="look"
    )
    return list(stack.controller.QuarantineWorker(request).worker_ids)


def release(stack: Stack, worker: Worker) -> list[str]:
    """Thaw a worker; return who goes on."""
    request = controller_pb2.ReleaseQuarantineRequest(
        request_id=request_id(), worker_id=worker.worker_id, reason="fine"
    )
    return list(stack.controller.ReleaseQuarantine(request).worker_ids)


class Reader:
    """Reads a task's stream in a thread, as a client does."""

    def __init__(self, stream: Any) -> None:
        self._queue: queue.Queue[RunTaskResponse | None] = queue.Queue()
        self.printed = b""
        self.result: TaskResult | None = None
        self._thread = threading.Thread(target=self._read, args=(stream,))
        self._thread.start()

    def _read(self, stream: Any) -> None:
        for response in stream:
            self._queue.put(response)
        self._queue.put(None)

    def take(self, seconds: float) -> bool:
        """Take the next response; return whether one came in time."""
        try:
            response = self._queue.get(timeout=seconds)
        except queue.Empty:
            return False
        if response is None:
            self._thread.join()
            return False
        self.printed += response.output.data
        if response.HasField("result"):
            self.result = response.result
        return True

    def rest(self) -> None:
        """Read to the end."""
        while self.take(60):
            pass


def test_who_is_being_born_does_not_come_to_life(own_stack: Stack) -> None:
    """A worker that is quarantined while its sandbox is being built runs nothing, and its slot comes back."""
    stack = own_stack
    contract = stack.contract(max_replicas=1)
    manifest = stack.manifest(contract)
    launch = LaunchWorkerRequest(request_id=request_id(), manifest=manifest)
    orchestrator = stack.processes["orchestrator"].pid
    zygote = int(Path(f"/proc/{orchestrator}/task/{orchestrator}/children").read_text().split()[0])
    with ThreadPoolExecutor() as pool:
        os.kill(zygote, signal.SIGSTOP)
        try:
            launching = pool.submit(stack.orchestrator.LaunchWorker, launch)
            worker = until(lambda: _registered(stack, contract))
            freezing = pool.submit(quarantine, stack, worker)
            # Nothing can be confirmed while the zygote stands still, and the order is there by then.
            assert not wait([freezing], timeout=1.0).done
        finally:
            os.kill(zygote, signal.SIGCONT)
        with refused("QUARANTINED"):
            launching.result()
        assert freezing.result() == [worker.worker_id]
    with pytest.raises(grpc.RpcError):
        stack.run(worker, command("true"))
    assert stack.end_reason(worker.worker_id) == "LAUNCH_FAILED"
    assert "worker_started" not in stack.events(worker.worker_id)
    until(lambda: not stack.sandboxes())
    stack.stop(stack.launch(contract))


def _registered(stack: Stack, contract: str) -> Worker | None:
    listed = stack.controller.ListWorkers(controller_pb2.ListWorkersRequest(contract_id=contract)).workers
    return listed[0] if listed else None


def test_not_one_byte_is_lost_or_doubled(stack: Stack) -> None:
    """While frozen, nothing arrives; in the end, all that was printed arrived once, in its order."""
    worker = stack.launch()
    count = 60_000
    script = f"i=0; while [ $i -lt {count} ]; do echo $i; i=$((i+1)); done"
    reader = Reader(stack.begin(worker, shell(script)))
    for _ in range(4):
        quarantine(stack, worker)
        while reader.take(0.3):
            pass  # what was under way to us when the gate shut
        assert reader.result is None
        assert not reader.take(0.3)
        with refused("QUARANTINED"):
            stack.run(worker, command("true"))
        release(stack, worker)
        assert reader.take(10)
    reader.rest()
    # The stream began after its first chunk, which `begin` took.
    lines = reader.printed.split(b"\n")
    assert lines[-2] == b"%d" % (count - 1)
    whole = b"".join(b"%d\n" % number for number in range(count))
    assert whole.endswith(reader.printed)
    assert len(whole) - len(reader.printed) <= 65_536
    stack.stop(worker)


def replicate_for_ever(worker: Any) -> int:
    """Ask for children until told that there are enough."""
    print("begin", flush=True)
    made = 0
    while True:
        try:
            worker.replicate("more")
            made += 1
        except Exception as error:
            if getattr(error, "reason", "") == "REPLICA_QUOTA_EXCEEDED":
                return made
            if getattr(error, "reason", "") != "QUARANTINED":
                raise


def test_no_replication_from_quarantine(stack: Stack) -> None:
    """Whatever call is under way at the freeze, no child is born until the release; then each is answered."""
    contract = stack.contract(max_replicas=15)
    root = stack.launch(contract)
    reader = Reader(stack.begin(root, call(replicate_for_ever)))
    until(lambda: len(_family(stack, contract)) > 2)
    quarantine(stack, root)
    born = _family(stack, contract)
    for _ in range(10):
        stack.stop(stack.launch())  # the node is busy, and that family is not
    assert _family(stack, contract) == born
    assert len(born) < 15
    assert set(born.values()) == {State.STATE_QUARANTINED}
    release(stack, root)
    reader.rest()
    assert reader.result is not None
    # The one birth that was called off may hold its reservation a while.
    assert json.loads(reader.result.value_json) in (13, 14)
    assert len(_family(stack, contract)) in (14, 15)
    stack.stop(root)


def _family(stack: Stack, contract: str) -> dict[str, int]:
    sandboxes = stack.sandboxes()
    return {
        name: sandbox.worker.state
        for name, sandbox in sandboxes.items()
        if sandbox.worker.contract_id == contract
    }


def shut_down_soon(worker: Any) -> None:
    """Call Shutdown again and again, of a child that is not there and then of itself."""
    print("begin", flush=True)
    import time

    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        pass
    worker.shutdown()


def test_no_shutdown_from_quarantine(stack: Stack) -> None:
    """A worker cannot end itself from quarantine: who is to be looked at stays to be looked at."""
    worker = stack.launch()
    reader = Reader(stack.begin(worker, call(shut_down_soon)))
    quarantine(stack, worker)
    assert not reader.take(1.0)
    assert stack.sandboxes()[worker.worker_id].worker.state == State.STATE_QUARANTINED
    release(stack, worker)
    reader.rest()
    assert stack.end_reason(worker.worker_id) == "COMPLETED"


def test_timeouts_stand_still(stack: Stack) -> None:
    """A task's timeout does not run while its worker is frozen."""
    worker = stack.launch()
    started = time.monotonic()
    reader = Reader(stack.begin(worker, shell("echo x; sleep 0.2; echo y", timeout=1.5)))
    quarantine(stack, worker)
    assert not reader.take(2.0)
    assert time.monotonic() - started > 1.5
    release(stack, worker)
    reader.rest()
    assert reader.printed == b"y\n"
    assert stack.sandboxes()[worker.worker_id].worker.state == State.STATE_RUNNING
    stack.stop(worker)


def test_no_beat_from_quarantine() -> None:
    """A frozen worker is neither heard nor missed, and has its full time to beat again after the release."""
    with running_stack(orchestrator={"heartbeat-timeout-seconds": "1.5"}) as stack:
        worker, other = stack.launch(), stack.launch()
        quarantine(stack, worker)
        heard = stack.sandboxes()[worker.worker_id].worker.last_heartbeat_time.ToNanoseconds()

        def beats(of: Worker) -> int:
            return stack.sandboxes()[of.worker_id].worker.last_heartbeat_time.ToNanoseconds()

        begun = beats(other)
        until(lambda: beats(other) - begun > 3e9)
        assert beats(worker) == heard
        assert stack.worker(worker.worker_id).state == State.STATE_QUARANTINED
        release(stack, worker)
        until(lambda: beats(worker) > heard)
        until(lambda: beats(worker) - heard > 5e9)
        assert stack.run(worker, command("echo", "here")).stdout == b"here\n"
        stack.stop(worker)
        stack.stop(other)


def test_killed_in_quarantine(stack: Stack) -> None:
    """A kill ends a frozen family at once, and what was held of its output is never delivered."""
    root = stack.launch()
    child = stack.launch(root.contract_id, root.worker_id)
    reader = Reader(stack.begin(child, shell("echo x; while :; do echo held; done")))
    quarantine(stack, root)
    while reader.take(0.3):
        pass
    before = reader.printed
    answer = stack.kill(worker_id=root.worker_id)
    assert set(answer.worker_ids) == {root.worker_id, child.worker_id}
    reader.rest()
    assert reader.printed == before
    assert reader.result is not None
    assert stack.end_reason(child.worker_id) == "KILL_SWITCH"


def test_life_by_contract_ends_in_quarantine(stack: Stack) -> None:
    """A worker that expires while it is frozen ends, as the contract says."""
    worker = stack.launch(stack.contract(expiration=duration(1.5)))
    quarantine(stack, worker)
    assert stack.end_reason(worker.worker_id) == "EXPIRED"


@pytest.mark.parametrize("first", ["parent", "child"])
def test_one_quarantine_within_another(stack: Stack, first: str) -> None:
    """A release lets nobody go whom another quarantine still holds."""
    root = stack.launch()
    child = stack.launch(root.contract_id, root.worker_id)
    for worker in (root, child):
        quarantine(stack, worker)
    one, other = (root, child) if first == "parent" else (child, root)
    release(stack, one)
    states = {name: it.worker.state for name, it in stack.sandboxes().items()}
    assert states[child.worker_id] == State.STATE_QUARANTINED
    with refused("QUARANTINED"):
        stack.run(child, command("true"))
    release(stack, other)
    for worker in (root, child):
        assert stack.run(worker, command("echo", "on")).stdout == b"on\n"
    stack.stop(root)


def test_a_call_in_flight_is_answered(stack: Stack) -> None:
    """A parent that waits for its child's task gets the rest of it when the child is released."""

    def drive(worker: Any) -> Any:
        child = worker.replicate("help")
        print(child.worker_id, flush=True)

        def work(inner: Any) -> int:
            print("at work", flush=True)
            return sum(range(20_000_000))

        return child.perform_task(work)

    root = stack.launch(stack.contract(), memory_limit_bytes=128 * 1024 * 1024)
    stream = stack.orchestrator.RunTask(_run(root, call(drive)))
    assert next(stream).HasField("started")
    said = ""
    while "at work" not in said:
        said += next(stream).output.data.decode()
    child = Worker(worker_id=said.split()[0])
    quarantine(stack, child)
    reader = Reader(stream)
    assert not reader.take(0.5)
    release(stack, child)
    reader.rest()
    assert reader.result is not None
    assert json.loads(reader.result.value_json) == sum(range(20_000_000))
    stack.stop(root)


def _run(worker: Worker, task: Any) -> Any:
    from hayflick.v1.orchestrator_pb2 import RunTaskRequest

    return RunTaskRequest(worker_id=worker.worker_id, task=task)
