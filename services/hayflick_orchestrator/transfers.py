"""Files into and out of workers: bytes between a caller and a process in the sandbox.

This side opens nothing by a name that a worker chose: it hands init a pipe and
a path, and a process under the worker's own confinement does the rest. What
that process achieved init tells, by an errno; what went through the pipe is
counted and hashed here.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import secrets
import signal
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from hayflick.v1.errors_pb2 import ErrorReason
from hayflick.v1.orchestrator_pb2 import FileSummary, GetFileResponse, PutFileResponse
from hayflick_orchestrator import file_rules
from hayflick_orchestrator.sandboxes import SandboxError
from hayflick_orchestrator.workers import quarantined
from hayflick_rpc.errors import HayflickError, invalid_field
from hayflick_sandbox.messages import Transfer
from hayflick_sandbox.transfer import COUNT_BYTES

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator

    from hayflick.v1.orchestrator_pb2 import GetFileRequest, PutFileHeader, PutFileRequest
    from hayflick_orchestrator.records import Records
    from hayflick_orchestrator.supervisor import Supervisor
    from hayflick_orchestrator.workers import Worker

# Each holds a process of the worker's and up to two descriptors of ours.
MAX_TRANSFERS_PER_WORKER = 4
PIPE_BYTES = 256 * 1024
# How long the worker's side, and how long the caller, may do nothing.
WORKER_STALL_SECONDS = 30.0
CALLER_STALL_SECONDS = 60.0
# How often a transfer that waits looks whether its worker still runs.
LOOK_SECONDS = 0.25


class Transfers:
    """Puts files into workers and gets files out of them."""

    def __init__(self, supervisor: Supervisor, records: Records) -> None:
        self._supervisor = supervisor
        self._records = records
        self._going: Counter[str] = Counter()

    async def put(
        self, worker: Worker, header: PutFileHeader, parts: AsyncIterator[PutFileRequest]
    ) -> PutFileResponse:
        """Write a file of what *parts* bring; all of it or nothing.

        Raises:
            HayflickError: INVALID_FIELD, TOO_LARGE; FILE_REFUSED, FILE_UNKNOWN; NODE_FULL;
                TASK_TIMEOUT; WORKER_EXPIRED, KILL_SWITCH_ENGAGED, QUARANTINED or
                WORKER_NOT_RUNNING.
        """
        path, limit = file_rules.file_path(header.path), file_rules.MAX_FILE_BYTES
        order = Transfer(secrets.token_hex(8), "put", path, executable=header.executable, max_bytes=limit)
        digest, count = hashlib.sha256(), 0
        with self._line(worker, order) as line:
            while True:
                part = await line.next_of(parts)
                if line.over or part is None or part.WhichOneof("part") != "data":
                    break
                if len(part.data) > file_rules.MAX_PIECE_BYTES:
                    raise file_rules.too_large("data", file_rules.MAX_PIECE_BYTES)
                count += len(part.data)
                if count > limit:
                    raise file_rules.too_large(path, limit)
                digest.update(part.data)
                await line.send(part.data)
            if not line.over:
                if part is not None and part.HasField("header"):
                    raise invalid_field("header", "must come once, first")
                summary = part.summary if part is not None and part.HasField("summary") else None
                file_rules.check_summary(summary, count, digest.hexdigest())
                line.commit(count)
            await line.end()
        sha256 = digest.hexdigest()
        self._records.file("file_put", worker.record, path=path, size_bytes=count, sha256=sha256)
        return PutFileResponse(size_bytes=count, sha256=sha256)

    async def get(self, worker: Worker, request: GetFileRequest) -> AsyncGenerator[GetFileResponse, None]:
        """Yield a file's bytes, then what they were.

        Raises:
            HayflickError: as :meth:`put`.
        """
        path, limit = file_rules.file_path(request.path), file_rules.get_limit(request.max_bytes)
        digest, count = hashlib.sha256(), 0
        with self._line(worker, Transfer(secrets.token_hex(8), "get", path, max_bytes=limit)) as line:
            while data := await line.receive():
                count += len(data)
                if count > limit:
                    raise file_rules.too_large(path, limit)
                digest.update(data)
                yield GetFileResponse(data=data)
                line.progressed()
            await line.end()
        summary = FileSummary(size_bytes=count, sha256=digest.hexdigest())
        self._records.file("file_got", worker.record, path=path, size_bytes=count, sha256=summary.sha256)
        yield GetFileResponse(summary=summary)

    @contextlib.contextmanager
    def _line(self, worker: Worker, order: Transfer) -> Iterator[_Line]:
        worker.require_running()
        if not worker.sandbox.gate.is_open:
            raise quarantined(worker.worker_id)
        if self._going[worker.worker_id] >= MAX_TRANSFERS_PER_WORKER:
            raise HayflickError(
                ErrorReason.ERROR_REASON_NODE_FULL,
                f"worker {worker.worker_id} has {MAX_TRANSFERS_PER_WORKER} transfers going already",
                metadata={"limit": "transfers_per_worker"},
            )
        self._going[worker.worker_id] += 1
        try:
            line = _Line(self._supervisor, worker, order)
            try:
                yield line
            finally:
                line.close()
        finally:
            self._going[worker.worker_id] -= 1
            if not self._going[worker.worker_id]:
                del self._going[worker.worker_id]


class _Line:
    """One transfer: our ends of its pipes, and word of its process's end."""

    def __init__(self, supervisor: Supervisor, worker: Worker, order: Transfer) -> None:
        self._loop = asyncio.get_running_loop()
        self._supervisor = supervisor
        self._worker = worker
        self._order = order
        self._patience = file_rules.Patience(order.path, time.monotonic())
        theirs: list[int] = []
        self._data = self._count = -1
        try:
            if order.kind == "get":
                self._data, their_data = os.pipe2(os.O_CLOEXEC)
                theirs = [their_data]
            else:
                their_data, self._data = os.pipe2(os.O_CLOEXEC)
                theirs = [their_data]
                their_count, self._count = os.pipe2(os.O_CLOEXEC)
                theirs.append(their_count)
            os.set_blocking(self._data, False)
            with contextlib.suppress(OSError):  # the user's share of pipe memory may be used up
                fcntl.fcntl(self._data, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            self._ticket = worker.sandbox.begin(order, theirs)
        except (SandboxError, OSError) as error:
            self._close_ours()
            raise HayflickError(
                ErrorReason.ERROR_REASON_SANDBOX_FAILED,
                f"the transfer could not be started: {error}",
                metadata={"step": "transfer", "errno": str(error.errno or 0)},
            ) from error
        finally:
            for descriptor in theirs:
                os.close(descriptor)

    @property
    def over(self) -> bool:
        """Whether the process of the transfer is gone."""
        return self._ticket.exited.done() or self._worker.sandbox.dead.done()

    def progressed(self) -> None:
        """Count the stall from now on: the other side had its turn."""
        self._patience.moved(time.monotonic())

    async def next_of(self, parts: AsyncIterator[PutFileRequest]) -> PutFileRequest | None:
        """Return the caller's next part; ``None`` at its end, or when the transfer is over.

        Raises:
            HayflickError: TASK_TIMEOUT when none came in time.
        """
        coming = asyncio.ensure_future(_next(parts))
        try:
            await self._until(coming, CALLER_STALL_SECONDS, "the caller")
            return coming.result() if coming.done() else None
        finally:
            coming.cancel()

    async def send(self, data: bytes) -> None:
        """Hand *data* to the process; return early when it is gone."""
        view = memoryview(data)
        while view and not self.over:
            self._require_running()
            try:
                view = view[os.write(self._data, view) :]
                self.progressed()
            except BlockingIOError:
                await self._ready(self._loop.add_writer, self._loop.remove_writer)
            except BrokenPipeError:
                await self._until(None, WORKER_STALL_SECONDS, "the worker")

    def commit(self, count: int) -> None:
        """Say that these were all the bytes; without it the process writes nothing."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._count, count.to_bytes(COUNT_BYTES, "big"))
        self._close_ours()

    async def receive(self) -> bytes:
        """Return the next bytes; empty when there will be no more."""
        while True:
            self._require_running()
            try:
                return os.read(self._data, PIPE_BYTES)
            except BlockingIOError:
                await self._ready(self._loop.add_reader, self._loop.remove_reader)

    async def end(self) -> None:
        """Return when the process is gone and did what it was to do.

        Raises:
            HayflickError: it did not.
        """
        while not self.over:
            await self._until(None, WORKER_STALL_SECONDS, "the worker")
        exited = self._ticket.exited.result() if self._ticket.exited.done() else None
        code = exited.exit_code if exited is not None else None
        if code == 0:
            return
        worker, path = self._worker, self._order.path
        self._supervisor.check_memory(worker)
        if exited is None or code is None:
            worker.require_running()
        if code is not None:
            raise file_rules.refusal(worker.worker_id, path, code, self._order.max_bytes)
        number = exited.signal if exited is not None else None
        raise file_rules.refused(worker.worker_id, path, f"signal {number or 0}")

    def _require_running(self) -> None:
        self._patience.require(time.monotonic())
        # A quarantine cuts at once, before the kernel confirmed the freeze.
        if not self._worker.sandbox.gate.is_open:
            raise quarantined(self._worker.worker_id)
        if self._worker.life.ending:
            self._worker.require_running()

    async def _ready(self, add: Any, remove: Any) -> None:  # noqa: ANN401 -- the loop's own methods
        ready: asyncio.Future[None] = self._loop.create_future()

        def now() -> None:
            if not ready.done():
                ready.set_result(None)

        add(self._data, now)
        try:
            await self._until(ready, WORKER_STALL_SECONDS, "the worker")
        finally:
            remove(self._data)

    async def _until(self, event: asyncio.Future[Any] | None, stall_seconds: float, who: str) -> None:
        """Wait for *event*, or for the end of the process.

        Raises:
            HayflickError: the worker runs no more, or *who* did nothing for too long.
        """
        ends: set[asyncio.Future[Any]] = {self._ticket.exited, self._worker.sandbox.dead}
        if event is not None:
            ends.add(event)
        while not any(end.done() for end in ends):
            await asyncio.wait(ends, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if any(end.done() for end in ends):
                break
            self._require_running()
            self._patience.require(time.monotonic(), stall_seconds, who)
        self.progressed()

    def close(self) -> None:
        """Let go; a process that is not done yet ends, and leaves nothing."""
        if not self.over:
            self._worker.sandbox.signal_task(self._order.task_id, signal.SIGKILL)
        self._close_ours()

    def _close_ours(self) -> None:
        for descriptor in (self._data, self._count):
            if descriptor >= 0:
                os.close(descriptor)
        self._data = self._count = -1


async def _next(parts: AsyncIterator[PutFileRequest]) -> PutFileRequest | None:
    async for part in parts:
        return part
    return None
