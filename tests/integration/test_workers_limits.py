"""Limits that bite: memory, CPU, CPU time, processes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from hayflick.v1 import orchestrator_pb2 as opb

from .conftest import MIB, Stack, call, command, request_id, running_stack, shell


@pytest.mark.layers("memory")
def test_a_memory_hog(stack: Stack) -> None:
    """A worker that takes twice its memory is ended by the kernel, and named so; its neighbour is not."""
    neighbour = stack.launch()
    hog = stack.launch(memory_limit_bytes=32 * MIB)

    def task(me: Any) -> int:
        return len(bytearray(64 * 1024 * 1024))

    ran = stack.run(hog, call(task), keep=True)
    assert ran.outcome == "OOM_KILLED"
    assert stack.end_reason(hog.worker_id) == "OOM_KILLED"
    assert stack.run(neighbour, shell("true")).outcome == "SUCCEEDED"
    stack.stop(neighbour)


@pytest.mark.layers("memory")
def test_a_child_that_is_killed_for_memory(stack: Stack) -> None:
    """A worker ends as out of memory also when the kernel chose a child of its task."""
    worker = stack.launch(memory_limit_bytes=32 * MIB)

    def task(me: Any) -> int:
        import os

        pid = os.fork()
        if pid == 0:
            bytearray(64 * 1024 * 1024)
            os._exit(0)
        return os.waitpid(pid, 0)[1]

    stack.run(worker, call(task))
    assert stack.end_reason(worker.worker_id) == "OOM_KILLED"


def test_suicide_is_not_want_of_memory(stack: Stack) -> None:
    """A task that kills itself with SIGKILL is told apart from one that the kernel killed for memory."""
    worker = stack.launch()
    ran = stack.run(worker, shell("kill -9 $$"))
    assert ran.outcome == "SIGNALED"
    assert stack.end_reason(worker.worker_id) == "TASK_ERROR"


@pytest.mark.layers("cpu")
def test_cpu_share(stack: Stack) -> None:
    """A worker that spins gets no more than its share of a CPU, and that where the machine is not busy."""
    worker = stack.launch(cpu_millis=300)

    def task(me: Any) -> list[float]:
        import time

        wall, cpu = time.monotonic(), time.process_time()
        while time.monotonic() - wall < 3:
            pass
        return [time.monotonic() - wall, time.process_time() - cpu]

    ran = stack.run(worker, call(task))
    wall, cpu = (float(part) for part in ran.result.value_json.strip("[]").split(","))
    assert 0.3 / 10 <= cpu / wall <= 0.3 * 1.15
    stack.stop(worker)


def test_cpu_time(stack: Stack) -> None:
    """A task that uses up its CPU time ends as that, also when it ignores the warning."""
    for script in ("while :; do :; done", "trap '' XCPU; while :; do :; done"):
        worker = stack.launch(cpu_time_limit=Duration(seconds=1))
        started = time.monotonic()
        ran = stack.run(worker, shell(script))
        assert ran.outcome == "CPU_EXCEEDED"
        assert time.monotonic() - started < 15
        assert stack.end_reason(worker.worker_id) == "CPU_EXCEEDED"


def test_fork_bomb(stack: Stack) -> None:
    """A worker has as many processes as it may, and its orchestrator goes on."""
    worker = stack.launch(pids_limit=10)

    def task(me: Any) -> int:
        import os
        import signal

        children = []
        try:
            while True:
                pid = os.fork()
                if pid == 0:
                    signal.pause()
                children.append(pid)
        except BlockingIOError:
            return len(children)

    ran = stack.run(worker, call(task))
    assert ran.result.value_json == "9"  # the task itself is the tenth
    stack.stop(worker)


def test_usage_is_measured(stack: Stack) -> None:
    """What a worker used is in its record when it ended."""
    worker = stack.launch()
    stack.run(worker, shell("i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done"))
    usage = stack.stop(worker).usage
    assert usage.memory_peak_bytes > 256 * 1024
    assert usage.cpu_time.ToMilliseconds() > 10


CPU_SECOND = {"cpu_time_limit": Duration(seconds=1)}
BREACHES = {
    "exit code": ("exit 3", 60, {}, "FAILED", "TASK_ERROR"),
    "own SIGKILL": ("kill -9 $$", 60, {}, "SIGNALED", "TASK_ERROR"),
    "own SIGXFSZ": ("kill -XFSZ $$", 60, {}, "SIGNALED", "TASK_ERROR"),
    "asleep past the deadline": ("sleep 60", 0.2, {}, "TIMED_OUT", "WALL_TIME_EXCEEDED"),
    "busy past the deadline": ("while :; do :; done", 0.2, {}, "TIMED_OUT", "WALL_TIME_EXCEEDED"),
    "CPU time": ("while :; do :; done", 60, CPU_SECOND, "CPU_EXCEEDED", "CPU_EXCEEDED"),
    "output": ("yes", 60, {"output_limit_bytes": 1_000}, "OUTPUT_EXCEEDED", "OUTPUT_EXCEEDED"),
    "output of one that left": (
        "(setsid yes &) ; sleep 60",
        60,
        {"output_limit_bytes": 1_000},
        "OUTPUT_EXCEEDED",
        "OUTPUT_EXCEEDED",
    ),
    "memory": (
        "python -c 'x = bytearray(64 << 20)'",
        60,
        {"memory_limit_bytes": 32 * MIB},
        "FAILED",  # the shell outlives its child, and says so
        "OOM_KILLED",
    ),
    "memory in files": (
        "exec head -c 64M /dev/zero > /workspace/x",
        60,
        {"memory_limit_bytes": 32 * MIB},
        "OOM_KILLED",
        "OOM_KILLED",
    ),
    "disk": ("head -c 2M /dev/zero > x", 60, {"workspace_limit_bytes": MIB}, "FAILED", "TASK_ERROR"),
    "file size": (
        "exec head -c 2M /dev/zero > x",
        60,
        {"file_size_limit_bytes": MIB},
        "SIGNALED",
        "TASK_ERROR",
    ),
    "processes": ("sleep 9 & sleep 9 & sleep 9 & sleep 9", 60, {"pids_limit": 3}, "FAILED", "TASK_ERROR"),
}


@pytest.mark.parametrize("breach", BREACHES)
@pytest.mark.layers("memory")
def test_each_breach_ends_under_its_own_name(stack: Stack, breach: str) -> None:
    """Whatever a task runs into, its outcome and its worker's end say what it was."""
    script, timeout, resources, outcome, reason = BREACHES[breach]
    worker = stack.launch(**resources)
    ran = stack.run(worker, shell(script, timeout=timeout))
    assert ran.outcome == outcome, ran
    assert stack.end_reason(worker.worker_id) == reason


