"""Processes that stand where workers shall be: moved aside, and back when no node needs it."""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hayflick_sandbox import delegation
from hayflick_sandbox.cgroups import Tree

pytestmark = pytest.mark.layers("kill")  # it needs a version 2 cgroup of its own


@pytest.fixture
def tree() -> Iterator[Tree]:
    """A node's cgroups."""
    made = Tree.create(f"test-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def top(tree: Tree) -> Iterator[tuple[Path, int]]:
    """A cgroup that was handed to us, and a process in it."""
    unified = next(one for one in tree.hierarchies if one.version == 2)
    directory = tree.roots[unified.root] / "handed"
    directory.mkdir()
    with subprocess.Popen(["/bin/sleep", "1000"]) as process:
        (directory / "cgroup.procs").write_text(str(process.pid))
        yield directory, process.pid
        process.kill()


def where(pid: int) -> str:
    """Return the name of the version 2 cgroup that a process is in."""
    path = delegation.own_paths(Path(f"/proc/{pid}/cgroup").read_text())[""]
    return path.rpartition("/")[2]


def test_processes_move_aside_and_back(top: tuple[Path, int]) -> None:
    """A process is moved aside, kept there while a node lives, and is back when the last one ended."""
    directory, pid = top
    assert delegation.is_handed(directory)
    workers, aside = directory / "hayflick", directory / delegation.SERVICES
    workers.mkdir()
    aside.mkdir()
    delegation._move(directory, aside)
    assert where(pid) == delegation.SERVICES
    delegation.take_back(directory, workers, frozenset())
    assert where(pid) == delegation.SERVICES  # another node still needs it
    workers.rmdir()
    delegation.take_back(directory, workers, frozenset())
    assert where(pid) == "handed"
    assert not aside.exists()


def test_nobody_is_moved_for_nothing(top: tuple[Path, int]) -> None:
    """Where there is no controller to hand down, every process stays where it is."""
    directory, pid = top
    delegation.hand_down(directory, frozenset({"memory", "cpu", "pids"}))
    if not (directory / "cgroup.controllers").read_text().split():
        assert where(pid) == "handed"
        assert not (directory / delegation.SERVICES).exists()
    else:  # a version 2 host: they are handed down, and nobody is in the way
        assert where(pid) == delegation.SERVICES
        assert (directory / "cgroup.subtree_control").read_text().split()
        delegation.take_back(directory, directory / "hayflick", frozenset({"memory", "cpu", "pids"}))
        assert where(pid) == "handed"
