"""Process 1 of a sandbox: applies the confinement, beats, runs tasks, reaps.

It runs no user code. It ends when its orchestrator does, because then its
channel ends, and with it the kernel ends every other process of the sandbox
(pid_namespaces(7)).
"""

from __future__ import annotations

import array
import contextlib
import errno
import itertools
import os
import select
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from typing import NoReturn

import prctl

from hayflick_sandbox import families, messages, selfprobe, tasks, transfer
from hayflick_sandbox.messages import (
    Beat,
    Introduce,
    KillTask,
    Ready,
    RunTask,
    SetupFailed,
    TaskExited,
    TaskStarted,
    Transfer,
)
from hayflick_sandbox.process import CHANNEL_FD, KeepDescriptors, NameHost
from hayflick_sandbox.selfprobe import Facts
from hayflick_sandbox.steps import Step

MAX_DESCRIPTORS = 3


def main(
    steps: Sequence[Step],
    channel_fd: int,
    environment: Mapping[str, str],
    *,
    facts: Facts,
    beat_seconds: float,
    cpu_time_seconds: int | None,
) -> NoReturn:
    """Confine this process and serve until the channel ends. Never returns."""
    status = 1
    try:
        own = messages.parse_to_init(os.read(channel_fd, messages.MAX_PACKET_BYTES))
        if not isinstance(own, Introduce):
            raise messages.ProtocolViolation("the first order says who one is")
        opened = _confine(steps, own.hostname, channel_fd)
        if opened is not None:
            prctl.set_name("hayflick-init")
            channel = socket.socket(fileno=CHANNEL_FD)
            _say_found(channel, facts, own.hostname, opened)
            _say_ready(channel, opened)
            Init(channel, {**environment, **own.environment}, beat_seconds, cpu_time_seconds).serve()
            status = 0
    finally:
        os._exit(status)


def _say_found(channel: socket.socket, facts: Facts, hostname: str, opened: dict[str, int]) -> None:
    """Tell the orchestrator how well this sandbox holds, before it is called ready."""
    try:
        channel.send(messages.encode(selfprobe.examine(facts, hostname, opened.values())))
    except BrokenPipeError:
        os._exit(0)


def _say_ready(channel: socket.socket, opened: dict[str, int]) -> None:
    """Hand over what was opened; from here on the orchestrator alone holds it."""
    try:
        socket.send_fds(channel, [messages.encode(Ready(tuple(opened)))], list(opened.values()))
    except BrokenPipeError:
        os._exit(0)
    for descriptor in opened.values():
        os.close(descriptor)


def _confine(steps: Sequence[Step], hostname: str, channel_fd: int) -> dict[str, int] | None:
    """Apply *steps*, calling the machine *hostname*; return what they opened for the orchestrator.

    On the first that fails say so on the channel and return ``None``.
    """
    opened: dict[str, int] = {}
    for step in steps:
        # By identity: isinstance would look into every other step's type, and so copy it.
        if type(step) is NameHost:
            step = NameHost(hostname)  # noqa: PLW2901 -- the name that this worker alone gives its machine
        try:
            opened.update(step.apply() or {})
        except Exception as error:  # noqa: BLE001 -- whatever it is, no worker may run
            number, text = 0, repr(error)
            if isinstance(error, OSError):
                number, text = error.errno or 0, error.strerror or str(error)
                if error.filename is not None:
                    text = f"{text}: {error.filename}"
            report = SetupFailed(type(step).__name__, number, text)
            with socket.socket(fileno=channel_fd) as sock:
                sock.send(messages.encode(report))
                # A socket closed with packets unread gives its peer ECONNRESET
                # before what was sent (net/unix/af_unix.c, unix_release_sock).
                sock.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    while sock.recv(messages.MAX_PACKET_BYTES):
                        continue
            return None
        if type(step) is KeepDescriptors:
            channel_fd = CHANNEL_FD
    return opened


