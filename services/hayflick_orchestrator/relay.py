"""Bytes from a socket inside a sandbox to one outside and back, bounded and unread.

What is in flight is one chunk each way for a connection: a side that does not
read makes the other wait, and nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hayflick.v1.resources_pb2 import NetworkPolicy

CHUNK_BYTES = 64 * 1024
# Connections of one worker at once; further ones wait to be accepted.
MAX_CONNECTIONS = 4
# When this process has no descriptor left for another connection.
EXHAUSTED_SECONDS = 0.1
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_PEER = struct.Struct("3i")  # struct ucred: pid, uid, gid; unix(7)

log = logging.getLogger(__name__)


class Relay:
    """One door of one worker.

    Args:
        listener: A descriptor that init listens on; ours from now on.
        owner: The host pid of the sandbox's init and its host uid.
        dial: Makes the connection outside that one from inside leads to.
    """

    def __init__(
        self,
        listener: int,
        owner: tuple[int, int],
        dial: Callable[[], Awaitable[socket.socket]],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = socket.socket(fileno=listener)
        self._listener.setblocking(False)
        self._owner = owner
        self._dial = dial
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._room = asyncio.Semaphore(MAX_CONNECTIONS)
        self._connections: set[asyncio.Task[None]] = set()
        self._accepting = asyncio.create_task(self._accept())

    def hold(self) -> None:
        """Let nothing more through, and lose nothing, until :meth:`release`."""
        self._flowing.clear()

    def release(self) -> None:
        """Let through again."""
        self._flowing.set()

    def close(self) -> None:
        """Refuse whoever comes from now on, and cut those who came. Idempotent."""
        # The last descriptor of it, but for one that an accept in progress holds.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.cancel()
        for connection in self._connections:
            connection.cancel()

    async def narrow(self, network: NetworkPolicy) -> None:
        """Shut it, unless *network* still gives the worker its WorkerService."""
        if not network.allow_controller:
            self.close()
            await self.wait_closed()

    async def wait_closed(self) -> None:
        """Wait until nothing of it is left; call :meth:`close` first."""
        await asyncio.gather(self._accepting, *self._connections, return_exceptions=True)

    async def _accept(self) -> None:
        with self._listener:
            while True:
                await self._room.acquire()
                await self._flowing.wait()
                try:
                    inside, _ = await self._loop.sock_accept(self._listener)
                except OSError as error:
                    self._room.release()
                    if error.errno not in _EXHAUSTED:
                        return
                    await asyncio.sleep(EXHAUSTED_SECONDS)
                    continue
                connection = asyncio.create_task(self._serve(inside))
                self._connections.add(connection)
                connection.add_done_callback(self._served)

    def _served(self, connection: asyncio.Task[None]) -> None:
        self._connections.discard(connection)
        self._room.release()
        if not connection.cancelled() and (error := connection.exception()) is not None:
            log.error("a connection of a worker failed", exc_info=error)

    async def _serve(self, inside: socket.socket) -> None:
        with inside:
            if not is_of(inside, *self._owner):
                log.error("refused a caller at a door that is not its own: %s", self._owner)
                return
            try:
                outside = await self._dial()
            except OSError as error:
                log.warning("a worker's call cannot be passed on: %s", error)
                return
            with outside:
                ways = [
                    asyncio.create_task(self._copy(inside, outside)),
                    asyncio.create_task(self._copy(outside, inside)),
                ]
                try:
                    await asyncio.gather(*ways)
                except OSError:
                    return  # one side is gone
                finally:
                    for way in ways:
                        way.cancel()
                    await asyncio.gather(*ways, return_exceptions=True)

    async def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        while data := await self._loop.sock_recv(source, CHUNK_BYTES):
            await self._flowing.wait()
            await self._loop.sock_sendall(sink, data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


def is_of(connection: socket.socket, init_pid: int, uid: int) -> bool:
    """Return whether a process of the sandbox of *init_pid* and *uid* made *connection*.

    The kernel noted who connected (SO_PEERCRED, unix(7)). Being in the very
    control groups of a sandbox's init is what makes a process one of its:
    none can leave or enter them.
    """
    peer_pid, peer_uid, _ = _PEER.unpack(
        connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    )
    try:
        return bool(peer_uid == uid and peer_pid > 0 and _groups(peer_pid) == _groups(init_pid))
    except OSError:
        return False  # it ended meanwhile


def _groups(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cgroup").read_bytes()
