"""From birth to extinction: failures on the way, many at once, and deaths that leave nothing."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from hayflick_sandbox import frames, messages
from hayflick_sandbox.identities import claim_range
from hayflick_sandbox.messages import KillTask, RunTask, SetupFailed, TaskExited
from hayflick_sandbox.policy import Limits, Policy
from hayflick_sandbox.zygote_client import Exited, LaunchFailed, Started, Zygote, ZygoteDied

MANY = 100
SECONDS = 20.0


def gone(descriptor: int) -> None:
    """Wait until the process of a pidfd is gone, and close it."""
    import select

    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    assert poller.poll(SECONDS * 1_000), "the process did not end"
    os.close(descriptor)


@pytest.mark.parametrize(
    ("argv", "exit_code", "number"),
    [
        (("true",), 0, None),
        (("sh", "-c", "exit 7"), 7, None),
        (("sh", "-c", "kill -TERM $$"), None, signal.SIGTERM),
        (("sh", "-c", "kill -SEGV $$"), None, signal.SIGSEGV),
        (("no-such-program",), 127, None),
        (("/etc/passwd",), 126, None),
        (("/workspace",), 126, None),
    ],
)
def test_ends_are_told(
    sandbox: Any, argv: tuple[str, ...], exit_code: int | None, number: int | None
) -> None:
    """Init says how each task ended: its exit code, or the signal that ended it."""
    done = sandbox.run(*argv)
    assert (done.exit_code, done.signal) == (exit_code, number)


def test_both_streams_arrive_apart(sandbox: Any) -> None:
    """Standard output and standard error come on pipes of their own; standard input is empty."""
    done = sandbox.run("sh", "-c", "echo out; echo error >&2; cat")
    assert (done.exit_code, done.out, done.errors) == (0, "out\n", "error\n")


def test_a_background_child_delays_nobody(sandbox: Any) -> None:
    """A child that still holds the output does not delay the news that its parent ended."""
    running = sandbox.start("sh", "-c", "sleep 60 & exit 3")
    assert sandbox.hear(TaskExited).exit_code == 3
    running.close()


def test_a_task_is_killed_with_its_family(sandbox: Any) -> None:
    """KillTask ends a task, its children, and those of them that left its process group."""
    running = sandbox.start("sh", "-c", "setsid sleep 60 & sleep 60 & echo up; wait")
    assert running.line() == "up\n"
    sandbox.channel.send(messages.encode(KillTask(running.task_id, signal.SIGKILL)))
    # The pipes end when the last of the family is gone.
    assert running.finish().signal == signal.SIGKILL


def test_a_policys_environment_reaches_each_task(house: Any) -> None:
    """The policy's variables are in every task's environment, and a task's own win over them."""
    with house.sandbox(Policy(environment={"A": "policy", "B": "policy"})) as sandbox:
        code = "import json, os; print(json.dumps([os.environ['A'], os.environ['B']]))"
        running = sandbox.start("python", "-c", code, environment={"B": "task"})
        assert json.loads(running.finish().out) == ["policy", "task"]
        assert sandbox.ask(code) == ["policy", "policy"]


@pytest.mark.layers("uid-range")
def test_an_identity_that_cannot_be_had(house: Any) -> None:
    """A uid that the kernel cannot map fails the launch once, and the next launch succeeds."""
    name, _, channel = house.ask(Policy(), uid=2**32 - 1)
    failed = house.event()
    assert isinstance(failed, LaunchFailed)
    assert (failed.launch_id, failed.step) == (name, "fork")
    channel.close()
    house.tree.remove(name)
    with house.sandbox() as sandbox:
        assert sandbox.run("true").exit_code == 0


@pytest.mark.layers("kill")
def test_a_cgroup_that_is_not_there(house: Any) -> None:
    """A launch into a cgroup that nobody made fails and starts nothing."""
    with pytest.raises(FileNotFoundError, match="no/such/group/self"):
        house.zygote.launch("stray", Policy(), "no/such/group", house.uids.lease())
    with house.sandbox() as sandbox:
        assert sandbox.run("true").exit_code == 0


