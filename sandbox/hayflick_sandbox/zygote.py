"""The fork server: a small, single-threaded process that starts every sandbox of a node.

It is started before its orchestrator imports gRPC, because a process with
threads cannot be forked safely, and it imports as little as it can of the
standard library, python-prctl, and a preload list, because all that it imports
is in the memory of every worker and slows every fork. Run as ``python -I -m
hayflick_sandbox.zygote``; standard input is its end of the orchestrator's
SEQPACKET socket.

When the orchestrator is gone, the socket ends, and the zygote kills what runs,
removes the cgroups and ends. When the orchestrator is there and does nothing,
because somebody stopped it, its lease runs out here too: the zygote then
freezes and kills what runs, and starts nothing until the lease is renewed.
"""

from __future__ import annotations

import array
import errno
import gc
import importlib
import json
import math
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prctl

from hayflick_sandbox import forks, init, selfprobe, steps, syscalls, template
from hayflick_sandbox.networks import Networks
from hayflick_sandbox.policy import Policy
from hayflick_sandbox.template import WORKER_UID

MAX_PACKET_BYTES = 128 * 1024
DEATH_GRACE_SECONDS = 10.0

NAMESPACES = (
    syscalls.CLONE_NEWUSER
    | syscalls.CLONE_NEWNS
    | syscalls.CLONE_NEWPID
    | syscalls.CLONE_NEWIPC
    | syscalls.CLONE_NEWUTS
)
# The network namespace is made ahead (see networks.py), and the cgroup namespace
# comes later, when the version 1 cgroups are entered too.


@dataclass(frozen=True, slots=True)
class Setup:
    """What the orchestrator tells its zygote once.

    Attributes:
        preload: Modules to import before any fork.
        readable: Further host paths that every worker may read.
        degraded: Layers that the operator let go by name and this machine lacks.
        unified: This node's directory in the version 2 hierarchy, or ``None``.
        legacy: This node's directories in version 1 hierarchies.
        filters: The compiled seccomp filters, in the order to install them.
        inet_filters: The same for workers that may make AF_INET sockets.
        first_uid: The first of the subordinate uids that the orchestrator maps to 1 and
            above in an ordinary user's namespace; ``None`` where there are none.
    """

    preload: tuple[str, ...]
    readable: tuple[str, ...]
    degraded: frozenset[str]
    unified: str | None
    legacy: tuple[str, ...]
    filters: tuple[bytes, ...]
    inet_filters: tuple[bytes, ...]
    first_uid: int | None = None


class Lease:
    """How long the sandboxes may go on without a word from the orchestrator; for ever until it says.

    By CLOCK_BOOTTIME, which nobody can set and which counts a suspended machine's time.
    """

    def __init__(self) -> None:
        self._ends_at: float | None = None
        self.over = False

    def renew(self, seconds: float) -> None:
        """Let them go on for *seconds* from now."""
        self._ends_at = time.clock_gettime(time.CLOCK_BOOTTIME) + seconds
        self.over = seconds <= 0

    def remaining_seconds(self) -> float | None:
        """Return how long they may go on; ``None`` when nothing will end them."""
        if self._ends_at is None or self.over:
            return None
        return max(0.0, self._ends_at - time.clock_gettime(time.CLOCK_BOOTTIME))

    def lapsed(self) -> bool:
        """Return true once when the time is over."""
        if self.remaining_seconds() != 0.0:
            return False
        self.over = True
        return True


