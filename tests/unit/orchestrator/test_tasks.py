"""A task from start to end, against an init that speaks the real protocol."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_orchestrator.requests import TaskSpec
from hayflick_orchestrator.sandboxes import Death, Sandbox
from hayflick_orchestrator.tasks import CHUNK_BYTES, Output, TaskEnd, TaskRun
from hayflick_rpc.errors import HayflickError
from hayflick_sandbox import frames

from .conftest import Body, Peer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hayflick_orchestrator.control import Emit, Json

Pair = tuple[Sandbox, Peer]
EXEC = TaskSpec(kind="exec", argv=("program",))
CALL = TaskSpec(kind="call", entry="module:function", payload=b"payload", info={"a": 1})


async def collect(run: TaskRun) -> tuple[dict[Output, bytes], TaskEnd]:
    """Return all that a task printed, and how it ended."""
    printed = {Output.STDOUT: b"", Output.STDERR: b""}
    async for output, data in run.chunks():
        assert 0 < len(data) <= CHUNK_BYTES
        printed[output] += data
    return printed, await run.end()


def open_descriptors() -> int:
    """Return how many descriptors this process has."""
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_output_and_exit(pair: Pair) -> None:
    """Each output arrives whole and in order, and the exit code with it."""
    sandbox, peer = pair

    def program(body: Body) -> int:
        for number in range(1_000):
            os.write(body.stdout, b"%d\n" % number)
        os.write(body.stderr, b"oops")
        body.close()
        return 3

    peer.program = program
    run = TaskRun(sandbox, EXEC)
    run.start()
    printed, end = await collect(run)
    assert printed[Output.STDOUT] == b"".join(b"%d\n" % number for number in range(1_000))
    assert printed[Output.STDERR] == b"oops"
    assert (end.exit_code, end.signal, end.cpu_seconds) == (3, None, 0.25)


async def test_a_flood_waits_for_its_reader(pair: Pair) -> None:
    """While nobody reads, a task that floods output is stuck at what one pipe holds."""
    sandbox, peer = pair
    written = 0

    def program(body: Body) -> int:
        nonlocal written
        for _ in range(64):
            written += os.write(body.stdout, b"x" * CHUNK_BYTES)
        body.close()
        return 0

    peer.program = program
    run = TaskRun(sandbox, EXEC)
    run.start()
    chunks = run.chunks()
    _, first = await anext(chunks)
    await asyncio.wait({asyncio.create_task(run.over.wait())}, timeout=0.2)
    assert written <= 2 * CHUNK_BYTES  # one read, one in the pipe
    total = len(first) + sum([len(data) async for _, data in chunks])
    assert total == 64 * CHUNK_BYTES
    await run.end()


async def test_a_child_that_holds_the_pipes_delays_nothing(pair: Pair) -> None:
    """When the task is gone, what is in the pipes is read and the result does not wait for end-of-file."""
    sandbox, peer = pair

    def program(body: Body) -> int:
        os.write(body.stdout, b"last words")
        return 0  # and leaves everything open, as a background child would

    peer.program = program
    run = TaskRun(sandbox, EXEC)
    run.start()
    async with asyncio.timeout(2):
        printed, end = await collect(run)
    assert (printed[Output.STDOUT], end.exit_code) == (b"last words", 0)
    peer.bodies[run.task_id].close()


async def test_deadline(pair: Pair) -> None:
    """A task that runs past its deadline is killed and says so."""
    sandbox, peer = pair

    def program(body: Body) -> int:
        body.killed.wait()
        body.close()
        return -signal.SIGKILL

    peer.program = program
    run = TaskRun(sandbox, TaskSpec(kind="exec", argv=("x",), timeout_seconds=0.05))
    run.start()
    _, end = await collect(run)
    assert (end.timed_out, end.signal) == (True, signal.SIGKILL)
    assert peer.signals == [(run.task_id, signal.SIGKILL)]


async def test_deadline_of_a_frozen_task(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task whose end is never reported is given up soon after its deadline."""
    monkeypatch.setattr("hayflick_orchestrator.tasks.KILL_SECONDS", 0.05)
    sandbox, peer = pair
    peer.program = lambda body: -9 if body.killed.wait() and time.sleep(0.5) is None else 0
    run = TaskRun(sandbox, TaskSpec(kind="exec", argv=("x",), timeout_seconds=0.05))
    run.start()
    async with asyncio.timeout(0.4):
        _, end = await collect(run)
    assert (end.timed_out, end.signal, end.exit_code) == (True, None, None)
    peer.bodies[run.task_id].close()


