"""Reads from the kernel what the census compares. It runs in a thread and only reads."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from hayflick_orchestrator.census import Observed, PidNamespace
from hayflick_sandbox.cgroups import LEAF

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hayflick_sandbox.cgroups import Tree

MAX_PROCS_BYTES = 1024 * 1024
STATUS_BYTES = 16 * 1024


def observe(tree: Tree) -> Observed:
    """Return what the kernel shows of the node's control groups and of the host's pid namespaces.

    As an ordinary user we may not see the namespaces of processes that are not
    dumpable; what is left is how deep in namespaces they are.
    """
    roots = [str(tree.roots[one.root]) for one in tree.hierarchies]
    if not roots:
        return Observed({})
    groups = dict(_groups(roots[0]))
    leaves = [path for path in groups if path.endswith(f"/{LEAF}")]
    limits = {root: {path: _members(f"{root}/{path}") for path in leaves} for root in roots[1:]}
    # After the groups: a process that is listed in one is in a namespace already.
    all_seen = os.geteuid() == 0
    inside = set() if all_seen else {pid for pids in groups.values() for pid in pids}
    namespaces = {pid: _namespace(pid, deep=pid in inside) for pid in _pids()}
    return Observed(groups, limits, namespaces)


def _groups(root: str) -> Iterator[tuple[str, frozenset[int]]]:
    """Yield each control group below *root*, by its path there, and the processes in it."""
    waiting = [""]
    while waiting:
        path = waiting.pop()
        directory = f"{root}/{path}" if path else root
        # One that goes away meanwhile has nothing to show.
        with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
            waiting += [
                f"{path}/{entry.name}" if path else entry.name
                for entry in entries
                if entry.is_dir(follow_symlinks=False)
            ]
            yield path, _members(directory)


def _members(directory: str) -> frozenset[int]:
    try:
        return frozenset(map(int, _read(f"{directory}/cgroup.procs", MAX_PROCS_BYTES).split()))
    except OSError:
        return frozenset()


def _pids() -> list[int]:
    with os.scandir("/proc") as entries:
        return [int(entry.name) for entry in entries if entry.name.isdecimal()]


def _namespace(pid: int, *, deep: bool) -> PidNamespace:
    depth = _depth(pid) if deep else None
    try:
        status = os.stat(f"/proc/{pid}/ns/pid")  # noqa: PTH116 -- for each process of the host
    except OSError:
        return PidNamespace(depth=depth)
    return PidNamespace(status.st_ino, depth)


def _depth(pid: int) -> int | None:
    """Return in how many pid namespaces a process is: it has a number in each (proc_pid_status(5))."""
    with contextlib.suppress(OSError):
        for line in _read(f"/proc/{pid}/status", STATUS_BYTES).splitlines():
            if line.startswith(b"NSpid:"):
                return len(line.split()) - 1
    return None


def _read(path: str, limit: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = b""
        while len(data) < limit and (piece := os.read(descriptor, limit - len(data))):
            data += piece
        return data
    finally:
        os.close(descriptor)
