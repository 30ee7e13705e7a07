"""Tasks in real workers: output, results, ends, cancellation."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from hayflick.v1 import orchestrator_pb2 as opb
from hayflick.v1.resources_pb2 import EndReason

from .conftest import MIB, PYTHON, Stack, call, command, groups, refused, shell, until


def test_a_command_speaks(stack: Stack) -> None:
    """What a command prints arrives on its own stream, and its exit code with it."""
    worker = stack.launch()
    ran = stack.run(worker, shell("echo out; echo err >&2; exit 0"))
    assert (ran.stdout, ran.stderr, ran.outcome) == (b"out\n", b"err\n", "SUCCEEDED")
    ran = stack.run(worker, shell("exit 7"), keep=True)
    assert (ran.outcome, ran.result.exit_code) == ("FAILED", 7)
    ran = stack.run(worker, shell("kill -SEGV $$"), keep=True)
    assert (ran.outcome, ran.result.signal) == ("SIGNALED", signal.SIGSEGV)
    stack.stop(worker)


def test_a_callable_returns(stack: Stack) -> None:
    """A callable sees its worker and returns a JSON value."""
    worker = stack.launch()

    def task(me: Any) -> dict[str, Any]:
        print("hello from", me.worker_id)
        return {"id": me.worker_id, "snapshot": me.manifest.state_snapshot}

    ran = stack.run(worker, call(task))
    assert ran.stdout.decode() == f"hello from {worker.worker_id}\n"
    assert json.loads(ran.result.value_json) == {"id": worker.worker_id, "snapshot": {"job": "test"}}
    stack.stop(worker)


def test_an_exception_is_data(stack: Stack) -> None:
    """What a callable raises arrives as text, and ends the worker unless it is to be kept."""
    worker = stack.launch()

    def task(me: Any) -> None:
        raise KeyError("nothing here")

    ran = stack.run(worker, call(task), keep=True)
    assert (ran.outcome, ran.result.exception.type) == ("FAILED", "builtins.KeyError")
    assert "nothing here" in ran.result.exception.message
    assert "Traceback" in ran.result.exception.traceback
    assert ran.result.end_reason == EndReason.END_REASON_UNSPECIFIED
    ran = stack.run(worker, call(task))
    assert ran.result.end_reason == EndReason.END_REASON_TASK_ERROR
    assert stack.end_reason(worker.worker_id) == "TASK_ERROR"


def test_a_result_that_is_not_json(stack: Stack) -> None:
    """A callable that returns what JSON cannot say fails by name."""
    worker = stack.launch()
    ran = stack.run(worker, call(lambda me: object()))
    assert (ran.outcome, ran.result.exception.type) == ("FAILED", "replication.TaskResultError")


def test_another_python_is_refused(stack: Stack) -> None:
    """What another Python pickled never reaches the sandbox."""
    worker = stack.launch()
    task = call(lambda me: None)
    task.python.python_version = "2.7"
    with refused("PYTHON_VERSION_MISMATCH"):
        stack.run(worker, task)
    assert PYTHON != "2.7"
    assert stack.run(worker, command("true")).outcome == "SUCCEEDED"
    stack.stop(worker)


def test_lines_keep_their_order(stack: Stack) -> None:
    """Ten thousand lines arrive as they were printed."""
    worker = stack.launch()
    ran = stack.run(worker, shell("i=0; while [ $i -lt 10000 ]; do echo $i; i=$((i+1)); done"))
    assert ran.stdout.split() == [str(number).encode() for number in range(10_000)]
    stack.stop(worker)


def test_a_flood_slows_itself(stack: Stack) -> None:
    """A task that floods output while nobody reads takes the orchestrator no memory and loses no byte."""
    worker = stack.launch()
    pid = stack.processes["orchestrator"].pid
    total = 256 * MIB
    stream = stack.begin(worker, command("head", "-c", str(total), "/dev/zero"))
    before = _rss_bytes(pid)
    # While it waits for us, others are served.
    other = stack.launch()
    assert stack.run(other, command("echo", "hi")).stdout == b"hi\n"
    assert _rss_bytes(pid) - before < 32 * MIB
    received, peak, outcome = 0, 0, 0
    for response in stream:
        received += len(response.output.data)
        peak = max(peak, _rss_bytes(pid)) if received % (16 * MIB) < 64 * 1024 else peak
        outcome = response.result.outcome or outcome
    assert total - received <= 64 * 1024  # begin() took the first piece
    assert outcome == opb.TaskOutcome.TASK_OUTCOME_SUCCEEDED
    assert peak - before < 64 * MIB
    stack.stop(worker)
    stack.stop(other)


def _rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def test_a_background_child_delays_nothing(stack: Stack) -> None:
    """A child that holds the task's output does not keep the result back."""
    worker = stack.launch()
    started = time.monotonic()
    ran = stack.run(worker, shell("sleep 60 & echo done"))
    assert (ran.stdout, ran.outcome) == (b"done\n", "SUCCEEDED")
    assert time.monotonic() - started < 5
    stack.stop(worker)


