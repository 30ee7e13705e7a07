"""Limits that bite: memory, CPU, CPU time, processes."""

from __future__ import annotations

import time
from typing import Any

from google.protobuf.duration_pb2 import Duration

from .conftest import MIB, Stack, call, shell


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


def test_cpu_share(stack: Stack) -> None:
    """A worker that spins gets its share of a CPU, within 15 %."""
    worker = stack.launch(cpu_millis=300)

    def task(me: Any) -> list[float]:
        import time

        wall, cpu = time.monotonic(), time.process_time()
        while time.monotonic() - wall < 3:
            pass
        return [time.monotonic() - wall, time.process_time() - cpu]

    ran = stack.run(worker, call(task))
    wall, cpu = (float(part) for part in ran.result.value_json.strip("[]").split(","))
    assert abs(cpu / wall - 0.3) <= 0.3 * 0.15
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
