"""Sandboxes without any service: open a session, launch, run, end.

Synchronous and small; the orchestrator does the same things on an event loop.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from hayflick_sandbox import landlock, messages, outside
from hayflick_sandbox.cgroups import Tree, Usage
from hayflick_sandbox.denials import Book
from hayflick_sandbox.grades import criteria, judge
from hayflick_sandbox.identities import UidRange, claim_range
from hayflick_sandbox.messages import Beat, Probed, Ready, RunTask, SetupFailed, TaskExited, TaskStarted
from hayflick_sandbox.outside import Sight
from hayflick_sandbox.policy import Policy
from hayflick_sandbox.probe import Layer, probe, require
from hayflick_sandbox.zygote_client import (
    Event,
    Exited,
    LaunchFailed,
    Started,
    Zygote,
    kill,
    readable,
)

READY_SECONDS = 10.0
DEATH_SECONDS = 10.0
BUSY_SECONDS = 0.002
CHUNK_BYTES = 64 * 1024

Sink = Callable[[int, bytes], None]
# The kernel ended init, for want of memory or by a signal, and all others with it.
_INIT_GONE = TaskExited("main", None, signal.SIGKILL, 0.0, 0)


class SandboxFailed(Exception):
    """A sandbox could not be built; the text names the step and the kernel's answer.

    Attributes:
        step: The step that failed, or "" when there was no answer at all.
        errno: What the kernel answered, or 0.
    """

    def __init__(self, text: str, step: str = "", errno: int = 0) -> None:
        super().__init__(text)
        self.step = step
        self.errno = errno


@dataclass(frozen=True, slots=True)
class Result:
    """How a command ended, by exit code or by signal, and what its sandbox used.

    Attributes:
        exit_code: Its exit code, or ``None`` when a signal ended it.
        signal: The signal that ended it, or ``None``.
        oom_killed: Whether the kernel killed a process of it for want of memory.
        usage: What the sandbox used, read before it was removed.
        denials: How often it was refused what only an attack asks for, by class.
    """

    exit_code: int | None
    signal: int | None
    oom_killed: bool
    usage: Usage
    denials: Mapping[str, int]


class Watch:
    """The listener of one sandbox, and what came to it.

    Attributes:
        listener: Its descriptor; ``None`` where the machine gives none.
        denials: How many came, by class.
    """

    def __init__(self, book: Book, listener: int | None) -> None:
        self.listener = listener
        self.denials: dict[str, int] = {}
        self._book = book

    def refuse(self) -> None:
        """Refuse the call that waits, and count it."""
        assert self.listener is not None
        denial = self._book.refuse(self.listener)
        if denial is not None:
            self.denials[denial.denial_class] = self.denials.get(denial.denial_class, 0) + 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Whoever still waits, or asks from now on, is told ENOSYS by the kernel.
        if self.listener is not None:
            os.close(self.listener)
            self.listener = None


class Session:
    """A zygote, its cgroups and its host uids, for one synchronous caller."""

    def __init__(self, tree: Tree, uids: UidRange, zygote: Zygote, layers: tuple[Layer, ...]) -> None:
        self.layers = layers
        self._tree = tree
        self._uids = uids
        self._zygote = zygote
        self._book = Book()
        self._listens = any(layer.name == "tripwire" and layer.enforced for layer in layers)

    @classmethod
    @contextlib.contextmanager
    def open(cls, *, allow_degraded: Sequence[str] = (), preload: Sequence[str] = ()) -> Iterator[Session]:
        """Open a session; at its end every sandbox is dead and every cgroup gone.

        Args:
            allow_degraded: Layers to do without where this machine lacks them.
            preload: Modules that the sandboxes' Python has imported already.

        Raises:
            LimitNotEnforceable: this machine lacks a layer that was not let go.
            ZygoteDied: the zygote could not start.
        """
        tree = Tree.create(f"session-{os.getpid()}-{secrets.token_hex(4)}")
        try:
            layers = probe(tree)
            degraded = require(layers, allow_degraded)
            uids = claim_range(subordinate="uid-range" not in degraded)
            try:
                zygote = Zygote.start(tree=tree, uids=uids, degraded=degraded, preload=preload)
                try:
                    yield cls(tree, uids, zygote, layers)
                finally:
                    zygote.close()
                    zygote.wait_closed()
            finally:
                uids.close()
        finally:
            tree.close()

    def run(self, argv: Sequence[str], policy: Policy, sink: Sink) -> Result:
        """Run one command in a fresh sandbox and return how it ended.

        Args:
            argv: The command, as the sandbox sees it.
            policy: Its confinement.
            sink: Gets (1 or 2, bytes) as the command writes to stdout or stderr.

        Raises:
            SandboxFailed: the sandbox could not be built; nothing ran.
            ValueError: *argv* is empty or too long.
        """
        order = _order(argv)
        name = secrets.token_hex(8)
        uid = self._uids.lease()
        try:
            self._tree.add(name, policy.limits)
            channel, started, watch = self._launch(name, policy, uid)
            try:
                with channel, watch:
                    exited = self._run_task(channel, order, sink, watch)
                    oom_kills, usage = self._tree.oom_kills(name), self._tree.usage(name)
            finally:
                self._end(name, started)
        finally:
            try:
                _remove(self._tree, name)
            finally:
                self._uids.release(uid)
        return Result(exited.exit_code, exited.signal, oom_kills > 0, usage, watch.denials)

    def try_launch(self) -> None:
        """Build one sandbox and end it.

        Raises:
            SandboxFailed: it could not be built, at the step that it names.
            OSError: its cgroups could not be made.
        """
        name, uid, policy = "trial", self._uids.lease(), Policy()
        try:
            self._tree.add(name, policy.limits)
            channel, started, watch = self._launch(name, policy, uid)
            with channel, watch:
                pass
            self._end(name, started)
        finally:
            try:
                _remove(self._tree, name)
            finally:
                self._uids.release(uid)

    def _launch(self, name: str, policy: Policy, uid: int) -> tuple[socket.socket, Started, Watch]:
        channel = self._zygote.launch(name, policy, name, uid)
        answer = self._event(name, READY_SECONDS)
        if not isinstance(answer, Started):
            channel.close()
            if isinstance(answer, LaunchFailed):
                raise SandboxFailed(f"{answer.step}: {answer.message}", answer.step, answer.errno)
            raise SandboxFailed("it ended at once")
        descriptors: dict[str, int] = {}
        try:
            message = _receive(channel, READY_SECONDS)
            if isinstance(message, SetupFailed):
                raise SandboxFailed(f"{message.step}: {message.message}", message.step, message.errno)
            if not isinstance(message, Probed):
                raise SandboxFailed("its init did not say how well it holds")
            probed, message = message, _receive(channel, READY_SECONDS, descriptors)
            if not isinstance(message, Ready):
                raise SandboxFailed("its init did not report ready")
            listener = descriptors.get("tripwire")
            sight = Sight(self._tree, name, answer.pid, uid, policy.limits, listener)
            self._require_confined(probed, sight)
            if self._listens != ("tripwire" in descriptors):
                raise SandboxFailed("its init did not hand over the tripwire")
        except BaseException:
            _close(descriptors)
            channel.close()
            self._end(name, answer)
            raise
        watch = Watch(self._book, descriptors.pop("tripwire", None))
        _close(descriptors)
        return channel, answer, watch

    def _require_confined(self, probed: Probed, sight: Sight) -> None:
        findings = (*probed.findings, *outside.observe(sight))
        missing = judge(criteria(landlock.abi()), findings).short_of("C")
        if missing is not None:
            raise SandboxFailed(f"it does not hold: {missing.name}: {missing.seen}")

    def _run_task(self, channel: socket.socket, order: bytes, sink: Sink, watch: Watch) -> TaskExited:
        channel.setblocking(True)
        out_read, out_write = os.pipe2(os.O_CLOEXEC)
        err_read, err_write = os.pipe2(os.O_CLOEXEC)
        streams = {out_read: 1, err_read: 2}
        try:
            try:
                socket.send_fds(channel, [order], [out_write, err_write])
            except ConnectionError:
                return _INIT_GONE
            finally:
                os.close(out_write)
                os.close(err_write)
            exited = _relay(channel, streams, sink, watch)
            # A background child may hold them open, or write for ever: what the
            # command itself wrote is in the pipes now, and no more is waited for.
            for descriptor, stream in streams.items():
                _drain(descriptor, stream, sink)
            return exited
        finally:
            for descriptor in streams:
                os.close(descriptor)

    def _end(self, name: str, started: Started) -> None:
        try:
            if not self._tree.kill(name):
                kill(started.pidfd)
            deadline = time.monotonic() + DEATH_SECONDS
            while not isinstance(self._event(name, deadline - time.monotonic()), Exited):
                continue
        finally:
            os.close(started.pidfd)

    def _event(self, name: str, seconds: float) -> Event:
        """Return the next event of the launch *name*; others are of launches that were given up."""
        deadline = time.monotonic() + seconds
        while True:
            if (event := self._zygote.receive()) is not None:
                if event.launch_id == name:
                    return event
                if isinstance(event, Started):
                    os.close(event.pidfd)
            elif not readable(self._zygote.socket, deadline - time.monotonic()):
                raise SandboxFailed(f"the zygote did not answer within {seconds:.0f} s")


def _remove(tree: Tree, name: str) -> None:
    """Remove the cgroups of *name*, which may stay busy a moment after the last process was reaped."""
    deadline = time.monotonic() + DEATH_SECONDS
    while True:
        try:
            return tree.remove(name)
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENOTEMPTY) or time.monotonic() > deadline:
                raise
        time.sleep(BUSY_SECONDS)


def _relay(channel: socket.socket, streams: dict[int, int], sink: Sink, watch: Watch) -> TaskExited:
    """Hand on what the command writes, and refuse what it asks for, until it ends."""
    poller = select.poll()
    for descriptor in (*streams, channel.fileno()):
        poller.register(descriptor, select.POLLIN)
    if watch.listener is not None:
        poller.register(watch.listener, select.POLLIN)
    exited: TaskExited | None = None
    while exited is None:
        for descriptor, event in poller.poll():
            if descriptor in streams:
                data = os.read(descriptor, CHUNK_BYTES)
                if data:
                    sink(streams[descriptor], data)
                else:
                    poller.unregister(descriptor)
            elif descriptor == watch.listener:
                if event & select.POLLIN:
                    watch.refuse()
                else:  # nobody is left who could ask
                    poller.unregister(descriptor)
            else:
                exited = _task_exited(channel)
    return exited


def _order(argv: Sequence[str]) -> bytes:
    if not argv or any("\0" in word for word in argv):
        raise ValueError("argv: it must be a command, and no word of it may hold a NUL")
    try:
        return messages.encode(RunTask("main", "exec", argv=tuple(argv)))
    except messages.ProtocolViolation as error:
        raise ValueError(f"argv: {error}") from None


def _close(descriptors: dict[str, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


def _receive(
    channel: socket.socket, seconds: float, descriptors: dict[str, int] | None = None
) -> messages.FromInit | None:
    """Return init's next message; ``None`` when none came in time, or init is gone.

    What it hands over is put into *descriptors*; without it, nothing can be handed over.
    """
    if not readable(channel, seconds):
        return None
    most = 0 if descriptors is None else len(messages.DESCRIPTORS)
    try:
        packet, rights, _, _ = _recv(channel, most)
    except ConnectionResetError:
        # It ended with an order unread; what it said before comes after this error.
        packet, rights, _, _ = _recv(channel, most)
    message, names = None, tuple[str, ...]()
    try:
        message = messages.parse_from_init(packet) if packet else None
        names = message.descriptors if isinstance(message, Ready) else ()
    finally:
        if len(names) != len(rights):
            for descriptor in rights:
                os.close(descriptor)
    if len(names) != len(rights):
        raise SandboxFailed("its init did not hand over what it named")
    if descriptors is not None:
        descriptors.update(zip(names, rights, strict=True))
    return message


def _recv(channel: socket.socket, most: int) -> tuple[bytes, list[int], int, object]:
    return socket.recv_fds(channel, messages.MAX_PACKET_BYTES, most, socket.MSG_CMSG_CLOEXEC)


def _task_exited(channel: socket.socket) -> TaskExited | None:
    message = _receive(channel, 0)
    if isinstance(message, Beat | TaskStarted | Ready):
        return None
    return message if isinstance(message, TaskExited) else _INIT_GONE


def _drain(descriptor: int, stream: int, sink: Sink) -> None:
    """Read at most what the pipe can hold, without waiting."""
    os.set_blocking(descriptor, False)
    left = fcntl.fcntl(descriptor, fcntl.F_GETPIPE_SZ)
    with contextlib.suppress(BlockingIOError):
        while left > 0 and (data := os.read(descriptor, min(left, CHUNK_BYTES))):
            left -= len(data)
            sink(stream, data)
