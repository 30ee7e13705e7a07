"""One live sandbox as the orchestrator sees it: its init's channel, its end, its tasks.

It knows nothing of contracts. A worker is one sandbox; so is the place where a
predicate is evaluated.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import functools
import logging
import os
import socket
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from hayflick_orchestrator.gates import Gate
from hayflick_orchestrator.transcripts import Transcript
from hayflick_sandbox import messages
from hayflick_sandbox.messages import (
    MAX_PACKET_BYTES,
    Beat,
    Finding,
    KillTask,
    Probed,
    ProtocolViolation,
    Ready,
    RunTask,
    SetupFailed,
    TaskExited,
    TaskStarted,
    Transfer,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SHORT_PACKET_BYTES = 32  # a beat's; what else is as short is a value that never changes, too
# What one wake-up reads from one init at most, so that none starves the others.
PACKETS_AT_ONCE = 64
# As a number: enum's own operators are slow, and every packet meets this one.
_TRUNCATED = int(socket.MSG_CTRUNC)
_RIGHTS_BYTES = socket.CMSG_SPACE(len(messages.DESCRIPTORS) * array.array("i").itemsize)

_parse_again = functools.lru_cache(maxsize=256)(messages.parse_from_init)

log = logging.getLogger(__name__)


class SandboxError(Exception):
    """The sandbox could not be built, or its init does not take an order.

    Attributes:
        step: Of the confinement, or of the launch.
        errno: What the kernel said, or 0.
    """

    def __init__(self, step: str, errno_: int, message: str) -> None:
        super().__init__(f"{step}: {message}")
        self.step = step
        self.errno = errno_


@dataclass(frozen=True, slots=True)
class Death:
    """That no process of a sandbox runs any more.

    When the init of a pid namespace is dead, the kernel has killed and reaped
    everything else in it; see pid_namespaces(7).
    """

    exit_code: int | None
    signal: int | None
    cpu_seconds: float
    max_rss_bytes: int
    seen_at_monotonic: float
    lapsed: bool = False


def _future() -> asyncio.Future[None]:
    return asyncio.get_running_loop().create_future()


@dataclass(slots=True)
class Ticket:
    """A task's place on its sandbox."""

    task_id: str
    started: asyncio.Future[None] = field(default_factory=_future)
    exited: asyncio.Future[TaskExited] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def start(self) -> None:
        """Note that its process exists."""
        if not self.started.done():
            self.started.set_result(None)


