"""A sandbox's other end: an init in a thread that speaks the real protocol and runs functions as tasks."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest

from hayflick_orchestrator.sandboxes import Sandbox
from hayflick_sandbox import messages
from hayflick_sandbox.messages import KillTask, RunTask, TaskExited, TaskStarted


@dataclass
class Body:
    """What a task may use: its outputs, its control socket, and word of a signal."""

    order: RunTask
    stdout: int
    stderr: int
    control: socket.socket | None
    killed: threading.Event = field(default_factory=threading.Event)

    def close(self) -> None:
        """Let go of everything, as a process that exits does."""
        for descriptor in (self.stdout, self.stderr):
            with contextlib.suppress(OSError):
                os.close(descriptor)
        if self.control is not None:
            self.control.close()


# Returns the exit code, or the negative number of the signal that ended it.
Program = Callable[[Body], int]


class Peer:
    """The init: runs each task it is given as a thread of *program*."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self.program: Program = lambda _: 0
        self.bodies: dict[str, Body] = {}
        self.signals: list[tuple[str, int]] = []
        self._threads: list[threading.Thread] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def say(self, message: messages.FromInit | bytes) -> None:
        """Send a message, or raw bytes."""
        with contextlib.suppress(BrokenPipeError):
            self._channel.send(message if isinstance(message, bytes) else messages.encode(message))

    def _serve(self) -> None:
        while True:
            space = socket.CMSG_SPACE(3 * array.array("i").itemsize)
            try:
                packet, ancillary, _, _ = self._channel.recvmsg(messages.MAX_PACKET_BYTES, space)
            except ConnectionResetError:
                return  # closed before all was read
            if not packet:
                return
            order = messages.parse_to_init(packet)
            if isinstance(order, KillTask):
                self.signals.append((order.task_id, order.signal))
                self.bodies[order.task_id].killed.set()
                continue
            descriptors = array.array("i")
            for _, _, data in ancillary:
                descriptors.frombytes(data)
            control = socket.socket(fileno=descriptors[2]) if len(descriptors) > 2 else None
            body = Body(order, descriptors[0], descriptors[1], control)
            self.bodies[order.task_id] = body
            thread = threading.Thread(target=self._run, args=(body,))
            self._threads.append(thread)
            thread.start()

    def _run(self, body: Body) -> None:
        self.say(TaskStarted(body.order.task_id))
        status = self.program(body)
        code, number = (status, None) if status >= 0 else (None, -status)
        self.say(TaskExited(body.order.task_id, code, number, 0.25, 1024))

    def join(self) -> None:
        """Wait until every thread ended."""
        self._thread.join(5)
        for body in self.bodies.values():
            body.killed.set()
        for thread in self._threads:
            thread.join(5)
        assert not any(thread.is_alive() for thread in (self._thread, *self._threads))
        self._channel.close()


@pytest.fixture
async def pair() -> AsyncIterator[tuple[Sandbox, Peer]]:
    """A sandbox and its init."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sandbox, peer = Sandbox("launch", "contract/worker", 100_000, ours), Peer(theirs)
    yield sandbox, peer
    sandbox.close()
    peer.join()
