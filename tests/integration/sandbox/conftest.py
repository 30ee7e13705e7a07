"""Real sandboxes, spoken to as an orchestrator speaks to them, without any service."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import socket
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hayflick_sandbox import messages
from hayflick_sandbox.cgroups import Tree
from hayflick_sandbox.denials import Book
from hayflick_sandbox.identities import claim_range
from hayflick_sandbox.messages import Beat, Probed, Ready, RunTask, TaskExited, TaskStarted
from hayflick_sandbox.policy import Policy
from hayflick_sandbox.zygote_client import Event, Exited, Started, Zygote, kill

SECONDS = 20.0
CANARY = "HAYFLICK_TEST_CANARY"


def wait(descriptor: int, seconds: float = SECONDS) -> None:
    """Wait until *descriptor* is readable: for a pidfd, until its process is gone."""
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    assert poller.poll(seconds * 1_000), f"nothing happened within {seconds:.0f} s"


@dataclass(frozen=True)
class Finished:
    """How a task ended and what it wrote."""

    exit_code: int | None
    signal: int | None
    out: str
    errors: str


@dataclass
class Running:
    """A task that runs, and the pipes from it."""

    sandbox: Sandbox
    task_id: str
    out: int
    errors: int
    ends: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ends += [self.out, self.errors]

    def finish(self) -> Finished:
        """Read to the end of the output and return how the task ended."""
        texts = {self.out: bytearray(), self.errors: bytearray()}
        poller = select.poll()
        for descriptor in texts:
            poller.register(descriptor, select.POLLIN)
        open_ends = set(texts)
        deadline = time.monotonic() + SECONDS
        while open_ends:
            ready = poller.poll(max(0.0, deadline - time.monotonic()) * 1_000)
            assert ready, "the task did not end"
            for descriptor, _ in ready:
                data = os.read(descriptor, 65_536)
                texts[descriptor] += data
                if not data:
                    poller.unregister(descriptor)
                    open_ends.discard(descriptor)
        self.close()
        ended = self.sandbox.hear(TaskExited)
        assert ended.task_id == self.task_id
        out, errors = (bytes(text).decode(errors="replace") for text in texts.values())
        return Finished(ended.exit_code, ended.signal, out, errors)

    def line(self) -> str:
        """Return the next line of output, which the task flushes as one write."""
        wait(self.out)
        return os.read(self.out, 65_536).decode()

    def close(self) -> None:
        """Close the pipes, once: the numbers are soon somebody else's."""
        while self.ends:
            os.close(self.ends.pop())


@dataclass
class Sandbox:
    """A live sandbox."""

    house: House
    name: str
    uid: int
    pid: int
    pidfd: int
    channel: socket.socket
    listener: int | None = None
    tasks: list[Running] = field(default_factory=list)

    def hear(self, kind: type[Any]) -> Any:
        """Return init's next message of *kind*; beats and starts in between are passed over."""
        while True:
            wait(self.channel.fileno())
            packet, rights, _, _ = socket.recv_fds(
                self.channel,
                messages.MAX_PACKET_BYTES,
                len(messages.DESCRIPTORS),
                socket.MSG_CMSG_CLOEXEC,
            )
            message = messages.parse_from_init(packet)
            names = message.descriptors if isinstance(message, Ready) else ()
            for name, descriptor in zip(names, rights, strict=True):
                if name == "tripwire":
                    self.listener = descriptor
                    self.house.watcher.add(descriptor)
                else:
                    os.close(descriptor)
            if isinstance(message, kind):
                return message
            assert isinstance(message, Beat | Probed | TaskStarted | Ready), message

    def start(self, *argv: str, environment: dict[str, str] | None = None) -> Running:
        """Start a program in it."""
        out_read, out_write = os.pipe2(os.O_CLOEXEC)
        err_read, err_write = os.pipe2(os.O_CLOEXEC)
        task = RunTask(secrets.token_hex(4), "exec", argv=argv, environment=environment)
        try:
            socket.send_fds(self.channel, [messages.encode(task)], [out_write, err_write])
        finally:
            os.close(out_write)
            os.close(err_write)
        running = Running(self, task.task_id, out_read, err_read)
        self.tasks.append(running)
        return running

    def run(self, *argv: str) -> Finished:
        """Run a program in it to its end."""
        return self.start(*argv).finish()

    def python(self, code: str, *arguments: str) -> Finished:
        """Run Python *code* in it."""
        return self.run(sys.executable, "-I", "-c", textwrap.dedent(code), *arguments)

    def ask(self, code: str, *arguments: str) -> Any:
        """Run Python *code* in it and return what it printed as JSON."""
        done = self.python(code, *arguments)
        assert done.exit_code == 0, done
        return json.loads(done.out)

    def proc(self, file: str, pid: int | None = None) -> str:
        """Return a file of /proc as the host sees it, of init or of another process."""
        return Path(f"/proc/{pid or self.pid}/{file}").read_text()

    def children(self) -> list[int]:
        """Return the host pids of the processes that init started."""
        return [int(pid) for pid in self.proc(f"task/{self.pid}/children").split()]