def test_a_step_that_fails_ends_the_birth(make_house: Any, tmp_path: Path) -> None:
    """When the kernel refuses a step, init names the step, runs nothing and is gone."""
    # More directories than the least /tmp has room for, below which this path lies.
    deep = tmp_path.joinpath(*["d"] * 300)
    deep.mkdir(parents=True)
    with make_house(readable=(str(deep),)) as house:
        name, _, channel = house.ask(Policy(Limits(tmp_bytes=0), environment={"A": "x"}))
        started = house.event()
        assert isinstance(started, Started)
        channel.setblocking(True)
        said = messages.parse_from_init(channel.recv(messages.MAX_PACKET_BYTES))
        assert isinstance(said, SetupFailed)
        assert said.step == "ShowReadOnly"
        assert said.message.startswith("No space left on device")
        exited = house.event()
        assert isinstance(exited, Exited)
        assert (exited.launch_id, exited.exit_code) == (name, 1)
        channel.close()
        os.close(started.pidfd)
        house.tree.remove(name)


@pytest.mark.layers("kill")
def test_a_zygote_that_cannot_start(house: Any) -> None:
    """A preload that does not exist stops the zygote with words, and leaves no process."""
    with pytest.raises(ZygoteDied, match="no_such_module"):
        Zygote.start(tree=house.tree, preload=("no_such_module",))
    assert house.tree.roots


def test_a_request_over_a_packet_is_refused_here(house: Any) -> None:
    """A request that fits no packet is refused before it is sent, and the zygote lives."""
    with pytest.raises(ValueError, match="over"):
        house.zygote.launch("x" * 200_000, Policy(), "path", 1)
    with house.sandbox() as sandbox:
        assert sandbox.run("true").exit_code == 0


def test_an_init_without_its_orchestrator_ends(house: Any) -> None:
    """When the channel ends init ends, and with it a task that ignores every signal."""
    sandbox = house.launch()
    code = "import signal\nfor n in range(1, 32):\n  n in (9, 19) or signal.signal(n, signal.SIG_IGN)\n"
    running = sandbox.start("python", "-c", code + "print('up', flush=True)\nwhile True: signal.pause()")
    assert running.line() == "up\n"
    sandbox.channel.shutdown(socket.SHUT_RDWR)
    assert house.exited(sandbox).exit_code == 0


@pytest.mark.layers("kill")
def test_a_freeze_holds_and_a_kill_ends_the_frozen(house: Any) -> None:
    """A frozen worker makes no step until it is thawed, and dies frozen as well as awake."""
    import select

    sandbox = house.launch()
    running = sandbox.start("sh", "-c", "while :; do echo x; done")
    assert running.line().startswith("x\n")
    events = house.tree.events_fd(sandbox.name)
    poller = select.poll()
    poller.register(events, select.POLLPRI)
    house.tree.freeze(sandbox.name)
    while not house.tree.frozen(sandbox.name):
        assert poller.poll(SECONDS * 1_000)
        os.pread(events, 4_096, 0)
    os.close(events)
    before = house.tree.usage(sandbox.name).cpu_seconds
    assert house.tree.usage(sandbox.name).cpu_seconds == before
    assert house.end(sandbox).signal == signal.SIGKILL


@pytest.mark.layers("kill")
def test_one_write_kills_a_hundred(house: Any) -> None:
    """A hundred sandboxes of one family, each with a uid of its own, die by a single write."""
    family = secrets.token_hex(4)
    sandboxes = [house.launch(name=f"{family}/{number}") for number in range(MANY)]
    assert len({one.uid for one in sandboxes}) == MANY
    assert len({one.proc("uid_map") for one in sandboxes}) == MANY
    assert house.tree.populated(family)
    assert house.tree.kill(family)
    for one in sandboxes:
        gone(os.dup(one.pidfd))
    while any(one.name in house.live for one in sandboxes):
        event = house.event()
        assert isinstance(event, Exited)
        assert event.signal == signal.SIGKILL
        ended = house.live.pop(event.launch_id)
        ended.channel.close()
        os.close(ended.pidfd)
    assert not house.tree.populated(family)
    house.tree.remove(family)


CLIENT = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from conftest import House
house = House()
sandboxes = [house.launch() for _ in range(3)]
for one in sandboxes:
    one.start("sh", "-c", "setsid sleep 1000 & sleep 1000 & trap '' TERM INT HUP; sleep 1000")
    while len(one.children()) == 0:
        time.sleep(0)