class Zygote:
    """Serves one orchestrator."""

    def __init__(self, sock: socket.socket, setup: Setup) -> None:
        self._sock = sock
        self._setup = setup
        # Numbers alone, side by side: a fork copies what it lets go of, and the names
        # of all who live, each an object of its own, would make each birth dearer than the last.
        self._pids = array.array("i")
        self._lease = Lease()
        self._networks = Networks()
        self._rootless = os.getuid() != 0
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        self._unified = None if setup.unified is None else os.open(setup.unified, flags)
        # Parents of the node's directories: removing those needs a place to stand.
        self._above = [
            (os.open(os.path.dirname(path), flags), os.path.basename(path))
            for path in (*((setup.unified,) if setup.unified else ()), *setup.legacy)
        ]
        self._host = self._prepare()

    def _prepare(self) -> steps.Host:
        with forks.put_off():
            for name in self._setup.preload:
                importlib.import_module(name)
        own_uid, own_gid = os.getuid(), os.getgid()
        # Before we leave one of them.
        namespaces = {kind: os.stat(f"/proc/self/ns/{kind}").st_ino for kind in selfprobe.NAMESPACES}
        inside = template.readable_paths(self._setup.readable)
        last_capability = int(Path("/proc/sys/kernel/cap_last_cap").read_text(encoding="ascii"))
        host = steps.Host(
            template=inside,
            last_capability=last_capability,
            degraded=self._setup.degraded,
            filters=self._setup.filters,
            inet_filters=self._setup.inet_filters,
            namespaces=namespaces,
            inherited_filters=_inherited_filters(),
        )
        if own_uid == 0:
            os.setgroups([])
            syscalls.unshare(syscalls.CLONE_NEWNS)
        else:
            syscalls.unshare(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNS)
            if self._setup.first_uid is None:
                _write(f"/proc/{os.getpid()}/setgroups", "deny")
                _write(f"/proc/{os.getpid()}/uid_map", f"0 {own_uid} 1")
                _write(f"/proc/{os.getpid()}/gid_map", f"0 {own_gid} 1")
            else:
                # Only somebody outside may write a map of more than oneself.
                self._say({"event": "map"})
                if self._sock.recv(MAX_PACKET_BYTES) != b"mapped":
                    raise OSError(errno.EPERM, "the orchestrator could not map the subordinate ids")
                # The user's other groups are no worker's; subgid(5) is what allows to leave them.
                os.setgroups([])
        template.build(inside, idmapped="idmapped-mounts" not in self._setup.degraded)
        return host

    def serve(self) -> None:
        """Serve until the orchestrator is gone, then leave nothing behind."""
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # a terminal's Ctrl-C is the orchestrator's business
        gc.collect()
        gc.freeze()  # so that no collection in a child dirties these pages
        gc.disable()
        self._say({"event": "ready"})
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        poller.register(wake_read, select.POLLIN)
        while True:
            left_seconds = self._lease.remaining_seconds()
            wait_ms = None if left_seconds is None else math.ceil(left_seconds * 1_000)
            ready = poller.poll(0 if self._networks.wanting else wait_ms)
            if self._lease.lapsed():
                self._end_all()
            elif not ready and self._networks.wanting:
                self._networks.stock()
            for descriptor, _ in ready:
                if descriptor == wake_read:
                    os.read(wake_read, 4_096)
                    self._reap()
                elif not self._answer():
                    self._leave()
                    return

    def _answer(self) -> bool:
        # The worker's channel, the tasks file of each version 1 cgroup, the version 2 cgroup.
        expected = 1 + len(self._setup.legacy) + (self._unified is not None)
        space = socket.CMSG_SPACE(expected * array.array("i").itemsize)
        try:
            packet, ancillary, _, _ = self._sock.recvmsg(MAX_PACKET_BYTES, space, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError:
            return False
        if not packet:
            return False
        request = json.loads(packet)
        if "lease_seconds" in request:
            self._lease.renew(request["lease_seconds"])
            return True
        descriptors = array.array("i")
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors.frombytes(data)
        try:
            if self._lease.over:
                raise OSError(errno.ETIME, "the node's lease is over")
            if len(descriptors) != expected:
                raise OSError(errno.EBADMSG, f"{len(descriptors)} descriptors came instead of {expected}")
            channel, *tasks = descriptors
            cgroup = None if self._unified is None else tasks.pop()
            self._launch(request, channel, tasks, cgroup)
        except OSError as error:
            text = error.strerror or str(error)
            self._say(
                {
                    "event": "failed",
                    "launch_id": request["launch_id"],
                    "step": "fork",
                    "errno": error.errno or 0,
                    "message": f"{text}: {error.filename}" if error.filename else text,
                }
            )
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _launch(
        self, request: dict[str, Any], channel: int, tasks: Sequence[int], cgroup: int | None
    ) -> None:
        policy = Policy.from_json(request["policy"])
        with ExitStack() as stack:
            sync_read, sync_write = os.pipe2(os.O_CLOEXEC)
            stack.callback(os.close, sync_read)
            stack.callback(os.close, sync_write)
            plan = steps.plan(
                policy,
                self._host,
                host_uid=request["uid"],
                channel_fd=channel,
                sync_fd=sync_read,
                task_fds=tasks,
            )
            if len(sys._current_frames()) != 1:  # noqa: SLF001 -- the documented way to count threads
                raise OSError(errno.EBUSY, "the zygote has threads and must not fork")
            if policy.external:
                self._networks.enter_outside(**request["outside"])
            else:
                self._networks.enter_fresh(loopback=policy.inet)
            # Before the fork: what the child makes and touches, it must first copy.
            variables = environment()
            facts = steps.facts(policy, self._host, variables)
            pid, pidfd = syscalls.clone3(NAMESPACES, signal.SIGCHLD, cgroup)
            if pid == 0:
                # Else our own copy would keep the pipe open if the zygote died here.
                os.close(sync_write)
                # Nor may a worker find the others in its memory's live part.
                del self._pids[:]
                init.main(
                    plan,
                    channel,
                    variables,
                    facts=facts,
                    beat_seconds=request["beat_seconds"],
                    cpu_time_seconds=policy.limits.cpu_time_seconds,
                )
            stack.callback(os.close, pidfd)
            self._pids.append(pid)
            try:
                outside = self._outside(request["uid"])
                _write(f"{template.HOST_PROC}/{pid}/setgroups", "deny")
                _write(f"{template.HOST_PROC}/{pid}/uid_map", f"{WORKER_UID} {outside} 1")
                _write(f"{template.HOST_PROC}/{pid}/gid_map", f"{WORKER_UID} {outside} 1")
            except OSError:
                # One launch, one answer: it never started, so it must not be seen to exit.
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                self._pids.remove(pid)
                raise
            os.write(sync_write, b"1")
            self._say({"event": "started", "launch_id": request["launch_id"], "pid": pid}, pidfd)

    def _outside(self, uid: int) -> int:
        """Return the worker's uid, and gid, as our own user namespace calls it."""
        if not self._rootless:
            return uid
        # 0 is the user; what is subordinate to the user begins at 1.
        return 0 if self._setup.first_uid is None else uid - self._setup.first_uid + 1

    def _reap(self) -> None:
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid not in self._pids:
                continue
            self._pids.remove(pid)
            code = os.waitstatus_to_exitcode(status)
            self._say(
                {
                    "event": "exited",
                    "pid": pid,
                    "exit_code": code if code >= 0 else None,
                    "signal": -code if code < 0 else None,
                    "cpu_seconds": usage.ru_utime + usage.ru_stime,
                    "max_rss_bytes": usage.ru_maxrss * 1024,
                    "lapsed": self._lease.over,
                }
            )

    def _say(self, event: dict[str, Any], descriptor: int | None = None) -> None:
        rights = [] if descriptor is None else [descriptor]
        try:
            socket.send_fds(self._sock, [json.dumps(event).encode()], rights)
        except (BrokenPipeError, ConnectionResetError):
            return  # the orchestrator is gone; the next receive says so

    def _end_all(self) -> None:
        """Freeze every sandbox, so that none does anything more, then kill it."""
        self._order("cgroup.freeze", b"1")
        self._kill_all()
        # The dead need no thaw; whoever comes next must not be born frozen.
        self._order("cgroup.freeze", b"0")

    def _kill_all(self) -> None:
        self._order("cgroup.kill", b"1")
        for pid in self._pids:
            os.kill(pid, signal.SIGKILL)

    def _order(self, name: str, value: bytes) -> None:
        """Write *value* to a file of this node's version 2 cgroup, where there is one."""
        if self._unified is None:
            return
        try:
            descriptor = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=self._unified)
        except FileNotFoundError:
            return  # the orchestrator removed it already: nobody is left
        try:
            os.write(descriptor, value)
        finally:
            os.close(descriptor)

    def _leave(self) -> None:
        """Kill every sandbox, wait for the last, remove the cgroups."""
        self._kill_all()
        deadline = time.monotonic() + DEATH_GRACE_SECONDS
        signal.set_wakeup_fd(-1)
        while self._pids and time.monotonic() < deadline:
            pid, _ = os.wait()
            self._pids.remove(pid)
        for parent, name in self._above:
            _remove_cgroups(parent, name)


