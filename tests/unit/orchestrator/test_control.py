"""What one worker's tasks have half sent is bounded, however many tasks there are."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING

from hayflick_orchestrator.control import LARGE_FRAME_BYTES, READ_BYTES, ControlStream
from hayflick_sandbox import frames

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

LARGE = frames.encode({"type": "result"}, b"1" * (3 * LARGE_FRAME_BYTES))


async def until(condition: Callable[[], bool]) -> None:
    """Give the loop turns until *condition* holds."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 -- nothing tells of it
            await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def tasks(count: int) -> AsyncIterator[tuple[list[ControlStream], list[socket.socket]]]:
    """Give the streams of *count* tasks of one worker, and the tasks' ends of them."""
    large, streams, theirs = asyncio.Lock(), [], []
    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            ours, end = socket.socketpair()
            end.setblocking(False)
            theirs.append(end)
            streams.append(ControlStream(ours, None, large=large))
            group.create_task(streams[-1].run({}, b""))
        yield streams, theirs
        for end in theirs:
            end.close()
    for stream in streams:
        stream.close()


async def test_one_large_frame_at_a_time() -> None:
    """Of tasks that send large frames one is read to the end of its own; the others wait for it."""
    loop = asyncio.get_running_loop()
    async with tasks(3) as (streams, theirs):
        half = len(LARGE) // 2
        await loop.sock_sendall(theirs[0], LARGE[:half])
        await until(lambda: streams[0]._decoder.pending_bytes == half)
        sending = asyncio.create_task(loop.sock_sendall(theirs[1], LARGE))
        await until(lambda: streams[1]._decoder.pending_bytes > LARGE_FRAME_BYTES)
        await loop.sock_sendall(theirs[2], frames.encode({"type": "result"}, b"2"))
        await until(lambda: streams[2].settled)
        assert not sending.done()
        assert streams[1]._decoder.pending_bytes <= LARGE_FRAME_BYTES + READ_BYTES
        await loop.sock_sendall(theirs[0], LARGE[half:])
        await until(lambda: streams[0].settled and streams[1].settled)
        await sending


async def test_a_task_that_hangs_up_holds_nobody() -> None:
    """A task that ends in the middle of a large frame leaves the others their turn."""
    loop = asyncio.get_running_loop()
    async with tasks(2) as (streams, theirs):
        await loop.sock_sendall(theirs[0], LARGE[:-1])
        await until(lambda: streams[0]._decoder.pending_bytes == len(LARGE) - 1)
        sending = asyncio.create_task(loop.sock_sendall(theirs[1], LARGE))
        await until(lambda: streams[1]._decoder.pending_bytes > LARGE_FRAME_BYTES)
        theirs[0].close()
        await until(lambda: streams[1].settled)
        await sending