def test_deadline(stack: Stack) -> None:
    """A task that runs past its deadline is killed, though it ignores every signal it can."""
    worker = stack.launch()
    ran = stack.run(
        worker, shell("trap '' TERM INT HUP; echo x; while :; do sleep 1; done", timeout=0.5), keep=True
    )
    assert (ran.outcome, ran.stdout) == ("TIMED_OUT", b"x\n")
    assert stack.run(worker, command("true")).outcome == "SUCCEEDED"
    stack.stop(worker)


@pytest.mark.layers("pids")
def test_hanging_up_ends_the_task(stack: Stack) -> None:
    """When the caller hangs up, its task dies with all it started, and the worker lives on."""
    worker = stack.launch()
    stream = stack.begin(worker, shell("trap '' TERM; setsid sleep 300 & sleep 301 & echo x; wait"))
    assert _pids(stack, worker.worker_id) >= 4
    stream.cancel()
    until(lambda: _pids(stack, worker.worker_id) == 1)
    assert stack.run(worker, command("true")).outcome == "SUCCEEDED"
    until(lambda: stack.events(worker.worker_id).count("task_finished") == 2)
    stack.stop(worker)


def _pids(stack: Stack, worker_id: str) -> int:
    path = stack.sandboxes()[worker_id].cgroup_path
    (file,) = groups(f"{stack.node_id}/{path}/self/pids.current")
    return int(file.read_text())


def test_garbage_on_the_control_stream(stack: Stack) -> None:
    """A task that breaks the protocol fails as that, and nobody else notices."""
    worker = stack.launch()

    def task(me: Any) -> None:
        import os

        os.write(3, b"\xff" * 4096)
        import time

        time.sleep(60)

    ran = stack.run(worker, call(task))
    assert (ran.outcome, ran.result.exception.type) == ("FAILED", "hayflick.ProtocolViolation")
    assert ran.result.end_reason == EndReason.END_REASON_PROTOCOL_VIOLATION
    other = stack.launch()
    assert stack.run(other, command("true")).outcome == "SUCCEEDED"
    stack.stop(other)


def test_a_hanging_task_leaves_its_worker_alive(stack: Stack) -> None:
    """While one task hangs, the worker beats and runs others."""
    worker = stack.launch()
    stream = stack.begin(worker, shell("echo x; sleep 100"))
    first = stack.worker(worker.worker_id).last_heartbeat_time.ToMilliseconds()
    until(lambda: stack.worker(worker.worker_id).last_heartbeat_time.ToMilliseconds() > first)
    assert stack.run(worker, command("echo", "other")).stdout == b"other\n"
    stream.cancel()
    stack.stop(worker)


def test_stop_with_grace(stack: Stack) -> None:
    """With a grace, a task hears SIGTERM and may finish what it does."""
    from .conftest import duration

    worker = stack.launch()
    stream = stack.begin(worker, shell("trap 'echo bye; exit 0' TERM; echo x; while :; do sleep 0.05; done"))
    started = time.monotonic()
    stack.stop(worker, grace=duration(20))
    assert time.monotonic() - started < 10
    responses = list(stream)
    printed = [it.output.data for it in responses if it.output.stream == opb.Stream.STREAM_STDOUT]
    assert b"".join(printed) == b"bye\n"
    assert responses[-1].result.outcome == opb.TaskOutcome.TASK_OUTCOME_SUCCEEDED


def test_stop_under_a_task(stack: Stack) -> None:
    """A task whose worker is stopped learns so, with the reason."""
    worker = stack.launch()
    stream = stack.begin(worker, shell("trap '' TERM; echo x; sleep 100"))
    stack.stop(worker, reason=EndReason.END_REASON_KILLED)
    result = list(stream)[-1].result
    assert result.outcome == opb.TaskOutcome.TASK_OUTCOME_WORKER_ENDED
    assert result.end_reason == EndReason.END_REASON_KILLED


@pytest.mark.parametrize("task", [command("no-such-program"), command("/workspace")])
def test_programs_that_cannot_run(stack: Stack, task: opb.Task) -> None:
    """A program that is not there, or is none, fails with words and harms nothing."""
    worker = stack.launch()
    ran = stack.run(worker, task, keep=True)
    assert ran.outcome == "FAILED"
    assert ran.result.exit_code in (126, 127)
    assert ran.stderr
    stack.stop(worker)


def test_a_large_result(stack: Stack) -> None:
    """A result of many megabytes arrives whole, and one over the limit fails by name."""
    worker = stack.launch(memory_limit_bytes=256 * MIB)
    ran = stack.run(worker, call(lambda me: "x" * (8 * 1024 * 1024)))
    assert len(ran.result.value_json) == 8 * MIB + 2
    ran = stack.run(worker, call(lambda me: "x" * (17 * 1024 * 1024)))
    assert ran.result.exception.type == "replication.TaskResultError"