def test_output_is_exactly_what_it_may_be(stack: Stack) -> None:
    """Of two outputs as much arrives as the limit allows together; a task that prints just that succeeds."""
    worker = stack.launch(output_limit_bytes=100_000)
    flood = "head -c 70000 /dev/zero; head -c {} /dev/zero >&2"
    ran = stack.run(worker, shell(flood.format(30_000)), keep=True)
    assert (ran.outcome, len(ran.stdout), len(ran.stderr)) == ("SUCCEEDED", 70_000, 30_000)
    for more in (30_001, 10**7):
        ran = stack.run(worker, shell(flood.format(more)), keep=True)
        assert (ran.outcome, len(ran.stdout) + len(ran.stderr)) == ("OUTPUT_EXCEEDED", 100_000)
    assert stack.run(worker, command("true")).outcome == "SUCCEEDED"
    stack.stop(worker)


@pytest.mark.parametrize("main", [False, True], ids=["a task", "a main task, whose output nobody reads"])
def test_a_gigabyte_takes_no_memory(stack: Stack, main: bool) -> None:
    """A flood of a gigabyte is cut at the limit, and the orchestrator stays as large as it was."""
    limit = 64 * MIB
    pid = stack.processes["orchestrator"].pid
    flood = command("head", "-c", str(1024 * MIB), "/dev/zero")
    before = peak = _rss_bytes(pid)
    if main:
        manifest = stack.manifest(stack.contract(), output_limit_bytes=limit)
        request = opb.LaunchWorkerRequest(request_id=request_id(), manifest=manifest, main_task=flood)
        worker = stack.orchestrator.LaunchWorker(request).worker
    else:
        worker, received = stack.launch(output_limit_bytes=limit), 0
        for response in stack.orchestrator.RunTask(
            opb.RunTaskRequest(worker_id=worker.worker_id, task=flood)
        ):
            received += len(response.output.data)
            peak = max(peak, _rss_bytes(pid)) if received % (4 * MIB) < 64 * 1024 else peak
        assert received == limit
    assert stack.end_reason(worker.worker_id) == "OUTPUT_EXCEEDED"
    assert max(peak, _rss_bytes(pid)) - before < 32 * MIB


def _rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


@pytest.mark.root  #  it takes the control groups from under a node
def test_memory_where_no_control_group_limits_it() -> None:
    """On a node without a memory control group, a callable's MemoryError is MEMORY_EXCEEDED."""
    # In a mount namespace of its own that controller is nowhere to be seen.
    hide = "for m in $(awk '$3 == \"cgroup\" && $4 ~ /memory/ {print $2}' /proc/mounts); do umount $m; done; "
    prefix = ["unshare", "--mount", "sh", "-c", hide + 'exec "$0" "$@"']
    degraded = {"allow-degraded": "memory"}
    with running_stack(node_prefix=prefix, orchestrator=degraded) as stack:
        worker = stack.launch(memory_limit_bytes=128 * MIB)
        if "memory" not in stack.worker(worker.worker_id).degraded_layers:
            pytest.skip("this machine's memory controller cannot be hidden")
        ran = stack.run(worker, call(lambda me: len(bytearray(1 << 30))), keep=True)
        assert (ran.outcome, ran.result.exception.type) == ("MEMORY_EXCEEDED", "builtins.MemoryError")
        ran = stack.run(worker, call(lambda me: len(bytearray(1 << 30))))
        assert ran.outcome == "MEMORY_EXCEEDED"
        assert stack.end_reason(worker.worker_id) == "MEMORY_EXCEEDED"
        # Of a program nothing is known but its exit code, which is its own.
        worker = stack.launch(memory_limit_bytes=128 * MIB)
        ran = stack.run(worker, command("python", "-c", "bytearray(1 << 30)"))
        assert (ran.outcome, ran.result.exit_code) == ("FAILED", 1)
        assert stack.end_reason(worker.worker_id) == "TASK_ERROR"
