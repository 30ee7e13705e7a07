"""A task ends with all that it started, however that tried to leave; other tasks never notice."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
import time
from typing import Any

import pytest

from hayflick_sandbox import messages
from hayflick_sandbox.messages import KillTask, TaskExited
from hayflick_sandbox.policy import Limits, Policy

pytestmark = pytest.mark.layers("kill")  # what a sandbox holds is counted in its cgroup

# Ten times what is promised, for a machine with other things to do.
SECONDS = 1.0

# Leaves parent, group and session; says so; stays.
DAEMON = """
import os, signal, sys
def leave():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for number in range(1, 32):
                if number not in (9, 19):
                    signal.signal(number, signal.SIG_IGN)
            return True
        os._exit(0)
    os.wait()
    return False
def stay():
    print("up", flush=True)
    while True:
        signal.pause()
"""
PLAIN = "\nif leave(): stay()\n"
# As fast as it can: a child that goes on, a parent that ends.
CHAIN = """
if leave():
    print("up", flush=True)
    while True:
        if os.fork():
            os._exit(0)
"""
BOMB = """
if leave():
    print("up", flush=True)
    while True:
        try:
            os.fork()
        except OSError:
            pass
"""
# Lowers both marks, to another task's or to nothing.
FORGED = """
import resource
if leave():
    low, high = map(int, sys.argv[1:])
    for kind, value in ((10, low), (15, high)):
        try:
            resource.setrlimit(kind, (value, value))
        except ValueError:
            pass
    stay()
"""


def start(sandbox: Any, code: str, *arguments: str, after: str = "") -> Any:
    """Start a program, and wait until what it left behind is up."""
    running = sandbox.start(
        sys.executable, "-I", "-c", DAEMON + textwrap.dedent(code) + textwrap.dedent(after), *arguments
    )
    assert running.line() == "up\n"
    return running


def alive(house: Any, sandbox: Any) -> set[int]:
    """Return the processes of a sandbox, its init left out; the dead that nobody reaped count."""
    pids = (house.tree._leaf(sandbox.name) / "cgroup.procs").read_text().split()
    return {int(pid) for pid in pids} - {sandbox.pid}


def shrinks_to(house: Any, sandbox: Any, left: set[int]) -> None:
    """Assert that soon none but *left* is alive."""
    deadline = time.monotonic() + SECONDS
    while alive(house, sandbox) != left:
        assert time.monotonic() < deadline, alive(house, sandbox)


@pytest.mark.parametrize("code", [PLAIN, CHAIN, BOMB], ids=["daemon", "chain", "bomb"])
def test_what_a_task_left_ends_with_it(house: Any, code: str) -> None:
    """A daemon, a chain of forks and a bomb are gone when their task ended; another task's daemon lives."""
    with house.sandbox(Policy(Limits(pids=40))) as sandbox:
        other = start(sandbox, PLAIN, after="signal.pause()")
        deadline = time.monotonic() + SECONDS
        while len(others := alive(house, sandbox)) != 2:  # the one between them may not be reaped yet
            assert time.monotonic() < deadline
        running = start(sandbox, code)
        assert sandbox.hear(TaskExited).task_id == running.task_id
        running.close()
        shrinks_to(house, sandbox, others)
        sandbox.channel.send(messages.encode(KillTask(other.task_id, signal.SIGKILL)))
        assert sandbox.hear(TaskExited).task_id == other.task_id
        shrinks_to(house, sandbox, set())


@pytest.mark.parametrize("code", [PLAIN, CHAIN, BOMB], ids=["daemon", "chain", "bomb"])
def test_what_a_task_left_is_killed_with_it(house: Any, code: str) -> None:
    """KillTask ends also those that have left the task's parent, group and session long ago."""
    with house.sandbox(Policy(Limits(pids=40))) as sandbox:
        neighbour = sandbox.start("sleep", "60")
        running = start(sandbox, code, after="signal.pause()")
        sandbox.channel.send(messages.encode(KillTask(running.task_id, signal.SIGKILL)))
        assert sandbox.hear(TaskExited).task_id == running.task_id
        running.close()
        deadline = time.monotonic() + SECONDS
        while len(alive(house, sandbox)) > 1:
            assert time.monotonic() < deadline
        (pid,) = alive(house, sandbox)
        os.kill(pid, signal.SIGKILL)
        assert neighbour.finish().signal == signal.SIGKILL


@pytest.mark.parametrize("lower", ["another's", "nothing", "too high"])
def test_no_mark_comes_off(house: Any, lower: str) -> None:
    """A process that changes its marks, be it to those of a task that goes on, ends with its own task."""
    with house.sandbox() as sandbox:
        read = "import json, resource; print(json.dumps([resource.getrlimit(n)[1] for n in (10, 15)]))"
        older = sandbox.start(
            sys.executable,
            "-c",
            read + "; import time; time.sleep(60)",
            environment={"PYTHONUNBUFFERED": "1"},
        )
        low, high = map(int, older.line().strip("[]\n").split(","))
        left = alive(house, sandbox)
        marks = {"another's": (low, high), "nothing": (0, 0), "too high": (low + 1_000, high + 1_000)}[lower]
        running = start(sandbox, FORGED, *map(str, marks))
        assert sandbox.hear(TaskExited).task_id == running.task_id
        running.close()
        shrinks_to(house, sandbox, left)


def test_a_term_reaches_the_daemon_too(house: Any) -> None:
    """A signal that does not kill reaches whoever left the session, once."""
    code = """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if leave():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            print("up", flush=True)
            signal.sigwait({signal.SIGTERM})
            print("heard", flush=True)
            os._exit(0)
    """
    with house.sandbox() as sandbox:
        running = start(sandbox, code, after="signal.pause()")
        sandbox.channel.send(messages.encode(KillTask(running.task_id, signal.SIGTERM)))
        assert running.line() == "heard\n"