class Init:
    """The loop: orders in, beats and exits out."""

    def __init__(
        self,
        channel: socket.socket,
        environment: Mapping[str, str],
        beat_seconds: float,
        cpu_time_seconds: int | None,
    ) -> None:
        self._channel = channel
        self._environment = environment
        self._beat_seconds = beat_seconds
        self._cpu_time_seconds = cpu_time_seconds
        # By process: the name and the serial number of its task.
        self._tasks: dict[int, tuple[str, int]] = {}
        self._serials = itertools.count(1)
        self._beat_packet = b"", -1  # and of how many tasks it tells

    def serve(self) -> None:
        """Serve until the orchestrator is gone."""
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        poller = select.poll()
        poller.register(self._channel, select.POLLIN)
        poller.register(wake_read, select.POLLIN)
        due = time.monotonic()
        while True:
            wait = due - time.monotonic()
            if wait <= 0:
                self._beat()
                due = time.monotonic() + self._beat_seconds
                continue
            for descriptor, _ in poller.poll(wait * 1_000):
                if descriptor == wake_read:
                    os.read(wake_read, 4_096)
                    self._reap()
                elif not self._obey():
                    return

    def _beat(self) -> None:
        if self._beat_packet[1] != len(self._tasks):
            self._beat_packet = messages.encode(Beat(len(self._tasks))), len(self._tasks)
        try:
            self._channel.send(self._beat_packet[0], socket.MSG_DONTWAIT)
        except BlockingIOError:
            return  # the orchestrator is behind; it will read the beats that wait

    def _send(self, message: messages.FromInit) -> None:
        try:
            self._channel.send(messages.encode(message))
        except BrokenPipeError:
            os._exit(0)

    def _obey(self) -> bool:
        """Carry out one order; return whether there is still somebody to give them."""
        space = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)
        try:
            packet, ancillary, _, _ = self._channel.recvmsg(
                messages.MAX_PACKET_BYTES, space, socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionError:
            return False
        if not packet:
            return False
        descriptors = array.array("i")
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors.frombytes(data)
        try:
            order = messages.parse_to_init(packet)
            if isinstance(order, RunTask | Transfer):
                self._start(order, list(descriptors))
            elif isinstance(order, KillTask):
                self._kill(order)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _start(self, task: RunTask | Transfer, descriptors: list[int]) -> None:
        serial = next(self._serials)
        try:
            pid = os.fork()
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ENOMEM):
                raise
            # pids.max: the worker's other tasks used it up. That is the task's failure.
            code = error.errno
            if isinstance(task, RunTask):
                code = tasks.EXIT_CANNOT_EXECUTE
                os.write(descriptors[1], b"the sandbox has no process left for this task (pids limit)\n")
            self._send(TaskStarted(task.task_id))
            self._send(TaskExited(task.task_id, code, None, 0.0, 0))
            return
        if pid == 0:
            if isinstance(task, Transfer):
                transfer.run(task, descriptors, serial)
            tasks.run(task, descriptors, self._environment, serial=serial, cpu_time=self._cpu_time_seconds)
        self._tasks[pid] = (task.task_id, serial)
        self._send(TaskStarted(task.task_id))

    def _kill(self, order: KillTask) -> None:
        for leader, (name, serial) in self._tasks.items():
            if name != order.task_id:
                continue
            # It may not have marked itself yet.
            families.send({leader}, order.signal)
            if order.signal == signal.SIGKILL:
                families.kill(serial)
            else:
                families.send(families.members(serial) - {leader}, order.signal)

    def _reap(self) -> None:
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid not in self._tasks:
                continue  # an orphan of some task, reparented to us
            task_id, serial = self._tasks.pop(pid)
            # A task ends with all that it started.
            families.kill(serial)
            code = os.waitstatus_to_exitcode(status)
            self._send(
                TaskExited(
                    task_id,
                    exit_code=code if code >= 0 else None,
                    signal=-code if code < 0 else None,
                    cpu_seconds=usage.ru_utime + usage.ru_stime,
                    max_rss_bytes=usage.ru_maxrss * 1024,
                )
            )