async def test_cancel(pair: Pair) -> None:
    """A task that nobody wants any more is killed, and its output ends."""
    sandbox, peer = pair

    def program(body: Body) -> int:
        os.write(body.stdout, b"x")
        body.killed.wait()
        body.close()
        return -signal.SIGKILL

    peer.program = program
    run = TaskRun(sandbox, EXEC)
    run.start()
    chunks = run.chunks()
    await anext(chunks)
    run.cancel()
    assert [chunk async for chunk in chunks] == []
    assert (await run.end()).cancelled


async def test_death_of_the_sandbox(pair: Pair) -> None:
    """A task ends with its sandbox, and what it printed before still arrives."""
    sandbox, peer = pair

    def program(body: Body) -> int:
        os.write(body.stdout, b"before")
        sandbox._loop.call_soon_threadsafe(sandbox.dead.set_result, Death(None, 9, 0.0, 0, time.monotonic()))
        body.killed.wait()
        body.close()
        return 0

    peer.program = program
    run = TaskRun(sandbox, EXEC)
    run.start()
    printed, end = await collect(run)
    assert (printed[Output.STDOUT], end.exit_code, end.signal) == (b"before", None, None)


async def test_nothing_is_left_open(pair: Pair) -> None:
    """Tasks leave no descriptor behind."""
    sandbox, peer = pair

    def program(body: Body) -> int:
        body.close()
        return 0

    peer.program = program
    before = open_descriptors()
    for spec in (EXEC, CALL, EXEC):
        run = TaskRun(sandbox, spec)
        run.start()
        await collect(run)
    assert open_descriptors() == before


# Callables


def calling(talk: Callable[[Any], None], status: int = 0) -> Callable[[Body], int]:
    """Return a task that reads its start frame, then does *talk* on its control socket."""

    def program(body: Body) -> int:
        assert body.control is not None
        start = frames.read_frame(body.control)
        assert start == ({"type": "start", "info": {"a": 1}}, b"payload")
        with contextlib.suppress(OSError):  # the orchestrator may hang up
            talk(body.control)
        body.close()
        return status

    return program


async def run_call(
    pair: Pair, talk: Callable[[Any], None], dispatch: Callable[..., Awaitable[Json]] | None = None
) -> TaskEnd:
    """Return how a callable ended that did *talk*."""
    sandbox, peer = pair
    peer.program = calling(talk)
    run = TaskRun(sandbox, CALL, dispatch)
    run.start()
    return (await collect(run))[1]


async def test_result(pair: Pair) -> None:
    """What a callable returns arrives as the JSON text it sent, never interpreted."""
    end = await run_call(pair, lambda sock: frames.write_frame(sock, {"type": "result"}, b'{"b": [1]}'))
    assert (end.value_json, end.raised, end.violation) == ('{"b": [1]}', None, "")


async def test_large_result(pair: Pair) -> None:
    """A result that is larger than any socket buffer arrives whole, though its task exits at once."""
    body = b'"' + b"x" * 5_000_000 + b'"'
    end = await run_call(pair, lambda sock: frames.write_frame(sock, {"type": "result"}, body))
    assert end.value_json is not None
    assert len(end.value_json) == len(body)


async def test_exception(pair: Pair) -> None:
    """What a callable raises arrives as text, cut to size."""
    raised = {"type": "m.E" * 1_000, "message": "no \ud800", "traceback": "t" * 1_000_000}
    end = await run_call(
        pair, lambda sock: frames.write_frame(sock, {"type": "exception", "exception": raised})
    )
    assert end.raised is not None
    assert (len(end.raised.type), end.raised.message, len(end.raised.traceback)) == (256, "no ?", 256 * 1024)