def environment() -> dict[str, str]:
    """Return what is in every worker's environment; nothing is inherited."""
    return {
        "HOME": "/workspace",
        "LANG": "C.UTF-8",
        "PATH": f"{sys.prefix}/bin:/usr/local/bin:/usr/bin:/bin",
        "PWD": "/workspace",
        "TMPDIR": "/tmp",
        "USER": "worker",
    }


def _inherited_filters() -> int:
    """Return how many seccomp filters this process is under: a container's, for one."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == "Seccomp_filters":
            return int(value)
    return 0


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def _remove_cgroups(parent: int, name: str) -> None:
    """Remove the cgroup *name* and all below it, deepest first."""
    try:
        directory = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    except FileNotFoundError:
        return
    try:
        with os.scandir(directory) as entries:
            children = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        for child in children:
            _remove_cgroups(directory, child)
    finally:
        os.close(directory)
    try:
        os.rmdir(name, dir_fd=parent)
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.ENOENT):
            raise


def _filters(texts: list[str]) -> tuple[bytes, ...]:
    return tuple(map(bytes.fromhex, texts))


def main() -> None:
    """Read the setup from the socket at descriptor 0, then serve."""
    sock = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    prctl.set_name("hayflick-zygote")
    # Both are inherited, and neither may depend on who started the orchestrator:
    # workers must be able to enter what the template makes, and SIGCHLD must come.
    os.umask(0o022)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    values = json.loads(sock.recv(MAX_PACKET_BYTES))
    setup = Setup(
        preload=tuple(values["preload"]),
        readable=tuple(values["readable"]),
        degraded=frozenset(values["degraded"]),
        unified=values["unified"],
        legacy=tuple(values["legacy"]),
        filters=_filters(values["filters"]),
        inet_filters=_filters(values["inet_filters"]),
        first_uid=values["first_uid"],
    )
    try:
        zygote = Zygote(sock, setup)
    except (OSError, ValueError, ImportError) as error:
        sock.send(json.dumps({"event": "broken", "message": str(error)}).encode())
        sys.exit(1)
    zygote.serve()


if __name__ == "__main__":
    main()
