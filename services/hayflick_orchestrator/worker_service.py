"""WorkerService over gRPC, for whoever speaks it inside a sandbox.

One server serves all workers of the node, on a socket that only this process's
user can reach. A worker's connections come to it through that worker's
:class:`~hayflick_orchestrator.relay.Relay`, each from an address that was made
for it alone, and the address says who calls: gRPC gives it to the servicer, and
nothing that a caller sends can change it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from hayflick.v1 import worker_pb2, worker_pb2_grpc
from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_orchestrator.relay import Relay
from hayflick_rpc.access import Role
from hayflick_rpc.channel import OPTIONS
from hayflick_rpc.errors import HayflickError
from hayflick_rpc.interceptors import chain
from hayflick_rpc.server import descriptors, socket_path

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from hayflick_orchestrator.calls import WorkerCalls
    from hayflick_orchestrator.tasks import TaskRun
    from hayflick_orchestrator.workers import Worker

CALLS_PER_CONNECTION = 8
# A connection that is not HTTP/2 by then, or without a call for so long, is ended.
HANDSHAKE_MILLISECONDS = 10_000
IDLE_MILLISECONDS = 300_000
STOP_SECONDS = 1.0

Context = grpc.aio.ServicerContext[Any, Any]


class WorkerGate:
    """Opens a worker's door to its WorkerService.

    Args:
        listen: The node's own address; the server's socket is made beside it.
        calls: What answers.
    """

    def __init__(self, listen: str, calls: WorkerCalls) -> None:
        self._path = socket_path(listen)
        self._calls = calls
        self._callers: dict[str, Worker] = {}
        self._relays: set[Relay] = set()
        self._directory = -1
        self._name = f"{self._path.name}.{secrets.token_hex(8)}.worker-service"
        self._server: asyncio.Task[grpc.aio.Server] | None = None

    def open(self, worker: Worker, listener: int) -> Relay:
        """Answer on *listener*, which the init of *worker* opened; it is ours from now on."""

        async def dial() -> socket.socket:
            return await self._connect(worker)

        relay = Relay(listener, (worker.sandbox.pid or 0, worker.sandbox.uid), dial)
        self._relays.add(relay)
        worker.sandbox.dead.add_done_callback(lambda _: self._relays.discard(relay))
        return relay

    async def stop(self) -> None:
        """Cut every caller and leave nothing behind."""
        for relay in self._relays:
            relay.close()
        if self._server is not None:
            with contextlib.suppress(OSError, RuntimeError):
                await (await self._server).stop(STOP_SECONDS)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._name, dir_fd=self._directory)
            os.close(self._directory)

    async def _connect(self, worker: Worker) -> socket.socket:
        """Return a connection to the server from an address that stands for *worker*."""
        if self._server is None:
            # Only where somebody calls: most workers never do.
            self._server = asyncio.create_task(self._start())
        await asyncio.shield(self._server)
        token = secrets.token_hex(16)
        connection = _Named(token, self._callers)
        try:
            connection.setblocking(False)
            connection.bind(self._short(token))
            try:
                self._callers[token] = worker
                await asyncio.get_running_loop().sock_connect(connection, self._short(self._name))
            finally:
                # The address outlives its name in the directory.
                os.unlink(token, dir_fd=self._directory)
        except BaseException:
            connection.close()
            raise
        return connection

    async def _start(self) -> grpc.aio.Server:
        self._directory = os.open(self._path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        options = (
            *OPTIONS,
            ("grpc.max_concurrent_streams", CALLS_PER_CONNECTION),
            ("grpc.server_handshake_timeout_ms", HANDSHAKE_MILLISECONDS),
            ("grpc.max_connection_idle_ms", IDLE_MILLISECONDS),
        )
        server = grpc.aio.server(interceptors=chain(Role.WORKER), options=options)
        servicer = WorkerServicer(self._calls, self._caller)
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(servicer, server)
        service = worker_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name
        names = [service, health.SERVICE_NAME, reflection.SERVICE_NAME]
        status = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(status, server)
        reflection.enable_server_reflection(names, server, pool=descriptors())
        server.add_insecure_port(f"unix:{self._short(self._name)}")
        await server.start()
        for name in ["", *names]:
            await status.set(name, health_pb2.HealthCheckResponse.SERVING)
        return server

    def _short(self, name: str) -> str:
        """Return a path of *name* that fits a socket's address wherever the directory lies (unix(7))."""
        return f"/proc/self/fd/{self._directory}/{name}"

    def _caller(self, context: Context) -> Worker:
        """Return whose connection the call came on.

        Raises:
            HayflickError: CALLER_NOT_ALLOWED when it came on none of ours.
        """
        worker = self._callers.get(context.peer().rpartition("/")[2])
        if worker is None:
            raise HayflickError(
                ErrorReason.ERROR_REASON_CALLER_NOT_ALLOWED, "only a worker may call, by its own door"
            )
        return worker


class _Named(socket.socket):
    """A connection whose address stands for a worker for as long as it is open."""

    def __init__(self, token: str, names: dict[str, Worker]) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM)
        self._token = token
        self._names = names

    def close(self) -> None:
        self._names.pop(self._token, None)
        super().close()


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    """Translates between the wire and the calls, and decides nothing."""

    def __init__(self, calls: WorkerCalls, caller: Callable[[Context], Worker]) -> None:
        self._calls = calls
        self._caller = caller

    async def GetSelf(  # noqa: N802 -- protoc names it
        self, request: worker_pb2.GetSelfRequest, context: Context
    ) -> worker_pb2.GetSelfResponse:
        """Tells the worker who it is."""
        del request
        return await self._calls.get_self(self._caller(context))

    async def Replicate(  # noqa: N802 -- protoc names it
        self, request: worker_pb2.ReplicateRequest, context: Context
    ) -> worker_pb2.ReplicateResponse:
        """Asks for a child and starts it."""
        return await self._calls.replicate(self._caller(context), request)

    async def RunDescendantTask(  # noqa: N802 -- protoc names it
        self, request: worker_pb2.RunDescendantTaskRequest, context: Context
    ) -> AsyncIterator[worker_pb2.RunDescendantTaskResponse]:
        """Runs a task in a descendant."""
        caller = self._caller(context)

        def started(run: TaskRun) -> None:
            # The stream below also notices a hang-up, but only when it next
            # has something to say.
            context.add_done_callback(lambda _: run.cancel())  # type: ignore[arg-type]

        events = self._calls.run_descendant_task(caller, request, started)
        async with contextlib.aclosing(events):
            async for event in events:
                yield event

    async def Shutdown(  # noqa: N802 -- protoc names it
        self, request: worker_pb2.ShutdownRequest, context: Context
    ) -> worker_pb2.ShutdownResponse:
        """Ends the worker itself or a descendant."""
        return await self._calls.shutdown(self._caller(context), request)
