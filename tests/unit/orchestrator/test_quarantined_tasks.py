"""A task whose sandbox is quarantined: nothing of it passes, nothing of it is lost."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

from hayflick_orchestrator.gates import Gate
from hayflick_orchestrator.requests import TaskSpec
from hayflick_orchestrator.sandboxes import Sandbox
from hayflick_orchestrator.tasks import TaskRun
from hayflick_sandbox import frames
from hayflick_sandbox.messages import Beat

from .conftest import Body, Peer

if TYPE_CHECKING:
    from hayflick_orchestrator.control import Emit, Json

Pair = tuple[Sandbox, Peer]
EXEC = TaskSpec(kind="exec", argv=("program",))
CALL = TaskSpec(kind="call", entry="module:function", payload=b"payload")
# How long nothing is watched not to happen.
QUIET_SECONDS = 0.2


async def printed(run: TaskRun) -> bytes:
    """Return what a task prints on standard output, to its end."""
    return b"".join([data async for output, data in run.chunks() if output.name == "STDOUT"])


async def nothing(task: asyncio.Task[object]) -> None:
    """Watch that *task* does not come to an end."""
    await asyncio.wait({task}, timeout=QUIET_SECONDS)
    assert not task.done()


@pytest.mark.parametrize("peeked", [False, True])
async def test_output_waits_for_the_release(pair: Pair, *, peeked: bool) -> None:
    """What a task printed before the freeze arrives after it, every byte once, also if evidence saw it."""
    sandbox, peer = pair

    def program(body: Body) -> int:
        os.write(body.stdout, b"before ")
        body.killed.wait(5)
        os.write(body.stdout, b"after")
        body.close()
        return 0

    peer.program = program
    run = TaskRun(sandbox, EXEC)
    run.start()
    sandbox.gate.shut()
    reading = asyncio.create_task(printed(run))
    await nothing(reading)
    assert sandbox.transcript.pieces == ()
    if peeked:
        assert sandbox.peeks[run.task_id]() == {"stdout": b"before ", "stderr": b""}
        assert sandbox.peeks[run.task_id]() == {"stdout": b"before ", "stderr": b""}
    sandbox.gate.open()
    peer.bodies[run.task_id].killed.set()
    assert await reading == b"before after"
    assert [bytes(piece.data) for piece in sandbox.transcript.pieces] == [b"before after"]
    assert (await run.end()).exit_code == 0
    assert sandbox.peeks == {}


async def test_a_call_waits_for_the_release(pair: Pair) -> None:
    """A call that is made, or lies buffered, when the gate shuts is acted upon when it opens."""
    sandbox, peer = pair
    acted: list[str] = []
    loop, started = asyncio.get_running_loop(), asyncio.Event()

    async def dispatch(method: str, request: Json, emit: Emit) -> Json:
        acted.append(method)
        return {"done": True}

    def program(body: Body) -> int:
        assert body.control is not None
        frames.read_frame(body.control)
        loop.call_soon_threadsafe(started.set)
        body.killed.wait(5)
        for number in (1, 2):
            header = {"type": "call", "id": number, "method": f"call-{number}", "request": {}}
            frames.write_frame(body.control, header)
        answers = [frames.read_frame(body.control) for _ in range(2)]
        assert all(answer and answer[0]["response"] == {"done": True} for answer in answers)
        frames.write_frame(body.control, {"type": "result"}, b"1")
        body.close()
        return 0

    peer.program = program
    run = TaskRun(sandbox, CALL, dispatch)
    run.start()
    await started.wait()
    sandbox.gate.shut()
    peer.bodies[run.task_id].killed.set()
    ending = asyncio.create_task(run.end())
    await nothing(ending)
    assert acted == []
    sandbox.gate.open()
    assert (await ending).value_json == "1"
    assert sorted(acted) == ["call-1", "call-2"]


async def test_a_taken_call_is_not_acted_upon(pair: Pair) -> None:
    """A call that was read from its stream just before the gate shuts waits like any other."""
    sandbox, peer = pair
    acted: list[str] = []

    async def dispatch(method: str, request: Json, emit: Emit) -> Json:
        acted.append(method)
        # The first of two frames in one packet: what follows must not pass any more.
        sandbox.gate.shut()
        return {}

    def program(body: Body) -> int:
        assert body.control is not None
        frames.read_frame(body.control)
        calls = [
            frames.encode({"type": "call", "id": number, "method": "Shutdown", "request": {}})
            for number in range(5)
        ]
        body.control.sendall(b"".join(calls))
        for _ in calls:
            frames.read_frame(body.control)
        body.close()
        return 0

    peer.program = program
    run = TaskRun(sandbox, CALL, dispatch)
    run.start()
    ending = asyncio.create_task(run.end())
    for count in range(1, 6):
        await nothing(ending)
        assert len(acted) == count
        sandbox.gate.open()
    await ending


async def test_time_stands_still(pair: Pair) -> None:
    """A task's timeout does not run in quarantine, and runs on after it."""
    sandbox, peer = pair

    def program(body: Body) -> int:
        body.killed.wait(5)
        body.close()
        return -signal.SIGKILL

    peer.program = program
    run = TaskRun(sandbox, TaskSpec(kind="exec", argv=("program",), timeout_seconds=0.1))
    run.start()
    sandbox.gate.shut()
    ending = asyncio.create_task(run.end())
    await nothing(ending)
    assert peer.signals == []
    sandbox.gate.open()
    end = await ending
    assert end.timed_out
    assert peer.signals == [(run.task_id, signal.SIGKILL)]


