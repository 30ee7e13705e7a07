"""The relay between a door and what answers behind it: bounded, held, cut."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from typing import TYPE_CHECKING

import pytest

from hayflick_orchestrator.relay import CHUNK_BYTES, MAX_CONNECTIONS, Relay, is_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

SECONDS = 10.0


class Line:
    """A relay, the path that leads in, and the ends that come out behind it."""

    def __init__(self, path: Path) -> None:
        self._path = str(path / "door")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self._path)
        listener.listen(16)
        self.ends: asyncio.Queue[socket.socket] = asyncio.Queue()
        self.relay = Relay(listener.detach(), (os.getpid(), os.getuid()), self._dial)
        self._open: list[socket.socket] = []

    async def _dial(self) -> socket.socket:
        near, far = socket.socketpair()
        for end in (near, far):
            end.setblocking(False)
        self._open.append(far)
        self.ends.put_nowait(far)
        return near

    async def call(self) -> socket.socket:
        """Return the inner end of a new connection."""
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        self._open.append(sock)
        await asyncio.get_running_loop().sock_connect(sock, self._path)
        return sock

    async def end(self) -> None:
        """Take it down."""
        self.relay.close()
        await self.relay.wait_closed()
        for sock in self._open:
            sock.close()


@pytest.fixture
async def line(tmp_path: Path) -> AsyncIterator[Line]:
    """One door."""
    made = Line(tmp_path)
    yield made
    await made.end()


async def heard(sock: socket.socket, size: int = 1024) -> bytes:
    """Return what comes next, in time."""
    async with asyncio.timeout(SECONDS):
        return await asyncio.get_running_loop().sock_recv(sock, size)


async def test_bytes_pass_both_ways(line: Line) -> None:
    """What goes in comes out, and the answer goes back."""
    inside = await line.call()
    inside.send(b"question")
    outside = await line.ends.get()
    assert await heard(outside) == b"question"
    outside.send(b"answer")
    assert await heard(inside) == b"answer"


async def test_half_closing_passes(line: Line) -> None:
    """One side's end of file reaches the other, which may still answer."""
    inside = await line.call()
    inside.shutdown(socket.SHUT_WR)
    outside = await line.ends.get()
    assert await heard(outside) == b""
    outside.send(b"last")
    assert await heard(inside) == b"last"


async def test_held_bytes_wait(line: Line) -> None:
    """While a door is held nothing passes; released, everything does, in order."""
    inside = await line.call()
    inside.send(b"a")
    outside = await line.ends.get()
    assert await heard(outside) == b"a"
    line.relay.hold()
    inside.send(b"b")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):  # what must not come gives no event
            await asyncio.get_running_loop().sock_recv(outside, 1)
    inside.send(b"c")
    line.relay.release()
    got = await heard(outside)
    assert got + (await heard(outside) if len(got) < 2 else b"") == b"bc"


async def test_a_reader_that_does_not_read_stops_the_writer(line: Line) -> None:
    """What is taken from one side and not given to the other is one chunk at most."""
    inside = await line.call()
    inside.send(b"x")
    outside = await line.ends.get()
    sent = 1
    piece = bytes(CHUNK_BYTES)
    with contextlib.suppress(TimeoutError):
        while True:
            async with asyncio.timeout(0.3):
                await asyncio.get_running_loop().sock_sendall(inside, piece)
            sent += len(piece)
    kernel = sum(
        sock.getsockopt(socket.SOL_SOCKET, option)
        for sock in (inside, outside)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF)
    )
    assert sent <= kernel + 4 * CHUNK_BYTES


async def test_connections_are_bounded(line: Line) -> None:
    """One more connection than allowed is taken only when another ends."""
    callers = [await line.call() for _ in range(MAX_CONNECTIONS + 1)]
    ends = [await line.ends.get() for _ in range(MAX_CONNECTIONS)]
    await asyncio.sleep(0)
    assert line.ends.empty()
    callers[0].close()
    ends[0].close()
    async with asyncio.timeout(SECONDS):
        await line.ends.get()


async def test_a_closed_door_is_closed(line: Line) -> None:
    """Closing cuts whoever is in it, and nobody comes in any more."""
    inside = await line.call()
    outside = await line.ends.get()
    line.relay.close()
    await line.relay.wait_closed()
    assert await heard(inside) == b""
    assert await heard(outside) == b""
    with pytest.raises(ConnectionRefusedError):
        await line.call()


def test_whose_a_connection_is() -> None:
    """The kernel says who connected: another user, or a process of other control groups, is a stranger."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert is_of(ours, os.getpid(), os.getuid())
        assert not is_of(ours, os.getpid(), os.getuid() + 1)
        assert not is_of(ours, 2**22 + 1, os.getuid())  # above any pid: nobody
