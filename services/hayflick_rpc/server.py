"""Bind, answer health and reflection, drain on a signal, leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import stat
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import grpc
from google.protobuf import descriptor_pool
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from hayflick_rpc.channel import OPTIONS
from hayflick_rpc.interceptors import chain

if TYPE_CHECKING:
    from google.protobuf.descriptor import FileDescriptor
    from google.protobuf.descriptor_pool import DescriptorPool

MAX_SOCKET_PATH_BYTES = 107  # sun_path less its NUL; unix(7)
STOP_SECONDS = 20.0
"""How long a service may take to end, beyond the time that its running calls have."""
EXIT_STUCK = 1

Register = Callable[[grpc.aio.Server], Sequence[str]]
Step = Callable[[], Awaitable[None]]

log = logging.getLogger(__name__)


class _Pool:
    """The default descriptor pool, for reflection, with methods found by their names too.

    ``FindFileContainingSymbol`` of protobuf's pool knows no methods, though
    reflection.proto names ``<package>.<service>[.<method>]`` as symbols to ask for.
    """

    def __init__(self) -> None:
        self._pool = descriptor_pool.Default()

    def __getattr__(self, name: str) -> object:
        return getattr(self._pool, name)

    def FindFileContainingSymbol(self, symbol: str) -> FileDescriptor:  # noqa: N802 -- the pool's name for it
        """Return the file that defines *symbol*; raise ``KeyError`` when none does."""
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            service, _, method = symbol.rpartition(".")
            found = self._pool.FindServiceByName(service)
            return found.methods_by_name[method].containing_service.file


def descriptors() -> DescriptorPool:
    """Return the pool that a service's reflection reads."""
    return cast("DescriptorPool", _Pool())


def set_up_logging(name: str) -> None:
    """Send this process's log to standard error, one line an entry."""
    logging.basicConfig(
        level=os.environ.get("HAYFLICK_LOG_LEVEL", "INFO").upper(),
        format=f"%(asctime)s {name} %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )


async def serve(
    name: str,
    listen: str,
    register: Register,
    *,
    on_drain: Step | None = None,
    on_stop: Step | None = None,
    lifeline_fd: int | None = None,
    drain_seconds: float = 5.0,
) -> None:
    """Serve until SIGTERM, SIGINT, or the end of whoever holds the other end of *lifeline_fd*.

    Args:
        name: What the service calls itself when it says where it listens.
        listen: A ``unix:`` target. Its directory is made, for this user alone.
        register: Adds the servicers; returns the full names of their services.
        on_drain: Runs first when the service is told to stop: no new work.
        on_stop: Runs when the last call has ended, also after a failed start.
        lifeline_fd: A descriptor whose end-of-file means that the parent is gone.
        drain_seconds: How long running calls may go on after the signal.

    What stands still at the end (a database that does not answer) keeps no service: STOP_SECONDS
    after the calls should have ended, the process leaves as a crash would end it.

    Raises:
        OSError: EADDRINUSE when a live service holds the socket, or the
            directory cannot be made safe.
    """
    path = socket_path(listen)
    stop = asyncio.Event()
    leave = threading.Timer(drain_seconds + STOP_SECONDS, _leave, (path,))
    leave.daemon = True
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        with _claimed(path):
            server = grpc.aio.server(interceptors=chain(), options=OPTIONS)
            names = [*register(server), health.SERVICE_NAME, reflection.SERVICE_NAME]
            status = health.aio.HealthServicer()
            health_pb2_grpc.add_HealthServicer_to_server(status, server)
            reflection.enable_server_reflection(names, server, pool=descriptors())
            server.add_insecure_port(f"unix:{path}")
            await server.start()
            path.chmod(0o600)
            for service in ["", *names]:
                await status.set(service, health_pb2.HealthCheckResponse.SERVING)
            print(f"{name} listening on unix://{path}", flush=True)
            async with _lifeline(lifeline_fd, stop):
                await stop.wait()
            log.info("stopping")
            leave.start()
            await status.enter_graceful_shutdown()
            if on_drain is not None:
                await on_drain()
            await server.stop(drain_seconds)
    finally:
        try:
            if on_stop is not None:
                await on_stop()
        finally:
            leave.cancel()


def _leave(path: Path) -> None:
    # A thread of its own, for the event loop may be what stands still. Whatever is
    # acknowledged is durable, and the next start takes up the rest.
    log.error("could not end in time; leaving as it is")
    path.unlink(missing_ok=True)
    os._exit(EXIT_STUCK)


def socket_path(listen: str) -> Path:
    """Return the absolute path in a ``unix:`` target.

    Raises:
        ValueError: *listen* is not a ``unix:`` target with an absolute path that
            fits in a socket address. Plain TCP is not offered: it would let in
            whoever reaches the port.
    """
    text = listen.removeprefix("unix://") if listen.startswith("unix://") else listen.removeprefix("unix:")
    if text == listen or not text.startswith("/"):
        raise ValueError(f"listen: {listen!r} must be unix:///absolute/path")
    if len(os.fsencode(text)) > MAX_SOCKET_PATH_BYTES:
        raise ValueError(
            f"listen: the path of a Unix socket has at most {MAX_SOCKET_PATH_BYTES} bytes: {text}"
        )
    return Path(text)


@contextlib.contextmanager
def _claimed(path: Path) -> Iterator[None]:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    mode = path.parent.stat()
    if mode.st_uid != os.geteuid() or stat.S_IMODE(mode.st_mode) & 0o077:
        raise OSError(
            errno.EPERM, "the socket's directory must be this user's own, with mode 0700", str(path.parent)
        )
    _remove_stale(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _remove_stale(path: Path) -> None:
    """Remove a socket that nobody answers on; refuse to take one from a live service."""
    if not path.exists():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise OSError(errno.EADDRINUSE, "another service listens here", str(path))


@contextlib.asynccontextmanager
async def _lifeline(descriptor: int | None, stop: asyncio.Event) -> AsyncIterator[None]:
    if descriptor is None:
        yield
        return
    loop = asyncio.get_running_loop()

    def readable() -> None:
        if not os.read(descriptor, 4096):
            loop.remove_reader(descriptor)
            stop.set()

    os.set_blocking(descriptor, False)
    loop.add_reader(descriptor, readable)
    try:
        yield
    finally:
        loop.remove_reader(descriptor)