class Watcher:
    """Refuses what trips in any sandbox, on a thread of its own, as an orchestrator does on its loop."""

    def __init__(self) -> None:
        self._book = Book()
        self._epoll = select.epoll()
        self._listeners: set[int] = set()
        self._wake, self._waker = socket.socketpair()
        self._epoll.register(self._wake, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name="watcher")
        self._thread.start()

    def add(self, listener: int) -> None:
        """Answer for *listener*, and close it in the end."""
        self._listeners.add(listener)
        self._epoll.register(listener, select.EPOLLIN)

    def _run(self) -> None:
        while True:
            for descriptor, event in self._epoll.poll():
                if descriptor == self._wake.fileno():
                    return
                if event & select.EPOLLIN:
                    self._book.refuse(descriptor)
                else:  # nobody is left who could ask
                    self._epoll.unregister(descriptor)

    def close(self) -> None:
        """End the thread, and let go of every listener."""
        self._waker.send(b"1")
        self._thread.join()
        for listener in self._listeners:
            os.close(listener)
        self._epoll.close()
        self._wake.close()
        self._waker.close()


class House:
    """A zygote with its cgroups and uids, and the sandboxes that it started."""

    sandbox_class = Sandbox

    def __init__(self, *, readable: Sequence[str] = (), preload: Sequence[str] = ()) -> None:
        self.tree = Tree.create(f"test-{os.getpid()}-{secrets.token_hex(4)}")
        degraded = [name for name in os.environ.get("HAYFLICK_ALLOW_DEGRADED", "").split(",") if name]
        self.uids = claim_range(subordinate="uid-range" not in degraded)
        self.zygote = Zygote.start(
            tree=self.tree, uids=self.uids, degraded=degraded, readable=readable, preload=preload
        )
        self.watcher = Watcher()
        self.live: dict[str, Sandbox] = {}

    def event(self) -> Event:
        """Return the zygote's next event."""
        while (event := self.zygote.receive()) is None:
            wait(self.zygote.socket.fileno())
        return event

    def ask(self, policy: Policy, *, name: str | None = None, uid: int | None = None) -> tuple[str, int, Any]:
        """Ask the zygote for a sandbox; return its name, uid and channel."""
        name = name or secrets.token_hex(8)
        uid = self.uids.lease() if uid is None else uid
        self.tree.add(name, policy.limits)
        return name, uid, self.zygote.launch(name, policy, name, uid)

    def launch(self, policy: Policy | None = None, *, name: str | None = None) -> Sandbox:
        """Start a sandbox and wait until it is ready."""
        name, uid, channel = self.ask(policy or Policy(), name=name)
        started = self.event()
        assert isinstance(started, Started), started
        channel.setblocking(True)
        sandbox = Sandbox(self, name, uid, started.pid, started.pidfd, channel)
        self.live[name] = sandbox
        sandbox.hear(Ready)
        return sandbox

    def exited(self, sandbox: Sandbox) -> Exited:
        """Wait until the zygote says that *sandbox* is gone, and tidy up after it."""
        while True:
            event = self.event()
            assert isinstance(event, Exited), event
            gone = self.live.pop(event.launch_id)
            for task in gone.tasks:
                task.close()
            gone.channel.close()
            os.close(gone.pidfd)
            self.tree.remove(gone.name)
            if gone is sandbox:
                return event

    def end(self, sandbox: Sandbox) -> Exited:
        """Kill *sandbox* and wait until it is gone."""
        if not self.tree.kill(sandbox.name):
            kill(sandbox.pidfd)  # a machine without the layer "kill"
        return self.exited(sandbox)

    @contextlib.contextmanager
    def sandbox(self, policy: Policy | None = None) -> Iterator[Sandbox]:
        """Give a sandbox that ends with the block."""
        one = self.launch(policy)
        try:
            yield one
        finally:
            if one.name in self.live:
                self.end(one)

    def close(self) -> None:
        """Hang up, and assert that the zygote left nothing."""
        self.zygote.close()
        self.zygote.wait_closed()
        self.watcher.close()
        for sandbox in self.live.values():
            for task in sandbox.tasks:
                task.close()
            sandbox.channel.close()
            os.close(sandbox.pidfd)
        left = [directory for directory in self.tree.roots.values() if directory.exists()]
        self.tree.close()
        ours = range(self.uids.first, self.uids.first + self.uids.count)
        self.uids.close()
        # An ordinary user without subordinate ids shares the one that all its processes have.
        assert os.geteuid() in ours or not [pid for pid, uid in processes() if uid in ours]
        assert not left or self.zygote.process.returncode != 0


def processes() -> Iterator[tuple[int, int]]:
    """Yield the pid and the real uid of every process of this machine."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                lines = (line.partition(":") for line in (entry / "status").read_text().splitlines())
                status = {name: value.split() for name, _, value in lines}
                # Whoever inherited a zombie reaps it in its own time.
                if status["State"][0] != "Z":
                    yield int(entry.name), int(status["Uid"][0])


@pytest.fixture(scope="session")
def house() -> Iterator[House]:
    """One zygote for all tests; a secret is in the environment that it was started from."""
    os.environ[CANARY] = "secret"
    made = House()
    del os.environ[CANARY]
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="session")
def make_house() -> Callable[..., contextlib.AbstractContextManager[House]]:
    """Make zygotes of one's own, for tests that kill them or start them otherwise."""

    @contextlib.contextmanager
    def make(**options: Any) -> Iterator[House]:
        made = House(**options)
        try:
            yield made
        finally:
            made.close()

    return make


@pytest.fixture
def sandbox(house: House) -> Iterator[Sandbox]:
    """A fresh sandbox with the default policy."""
    with house.sandbox() as one:
        yield one


def kill_and_wait(pid: int) -> None:
    """Kill a process that a test started and wait until it is gone."""
    descriptor = os.pidfd_open(pid)
    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    wait(descriptor)
    os.close(descriptor)
