"""``python -m hayflick_orchestrator.egress``: serves the orchestrator that started it, and ends with it.

It holds no secret and no privilege: after its imports it becomes a user of its
own, gives up what could be regained, and may write no file.
"""

from __future__ import annotations

import array
import asyncio

# What others import only when they need it, and this process could not read any more by then.
import concurrent.futures.thread  # noqa: F401
import contextlib
import encodings.idna  # noqa: F401
import json
import os
import resource
import socket
import sys
from typing import Any

import prctl

from hayflick_orchestrator.egress.proxy import WorkerProxy
from hayflick_orchestrator.egress.worker import Allowance
from hayflick_rpc import hosts
from hayflick_sandbox import landlock

MAX_PACKET_BYTES = 64 * 1024
MAX_MEMORY_BYTES = 1024 * 1024 * 1024
MAX_OPEN_FILES = 65_536
MAX_THREADS = 64


def drop(uid: int | None) -> None:
    """Become *uid*, if any, and give up what is not needed.

    Raises:
        OSError: the kernel refused.
    """
    if uid is not None:
        os.setgroups([])
        resource.setrlimit(resource.RLIMIT_NPROC, (MAX_THREADS, MAX_THREADS))
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    prctl.set_no_new_privs(1)
    prctl.set_dumpable(0)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = min(hard, MAX_OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    if landlock.abi():
        # Nothing is written but sockets and the log, which is open already.
        landlock.restrict({"/": landlock.READ}, tcp=True)


class Server:
    """Takes orders on a SEQPACKET socket, one packet of JSON each, and tells what happens."""

    def __init__(self, control: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        self._control = control
        self._control.setblocking(False)
        self._proxies: dict[str, WorkerProxy] = {}
        self._outgoing: asyncio.Queue[bytes] = asyncio.Queue()
        self._orders: set[asyncio.Task[None]] = set()
        self._over = asyncio.Event()

    async def serve(self) -> None:
        """Serve until the orchestrator is gone."""
        self._loop.add_reader(self._control, self._readable)
        telling = asyncio.create_task(self._tell_all())
        await self._over.wait()
        self._loop.remove_reader(self._control)
        telling.cancel()
        await asyncio.gather(
            telling, *(proxy.close() for proxy in self._proxies.values()), return_exceptions=True
        )

    def _tell(self, message: dict[str, Any]) -> None:
        self._outgoing.put_nowait(json.dumps(message).encode())

    async def _tell_all(self) -> None:
        while True:
            packet = await self._outgoing.get()
            try:
                await self._loop.sock_sendall(self._control, packet)
            except OSError:
                self._over.set()
                return

    def _readable(self) -> None:
        try:
            packet, ancillary, _, _ = self._control.recvmsg(
                MAX_PACKET_BYTES, socket.CMSG_SPACE(array.array("i").itemsize), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError:
            packet, ancillary = b"", []
        if not packet:
            self._over.set()
            return
        rights = array.array("i")
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                rights.frombytes(data)
        self._obey(json.loads(packet), list(rights))

    def _obey(self, order: dict[str, Any], rights: list[int]) -> None:
        name = order["worker_id"]
        match order["order"]:
            case "open":
                (listener,) = rights
                allowance = Allowance(
                    hosts.rules(order["hosts"]),
                    order["limit_bytes"],
                    lambda event: self._tell({"told": "egress", "worker_id": name, "event": event}),
                )
                self._proxies[name] = WorkerProxy(socket.socket(fileno=listener), allowance)
            case "narrow":
                self._spawn(self._narrow(name, order))
            case "close":
                self._spawn(self._close(name))
            case "hold" if name in self._proxies:
                self._proxies[name].allowance.hold()
            case "release" if name in self._proxies:
                self._proxies[name].release()

    def _spawn(self, work: Any) -> None:  # noqa: ANN401 -- a coroutine
        task = asyncio.create_task(work)
        self._orders.add(task)
        task.add_done_callback(self._orders.discard)

    async def _narrow(self, name: str, order: dict[str, Any]) -> None:
        if (proxy := self._proxies.get(name)) is not None:
            await proxy.narrow(hosts.rules(order["hosts"]), order["limit_bytes"])
        self._tell({"told": "narrowed", "worker_id": name})

    async def _close(self, name: str) -> None:
        if (proxy := self._proxies.pop(name, None)) is not None:
            await proxy.close()
        self._tell({"told": "closed", "worker_id": name})


async def run(control: socket.socket) -> None:
    """Serve whoever holds the other end of *control*."""
    await Server(control).serve()


def main() -> None:
    """Take the socket at descriptor 0, drop privileges, serve."""
    control = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    prctl.set_name("hayflick-egress")
    uid = int(sys.argv[1]) if len(sys.argv) > 1 else None
    socket.getaddrinfo(b"localhost", None)  # loads what the C library loads for look-ups
    drop(uid)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run(control))


if __name__ == "__main__":
    main()