GARBAGE = [
    b"\0\0\0\2ab......",
    b"\xff" * 64,
    b"GET / HTTP/1.1\r\n\r\n",
    frames.encode({"type": "unheard of"}),
    frames.encode({"type": "result"}) * 2,
    frames.encode({"type": "result"}, b"\xff\xfe"),
    frames.encode({"type": "exception", "exception": "text"}),
    frames.encode({"type": "exception", "exception": {"type": 1, "message": 2}}),
    frames.encode({"type": "call", "id": "x", "method": "GetSelf", "request": {}}),
    frames.encode({"type": "call", "id": 1, "method": "GetSelf", "request": []}),
    frames.encode({"type": "reply", "id": 1, "response": {}}),
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
async def test_garbage(pair: Pair, garbage: bytes) -> None:
    """A task that breaks the protocol is killed, and how is on record."""

    async def dispatch(method: str, request: Json, emit: Emit) -> Json:
        return {}

    def talk(sock: Any) -> None:
        sock.sendall(garbage)
        (body,) = pair[1].bodies.values()
        assert body.killed.wait(2)
        assert not sock.recv(1)  # and the orchestrator hung up

    end = await run_call(pair, talk, dispatch)
    assert end.violation
    assert signal.SIGKILL in [number for _, number in pair[1].signals]


async def test_calls(pair: Pair) -> None:
    """A call is answered with its response after its events, and a refusal with its reason."""
    answers: list[Any] = []

    async def dispatch(method: str, request: Json, emit: Emit) -> Json:
        if method == "Replicate":
            raise HayflickError(
                ErrorReason.ERROR_REASON_COOLDOWN_NOT_SATISFIED,
                "wait",
                metadata={"parent_id": "p"},
                retry_after_seconds=0.5,
            )
        if method == "Crash":
            raise RuntimeError("a secret of ours")
        await emit({"n": 1})
        return {"got": request}

    def talk(sock: Any) -> None:
        for number, method in enumerate(("GetSelf", "Replicate", "Crash"), start=1):
            call = {"type": "call", "id": number, "method": method, "request": {"x": 1}}
            frames.write_frame(sock, call)
            answers.extend(frames.read_frame(sock) for _ in range(2 if method == "GetSelf" else 1))
        frames.write_frame(sock, {"type": "result"}, b"null")

    end = await run_call(pair, talk, dispatch)
    assert end.value_json == "null"
    event, reply, refusal, crash = [header for header, _ in answers]
    assert event == {"type": "event", "id": 1, "event": {"n": 1}}
    assert reply == {"type": "reply", "id": 1, "response": {"got": {"x": 1}}}
    assert refusal == {
        "type": "error",
        "id": 2,
        "reason": "COOLDOWN_NOT_SATISFIED",
        "message": "wait",
        "metadata": {"parent_id": "p"},
        "retry_after_seconds": 0.5,
    }
    assert crash["reason"] == "INTERNAL"
    assert "secret" not in str(crash)


async def test_calls_end_with_their_task(pair: Pair) -> None:
    """A call that is in progress when its task goes away is called off."""
    called, called_off = threading.Event(), asyncio.Event()

    async def dispatch(method: str, request: Json, emit: Emit) -> Json:
        called.set()
        try:
            await asyncio.Event().wait()
        finally:
            called_off.set()
        return {}

    def talk(sock: Any) -> None:
        frames.write_frame(sock, {"type": "call", "id": 1, "method": "GetSelf", "request": {}})
        called.wait(2)

    await run_call(pair, talk, dispatch)
    assert called_off.is_set()


# The channel of init


@pytest.mark.parametrize(
    "packet",
    [
        b"garbage",
        b"[]",
        b'["TaskExited",{}]',
        b'["TaskStarted",{"task_id":"none"}]',
        b'["Beat",{"tasks":"1"}]',
    ],
)
async def test_an_init_that_lies(pair: Pair, packet: bytes) -> None:
    """A packet that no init of ours sends is a violation, and nothing more is read from it."""
    sandbox, peer = pair
    violations: list[str] = []
    heard = asyncio.Event()
    sandbox.on_violation = lambda text: (violations.append(text), heard.set())[1]
    peer.say(packet)
    peer.say(packet)
    async with asyncio.timeout(2):
        await heard.wait()
    await asyncio.sleep(0)
    assert len(violations) == 1