class Sandbox:
    """A sandbox whose launch was asked for.

    Attributes:
        launch_id: What the zygote calls it.
        cgroup_path: Where its processes are.
        uid: The host user id of its processes.
        pid: Of its init on the host, once forked.
        findings: What its init found when it checked the sandbox; empty until then.
        probe_seconds: How long the checks took.
        ready: Resolves when its init is ready; fails with :class:`SandboxError`.
        forked: Resolves when the zygote answered: true when a process exists.
        dead: Resolves when no process of it runs.
        idle: Set while it has no task whose end was not reported.
        descriptors: What init opened inside and handed over, by name; whoever
            takes one out closes it.
        last_beat_monotonic: When its init was last heard.
        last_beat_time: The same by the wall clock.
        gate: Shut while it is quarantined; its channels are not read then.
        large_frames: Held while one of its tasks sends a large frame.
        transcript: The last output of its tasks.
        peeks: By task, what shows output that waits to be read.
    """

    def __init__(self, launch_id: str, cgroup_path: str, uid: int, channel: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        self.launch_id = launch_id
        self.cgroup_path = cgroup_path
        self.uid = uid
        self.pid: int | None = None
        self.doomed = False
        self.on_violation: Callable[[str], None] | None = None
        self.on_task_exited: Callable[[], object] | None = None
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.forked: asyncio.Future[bool] = self._loop.create_future()
        self.dead: asyncio.Future[Death] = self._loop.create_future()
        self.asked_at_monotonic = time.monotonic()
        self.ready_time: datetime | None = None
        self.build_seconds = 0.0
        self.descriptors: dict[str, int] = {}
        self.findings: tuple[Finding, ...] = ()
        self.probe_seconds = 0.0
        self.last_beat_monotonic = self.asked_at_monotonic
        self.last_beat_time = datetime.now(UTC)
        self._channel = channel
        self._pidfd: int | None = None
        self._pidfd_readable_at: float | None = None
        self._tickets: dict[str, Ticket] = {}
        self.idle = asyncio.Event()
        self.idle.set()
        self.gate = Gate(self._listen)
        self.large_frames = asyncio.Lock()
        self.transcript = Transcript()
        self.peeks: dict[str, Callable[[], dict[str, bytes]]] = {}
        self._heard_out = False
        self._listening = False
        channel.setblocking(False)
        self._hear(True)

    def __repr__(self) -> str:
        return f"Sandbox({self.cgroup_path!r}, pid={self.pid})"

    @property
    def pidfd(self) -> int | None:
        """A descriptor of its init, while it is watched."""
        return self._pidfd

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks whose end was not yet reported."""
        return tuple(self._tickets)

    # What the zygote says.

    def born(self, pid: int, pidfd: int) -> None:
        """Note that its init exists; watch it from now on."""
        self.pid = pid
        self._pidfd = pidfd
        self._loop.add_reader(pidfd, self._pidfd_readable)
        if not self.forked.done():
            self.forked.set_result(True)

    def stillborn(self, step: str, errno_: int, message: str) -> None:
        """Note that no process was ever made."""
        self._fail_ready(SandboxError(step, errno_, message))
        if not self.forked.done():
            self.forked.set_result(False)
        self._settle(Death(None, None, 0.0, 0, time.monotonic()))

    def exited(
        self,
        exit_code: int | None,
        signal: int | None,
        cpu_seconds: float,
        max_rss_bytes: int,
        lapsed: bool = False,
    ) -> None:
        """Note that its init was reaped; *lapsed* when the zygote ended it for want of a lease."""
        seen = self._pidfd_readable_at or time.monotonic()
        self._settle(Death(exit_code, signal, cpu_seconds, max_rss_bytes, seen, lapsed))

    def _pidfd_readable(self) -> None:
        assert self._pidfd is not None
        self._loop.remove_reader(self._pidfd)
        self._pidfd_readable_at = time.monotonic()
        # The zygote reaps it and says how it ended; if the zygote itself is
        # gone, the pidfd alone proves the death.
        self._loop.call_later(1.0, self.exited, None, None, 0.0, 0)

    def _settle(self, death: Death) -> None:
        if self.dead.done():
            return
        # Its last words may still be in the socket; one that died in quarantine has none.
        if self.gate.is_open:
            self._drain()
        self.dead.set_result(death)
        self._fail_ready(SandboxError("init", 0, f"init ended before it was ready ({_status(death)})"))

    def _fail_ready(self, error: SandboxError) -> None:
        if not self.ready.done():
            self.ready.set_exception(error)
            self.ready.exception()  # whoever waits still gets it; nobody has to

    # What init says.

    def _listen(self) -> None:
        """Listen to init while the gate is open; what it sends meanwhile waits in the socket."""
        self._hear(self.gate.is_open and not self._heard_out and self._channel.fileno() >= 0)

    def _hear(self, on: bool) -> None:
        # Never asked of the loop what it does already: a loop that is asked to remove
        # a reader that it has not looks for it in words, which many deaths at once feel.
        if on is self._listening:
            return
        self._listening = on
        if on:
            self._loop.add_reader(self._channel.fileno(), self._readable)
        else:
            self._loop.remove_reader(self._channel.fileno())

    def _hang_up(self) -> None:
        self._heard_out = True
        self._hear(False)

    def _readable(self) -> None:
        for _ in range(PACKETS_AT_ONCE):
            if not self._receive():
                return

    def _drain(self) -> None:
        with contextlib.suppress(ValueError):  # closed already
            while self._receive():
                pass

    def hear(self) -> None:
        """Read what init has said already; for use before calling it silent."""
        self._readable()

    def _receive(self) -> bool:
        if self._channel.fileno() < 0 or not self.gate.is_open:
            return False
        try:
            # One byte more than allowed, so that a longer packet is seen to be one.
            packet, ancillary, flags, _ = self._channel.recvmsg(
                MAX_PACKET_BYTES + 1, _RIGHTS_BYTES, socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, InterruptedError):
            return False
        except ConnectionResetError:
            # Init ended with an order unread. The kernel says so once, and first;
            # init's last words may wait behind it.
            return True
        except OSError:
            packet, ancillary, flags = b"", [], 0
        rights = array.array("i")
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                rights.frombytes(data)
        try:
            return self._received(packet, rights, whole=not flags & _TRUNCATED)
        finally:
            for descriptor in rights:
                os.close(descriptor)

    def _received(self, packet: bytes, rights: array.array[int], *, whole: bool) -> bool:
        if not packet:
            self._hang_up()
            return False
        try:
            if len(packet) > MAX_PACKET_BYTES:
                raise ProtocolViolation("a packet of init is too long")
            # Beats are nearly all that is ever said, each the same as the last.
            parse = _parse_again if len(packet) <= SHORT_PACKET_BYTES else messages.parse_from_init
            message = parse(packet)
            names = message.descriptors if isinstance(message, Ready) else ()
            if not whole or len(rights) != len(names) or (names and self.ready.done()):
                raise ProtocolViolation("init sent descriptors that were not asked for")
            self.descriptors.update(zip(names, rights, strict=True))
            del rights[:]
            self._take(message)
        except ProtocolViolation as violation:
            self._hang_up()
            self._fail_ready(SandboxError("ready", 0, str(violation)))
            if self.on_violation is not None:
                self.on_violation(str(violation))
            return False
        return True

    def _take(self, message: messages.FromInit) -> None:
        self.last_beat_monotonic = time.monotonic()
        self.last_beat_time = datetime.now(UTC)
        match message:
            case Probed(findings, elapsed_us):
                if self.findings or self.ready.done():
                    raise ProtocolViolation("init speaks twice of what it found")
                self.findings, self.probe_seconds = findings, elapsed_us / 1_000_000
            case Ready():
                if not self.ready.done():
                    self.ready_time = self.last_beat_time
                    self.build_seconds = self.last_beat_monotonic - self.asked_at_monotonic
                    self.ready.set_result(None)
            case SetupFailed(step, errno_, text):
                self._fail_ready(SandboxError(step, errno_, text))
            case Beat():
                pass
            case TaskStarted(task_id):
                ticket = self._ticket(task_id)
                ticket.start()
            case TaskExited():
                self._take_exit(message)

    def _take_exit(self, message: TaskExited) -> None:
        ticket = self._ticket(message.task_id)
        del self._tickets[message.task_id]
        if not self._tickets:
            self.idle.set()
        ticket.start()
        ticket.exited.set_result(message)
        if self.on_task_exited is not None:
            self.on_task_exited()

    def _ticket(self, task_id: str) -> Ticket:
        ticket = self._tickets.get(task_id)
        if ticket is None:
            raise ProtocolViolation(f"init speaks of a task it was not given: {task_id[:64]!r}")
        return ticket

    # What init is told.

    def begin(self, order: RunTask | Transfer, descriptors: Sequence[int]) -> Ticket:
        """Tell init to start a task or a transfer; the descriptors stay the caller's to close.

        Raises:
            SandboxError: init does not take it.
        """
        ticket = Ticket(order.task_id)
        self._tickets[order.task_id] = ticket
        self.idle.clear()
        try:
            socket.send_fds(self._channel, [messages.encode(order)], descriptors)
        except (OSError, ProtocolViolation) as error:
            del self._tickets[order.task_id]
            if not self._tickets:
                self.idle.set()
            raise SandboxError("run task", getattr(error, "errno", None) or 0, str(error)) from error
        return ticket

    def signal_task(self, task_id: str, signal_number: int) -> None:
        """Tell init to signal a task; an init that is gone needs no telling."""
        if task_id not in self._tickets:
            return
        try:
            self._channel.send(messages.encode(KillTask(task_id, signal_number)))
        except OSError as error:
            log.warning("%r does not take a signal for task %s: %s", self, task_id, error)

    def close(self) -> None:
        """Let go of the channel and the pidfd."""
        self._hear(False)
        self._channel.close()
        if self._pidfd is not None:
            if self._pidfd_readable_at is None:
                self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None
        while self.descriptors:
            os.close(self.descriptors.popitem()[1])


def _status(death: Death) -> str:
    if death.signal is not None:
        return f"signal {death.signal}"
    return f"exit code {death.exit_code}"