async def test_killed_in_quarantine(pair: Pair) -> None:
    """When the worker dies in quarantine, what was held of it is given up, and its end is untold."""
    sandbox, peer = pair

    def program(body: Body) -> int:
        os.write(body.stdout, b"held")
        body.close()
        return 0

    peer.program = program
    run = TaskRun(sandbox, EXEC)
    sandbox.gate.shut()
    run.start()
    reading = asyncio.create_task(printed(run))
    await nothing(reading)
    sandbox.stillborn("killed", 0, "for the test")
    assert await reading == b""
    end = await run.end()
    assert (end.exit_code, end.signal) == (None, None)


async def test_a_beat_in_quarantine_is_not_heard(pair: Pair) -> None:
    """What init says waits in its socket while the gate is shut, and is read when it opens."""
    sandbox, peer = pair
    sandbox.gate.shut()
    before = sandbox.last_beat_monotonic
    peer.say(Beat(0))
    sandbox.hear()
    await asyncio.wait({asyncio.create_task(asyncio.sleep(0.05))})
    assert sandbox.last_beat_monotonic == before
    sandbox.gate.open()
    deadline = time.monotonic() + 5
    while sandbox.last_beat_monotonic == before:
        assert time.monotonic() < deadline
        await asyncio.sleep(0)


async def test_a_caller_that_hangs_up_in_quarantine(pair: Pair) -> None:
    """A caller may leave while the worker stands still; its task is then ended when the worker goes on."""
    sandbox, peer = pair

    def program(body: Body) -> int:
        body.killed.wait(5)
        body.close()
        return -signal.SIGKILL

    peer.program = program
    run = TaskRun(sandbox, EXEC)
    run.start()
    sandbox.gate.shut()
    reading = asyncio.create_task(printed(run))
    await asyncio.sleep(0)
    run.cancel()
    assert await reading == b""
    ending = asyncio.create_task(run.end())
    await nothing(ending)
    sandbox.gate.open()
    assert (await ending).cancelled


async def test_a_gate_turns_for_all_who_wait() -> None:
    """Everybody who waits passes when the gate opens, also after one of them gave up."""
    turns: list[bool] = []
    gate = Gate(lambda: turns.append(gate.is_open))
    gate.shut()
    gate.shut()
    waiting = [asyncio.create_task(gate.passage()) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.sleep(0)
    gate.open()
    assert await asyncio.gather(*waiting[1:]) == [True, True]
    assert turns == [False, True]
    assert not await gate.first([], 0.01)
