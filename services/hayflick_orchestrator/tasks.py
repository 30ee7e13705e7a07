"""One task in a sandbox: its pipes, its control stream, its deadline, its end.

What the task prints is read only as fast as somebody consumes it: between the
task and the consumer there is one kernel pipe and one chunk, so a task that
floods its output waits in ``write(2)`` and nobody else notices. Its end is
reported by init, never by end-of-file, because a child that it left behind can
hold its pipes open for as long as it likes.

While its sandbox is quarantined, nothing of a task is read or told, and its
time does not run. What it said before waits where it is; should the worker die
in quarantine, it is given up, though evidence may show it.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import secrets
import signal
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hayflick_orchestrator.control import ControlStream, Dispatch, Raised, Violation
from hayflick_sandbox.messages import RunTask, TaskExited

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from hayflick_orchestrator.requests import TaskSpec
    from hayflick_orchestrator.sandboxes import Sandbox, Ticket

CHUNK_BYTES = 64 * 1024
# What is read from one pipe after the task is gone. A pipe holds 64 KiB; more
# comes only from a child that it left behind, and that may print for ever.
MAX_LAST_WORDS_BYTES = 1024 * 1024
# After SIGKILL the end comes at once.
KILL_SECONDS = 2.0
# After the task is gone, what it sent lies in the socket already.
CONTROL_DRAIN_SECONDS = 1.0
CONTROL_POLL_SECONDS = 0.05


class Output(enum.Enum):
    """The two outputs of a task."""

    STDOUT = 1
    STDERR = 2


@dataclass(frozen=True, slots=True)
class TaskEnd:
    """What was seen of a task that is over; see :class:`hayflick_orchestrator.exits.TaskFacts`."""

    exit_code: int | None
    signal: int | None
    cpu_seconds: float
    elapsed_seconds: float
    value_json: str | None
    raised: Raised | None
    violation: str
    timed_out: bool
    cancelled: bool
    output_exceeded: bool = False


class _Pipe:
    """The reading end of one output."""

    def __init__(self, output: Output) -> None:
        self.output = output
        self.descriptor, self.write_descriptor = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.descriptor, False)  # our end alone; the task's blocks
        self.open = True
        self.left_bytes: int | None = None
        self._ahead = b""

    def give_away(self) -> None:
        """Close the writing end, which init has by now."""
        os.close(self.write_descriptor)
        self.write_descriptor = -1

    def read(self) -> bytes:
        """Return the next chunk, empty when there is none now."""
        if self._ahead:
            data, self._ahead = self._ahead, b""
            return data
        if not self.open:
            return b""
        try:
            data = os.read(self.descriptor, CHUNK_BYTES)
        except BlockingIOError:
            return b""
        if not data:
            self.open = False
        elif self.left_bytes is not None:
            self.left_bytes -= len(data)
            if self.left_bytes <= 0:
                self.open = False
        return data

    def peek(self) -> bytes:
        """Return what the next :meth:`read` will, without reading it."""
        if not self._ahead:
            self._ahead = self.read()
        return self._ahead

    def close(self) -> None:
        if self.write_descriptor >= 0:
            self.give_away()
        os.close(self.descriptor)


class TaskRun:
    """A task from its start to its end.

    Attributes:
        task_id: What init calls it.
        over: Set when the task is gone, or given up; its last words may remain.
    """

    def __init__(self, sandbox: Sandbox, spec: TaskSpec, dispatch: Dispatch | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._sandbox = sandbox
        self._spec = spec
        self._dispatch = dispatch
        self.task_id = secrets.token_hex(8)
        self.over = asyncio.Event()
        self._pipes: tuple[_Pipe, ...] = ()
        self._control: ControlStream | None = None
        self._serving: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._exited: TaskExited | None = None
        self._violation = ""
        self._timed_out = False
        self._cancelled = False
        self._output_exceeded = False
        self._output_left_bytes = spec.output_limit_bytes
        self._given_up: asyncio.Future[None] = self._loop.create_future()
        self._started_at = time.monotonic()
        self._elapsed_seconds = 0.0

    def start(self) -> None:
        """Hand the task to init.

        Raises:
            SandboxError: init does not take it; nothing is left of it.
            OSError: the node has no descriptors left.
        """
        spec, theirs = self._spec, None
        try:
            self._pipes = (_Pipe(Output.STDOUT), _Pipe(Output.STDERR))
            descriptors = [pipe.write_descriptor for pipe in self._pipes]
            if spec.kind == "call":
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
                self._control = ControlStream(
                    ours, self._dispatch, self._sandbox.gate, self._sandbox.large_frames
                )
                descriptors.append(theirs.fileno())
            order = RunTask(self.task_id, spec.kind, spec.entry, spec.argv, dict(spec.environment))
            ticket = self._sandbox.begin(order, descriptors)
        except BaseException:
            self._close()
            raise
        finally:
            if theirs is not None:
                theirs.close()
        for pipe in self._pipes:
            pipe.give_away()
        self._sandbox.peeks[self.task_id] = self._peek
        self._started_at = time.monotonic()
        if self._control is not None:
            self._serving = asyncio.create_task(self._serve(self._control))
        self._watching = asyncio.create_task(self._watch(ticket))

    async def chunks(self) -> AsyncGenerator[tuple[Output, bytes], None]:
        """Yield what the task prints, each output in its order, until the task is over.

        A task that prints more than it may is killed, and of what it printed
        exactly as much is yielded as it might print.
        """
        while True:
            if not await self._passage():
                return
            over = self.over.is_set()
            if over:
                self._bound_last_words()
            progressed = False
            for pipe in self._pipes:
                # Whoever took the last chunk took his time: ask again.
                if self._sandbox.gate.is_open and (data := self._within_limit(pipe.read())):
                    progressed = True
                    self._sandbox.transcript.add(self.task_id, pipe.output.name.lower(), data)
                    yield pipe.output, data
            if self._cancelled or self._output_exceeded:
                return
            if progressed or not self._sandbox.gate.is_open:
                # A consumer that never waits must not keep the loop to itself.
                await asyncio.sleep(0)
            elif over:
                return
            else:
                await self._readable_or_over()

    async def _readable_or_over(self) -> None:
        self._wake.clear()
        watched = [pipe for pipe in self._pipes if pipe.open]
        for pipe in watched:
            self._loop.add_reader(pipe.descriptor, self._wake.set)
        try:
            if not self.over.is_set():
                await self._wake.wait()
        finally:
            for pipe in watched:
                self._loop.remove_reader(pipe.descriptor)

    def _bound_last_words(self) -> None:
        for pipe in self._pipes:
            if pipe.left_bytes is None:
                pipe.left_bytes = MAX_LAST_WORDS_BYTES

    async def _passage(self) -> bool:
        """Wait out a quarantine; return whether it is over and the task may still be heard."""
        return await self._sandbox.gate.passage((self._sandbox.dead, self._given_up))

    def _peek(self) -> dict[str, bytes]:
        """Return the output that waits to be read, a chunk of each at most."""
        self._wake.set()  # what is read ahead makes no descriptor readable
        return {pipe.output.name.lower(): pipe.peek() for pipe in self._pipes}

    def _within_limit(self, data: bytes) -> bytes:
        """Return as much of *data* as the task may still print; kill it when that is not all."""
        left = self._output_left_bytes
        if left is None:
            return data
        self._output_left_bytes = max(0, left - len(data))
        if len(data) > left and not self._output_exceeded:
            self._output_exceeded = True
            if not self.over.is_set():
                self._give_up()
        return data[:left]

    async def discard_output(self) -> None:
        """Read and drop what the task prints, until it is over."""
        async for _ in self.chunks():
            pass

    def terminate(self) -> None:
        """Ask the task to end, by SIGTERM."""
        self._sandbox.signal_task(self.task_id, signal.SIGTERM)

    def cancel(self) -> None:
        """End the task because nobody wants it any more."""
        if not self.over.is_set():
            self._cancelled = True
            self._wake.set()
            self._give_up()

    def _give_up(self) -> None:
        if not self._given_up.done():
            self._given_up.set_result(None)
        self._kill()

    def _kill(self) -> None:
        self._sandbox.signal_task(self.task_id, signal.SIGKILL)

    async def _serve(self, control: ControlStream) -> None:
        try:
            await control.run(self._spec.info, self._spec.payload)
        except Violation as violation:
            self._violation = str(violation)
            self._kill()
            control.close()

    async def _watch(self, ticket: Ticket) -> None:
        gate, ends = self._sandbox.gate, (ticket.exited, self._sandbox.dead)
        await gate.first((*ends, self._given_up), self._spec.timeout_seconds)
        if not any(end.done() for end in ends):
            self._timed_out = not self._given_up.done()
            self._kill()
            await gate.first(ends, KILL_SECONDS)
        # One that died in quarantine was cut off before it could say how it ended.
        heard = await gate.passage((self._sandbox.dead,))
        if heard and ticket.exited.done():
            self._exited = ticket.exited.result()
        self._elapsed_seconds = time.monotonic() - self._started_at
        if self._serving is not None:
            await self._settle_control(self._serving, heard=heard)
        self.over.set()
        self._wake.set()

    async def _settle_control(self, serving: asyncio.Task[None], *, heard: bool) -> None:
        # End-of-file ends it, but a child that the task left behind can keep
        # the stream open; then what counts was said already.
        assert self._control is not None
        left_seconds, gate = CONTROL_DRAIN_SECONDS, self._sandbox.gate
        while heard and not serving.done() and not self._control.settled and left_seconds > 0:
            await asyncio.wait({serving}, timeout=CONTROL_POLL_SECONDS)
            left_seconds -= CONTROL_POLL_SECONDS
            heard = await gate.passage((self._sandbox.dead,))
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)

    async def end(self) -> TaskEnd:
        """Return how the task ended, once it is over; let go of all it held."""
        try:
            assert self._watching is not None
            await asyncio.shield(self._watching)
            await self._sandbox.gate.passage((self._sandbox.dead,))  # its result is output too
        finally:
            self._close()
        exited, control = self._exited, self._control
        return TaskEnd(
            exit_code=exited.exit_code if exited else None,
            signal=exited.signal if exited else None,
            cpu_seconds=exited.cpu_seconds if exited else 0.0,
            elapsed_seconds=self._elapsed_seconds,
            value_json=control.value if control else None,
            raised=control.raised if control else None,
            violation=self._violation,
            timed_out=self._timed_out,
            cancelled=self._cancelled,
            output_exceeded=self._output_exceeded,
        )

    def _close(self) -> None:
        self._sandbox.peeks.pop(self.task_id, None)
        for task in (self._serving, self._watching):
            if task is not None and not task.done():
                task.cancel()
        for pipe in self._pipes:
            self._loop.remove_reader(pipe.descriptor)
            with contextlib.suppress(OSError):
                pipe.close()
        self._pipes = ()
        if self._control is not None:
            self._control.close()