print(house.tree.node, house.zygote.process.pid, *(one.pid for one in sandboxes), flush=True)
sys.stdin.read()
"""


@pytest.mark.layers("kill")
def test_a_killed_client_leaves_nothing() -> None:
    """When the client is killed by SIGKILL, its zygote ends every process and removes every cgroup."""
    with subprocess.Popen(
        [sys.executable, "-c", CLIENT, str(Path(__file__).parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as client:
        assert client.stdout is not None
        node, *pids = client.stdout.readline().split()
        descriptors = [os.pidfd_open(int(pid)) for pid in pids]
        assert groups(node)
        client.kill()
    for descriptor in descriptors:
        gone(descriptor)
    assert groups(node) == []


def groups(node: str) -> list[Path]:
    """Return the cgroups of *node* that exist."""
    # Not by glob, which fails when a cgroup of another run goes away meanwhile.
    return [Path(path) for path, _, _ in os.walk("/sys/fs/cgroup") if path.endswith(f"/hayflick/{node}")]


@pytest.mark.layers("kill")
def test_a_killed_zygote_takes_all_along(make_house: Any) -> None:
    """When the zygote is killed by SIGKILL, the kernel ends every sandbox of it at once."""
    with make_house() as house:
        sandboxes = [house.launch() for _ in range(3)]
        for one in sandboxes:
            one.start("sh", "-c", "setsid sleep 1000 & sleep 1000")
        house.zygote.process.kill()
        for one in sandboxes:
            gone(os.dup(one.pidfd))
        with pytest.raises(ZygoteDied):
            house.event()
        assert not house.tree.populated("")


SEARCH = '''
def search(words):
    """Return which of *words*, each given backwards, are in this process's memory or frames."""
    import ctypes, sys
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, so that our own memory is ours to read
    found = set()
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", 0) as memory:
        for line in maps.read().splitlines():
            where, mode, *_ = line.split()
            if not mode.startswith("rw"):
                continue
            low, high = (int(edge, 16) for edge in where.split("-"))
            try:
                memory.seek(low)
                data = memory.read(high - low)
            except OSError:
                continue
            found.update(word for word in words if word[::-1].encode() in data)
    return sorted(found)
'''


def test_no_memory_of_anothers_secrets(make_house: Any) -> None:
    """A task forked from the zygote finds no variable of another worker in its own memory."""
    secret, own = secrets.token_hex(16), secrets.token_hex(16)
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(SEARCH, scope)  # the function must travel by value

    def task(
        _context: object, search: Any = scope["search"], words: tuple[str, ...] = (secret[::-1], own[::-1])
    ) -> Any:
        return search(words)

    task.__module__ = "__main__"
    facts = {"worker_id": "w", "depth": 0, "cpu_millis": 100, "memory_limit_bytes": 1 << 28}
    contract = {"max_depth": 1, "max_replicas": 1, "cooldown_seconds": 0.0}
    info = {"context": {"manifest": facts, "contract": contract, "active_count": 0}}
    with make_house(preload=("cloudpickle", "replication._inside")) as house:
        house.launch(Policy(environment={"SECRET": secret}))
        curious = house.launch(Policy(Limits(), environment={"OWN": own}))
        ours, theirs = socket.socketpair()
        null = os.open(os.devnull, os.O_WRONLY)
        order = messages.encode(RunTask("search", "call", "replication._inside:evaluate"))
        socket.send_fds(curious.channel, [order], [null, null, theirs.fileno()])
        theirs.close()
        os.close(null)
        with ours:
            frames.write_frame(ours, {"type": "start", "info": info}, cloudpickle.dumps(task))
            answer = frames.read_frame(ours)
        assert answer is not None
        header, body = answer
        assert header == {"type": "result"}, header
        # Its own variable proves that the search finds what is there.
        assert json.loads(body) == [own[::-1]]


@pytest.mark.layers("uid-range")
def test_a_block_of_uids_is_kept_while_a_worker_may_live(make_house: Any) -> None:
    """The host uids of a node that died are nobody else's before its zygote is gone too."""
    with make_house() as one:
        one.launch()
        # What the kernel does when an orchestrator dies.
        one.uids.close()
        with contextlib.closing(claim_range(subordinate=True)) as other:
            assert other.first != one.uids.first
