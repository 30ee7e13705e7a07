"""What a sandbox is on the host, read back from the kernel before its worker runs.

A worker cannot see its control groups nor the user that it is outside, so these
checks are the orchestrator's; the rest of them are in :mod:`~hayflick_sandbox.selfprobe`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from hayflick_sandbox.cgroups import LEAF, Tree
from hayflick_sandbox.messages import MAX_SEEN_CHARS, Finding
from hayflick_sandbox.policy import Limits

# Where subordinate ids begin (login.defs(5), SUB_UID_MIN): below are people and services.
FIRST_UNPRIVILEGED_UID = 100_000


@dataclass(frozen=True)
class Sight:
    """One sandbox, seen from the host.

    Attributes:
        tree: The node's control groups.
        path: The sandbox's, below the node's.
        pid: Of its init.
        uid: The host user id that it was leased.
        limits: What it was promised to be held to.
        listener: What init handed over as the listener of its filter, if anything.
    """

    tree: Tree
    path: str
    pid: int
    uid: int
    limits: Limits
    listener: int | None = None

    @cached_property
    def host_uid(self) -> int:
        """The user that its init is on the host."""
        return os.stat(f"/proc/{self.pid}").st_uid

    @cached_property
    def memberships(self) -> dict[str, str]:
        """Its control group by controller, "" for version 2; proc_pid_cgroup(5)."""
        found = {}
        for line in _read(f"/proc/{self.pid}/cgroup").splitlines():
            _, names, path = line.split(":", 2)
            found.update(dict.fromkeys(names.split(","), path))
        return found

    def inside(self, controller: str) -> str:
        """Return its leaf for *controller*, "" for version 2, when its init really is in it.

        Raises:
            LookupError: it is not, or there is no such hierarchy.
        """
        for one in self.tree.hierarchies:
            if controller in one.controllers or (not controller and one.version == 2):
                leaf = f"{self.tree.roots[one.root]}/{self.path}/{LEAF}"
                where = self.memberships["" if one.version == 2 else controller]
                # What the hierarchy is mounted from may not be its root: a container's is not.
                if not leaf.endswith(where) and not where.endswith(leaf.removeprefix(str(one.root))):
                    raise LookupError(where)
                return leaf
        raise LookupError("no control group")

    def version(self, controller: str) -> int:
        """Return the version of the hierarchy that has *controller*."""
        return self.tree.version(controller)


@dataclass(frozen=True, slots=True)
class Check:
    """One question about a sandbox, as :class:`hayflick_sandbox.selfprobe.Check`."""

    name: str
    layer: str
    grade: str
    reason: str
    ask: Callable[[Sight], tuple[bool, str]]


def observe(sight: Sight) -> tuple[Finding, ...]:
    """Ask every check, and return what came of it; what cannot be read does not hold."""
    findings = []
    for check in CHECKS:
        try:
            held, seen = check.ask(sight)
        except (OSError, LookupError, ValueError) as error:
            held, seen = False, str(error)
        findings.append(Finding(check.name, held, seen[:MAX_SEEN_CHARS]))
    return tuple(findings)


def _unprivileged(sight: Sight) -> tuple[bool, str]:
    return sight.host_uid != 0, str(sight.host_uid)


def _own_user(sight: Sight) -> tuple[bool, str]:
    own = sight.host_uid == sight.uid and sight.uid != os.geteuid() and sight.uid >= FIRST_UNPRIVILEGED_UID
    return own, str(sight.host_uid)


def _memory(sight: Sight) -> tuple[bool, str]:
    leaf = sight.inside("memory")
    name = "memory.limit_in_bytes" if sight.version("memory") == 1 else "memory.max"
    value = _read(f"{leaf}/{name}")
    return value.isdecimal() and int(value) <= sight.limits.memory_bytes, value


def _swap(sight: Sight) -> tuple[bool, str]:
    leaf = sight.inside("memory")
    try:
        if sight.version("memory") == 1:
            value = _read(f"{leaf}/memory.memsw.limit_in_bytes")
            return int(value) <= sight.limits.memory_bytes, value
        value = _read(f"{leaf}/memory.swap.max")
        return value == "0", value
    except FileNotFoundError:
        # A kernel that does not count swap: then there must be none.
        swaps = len(_read("/proc/swaps").splitlines()) - 1
        return not swaps, f"{max(swaps, 0)} swap areas"


def _cpu(sight: Sight) -> tuple[bool, str]:
    leaf = sight.inside("cpu")
    if sight.version("cpu") == 1:
        value = f"{_read(f'{leaf}/cpu.cfs_quota_us')} {_read(f'{leaf}/cpu.cfs_period_us')}"
    else:
        value = _read(f"{leaf}/cpu.max")
    quota, period = value.split()
    return quota.isdecimal() and int(quota) * 1_000 <= sight.limits.cpu_millis * int(period), value


def _pids(sight: Sight) -> tuple[bool, str]:
    value = _read(f"{sight.inside('pids')}/pids.max")
    return value.isdecimal() and int(value) <= sight.limits.pids + 1, value


def _kill(sight: Sight) -> tuple[bool, str]:
    leaf = sight.inside("")
    present = [name for name in ("cgroup.kill", "cgroup.freeze") if os.access(f"{leaf}/{name}", os.W_OK)]
    return len(present) == 2, " ".join(present)


def _tripwire(sight: Sight) -> tuple[bool, str]:
    if sight.listener is None:
        return False, "no listener"
    kind = os.readlink(f"/proc/self/fd/{sight.listener}")
    return kind == "anon_inode:seccomp notify", kind


def _read(path: str) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, 65_536).decode(errors="replace").strip()
    finally:
        os.close(descriptor)


CHECKS = (
    Check("not-host-root", "namespaces", "C", "be root on the host", _unprivileged),
    Check("memory-limit", "memory", "B", "use the host's memory up", _memory),
    Check("no-swap", "memory", "B", "leave its memory limit behind by being swapped out", _swap),
    Check("cpu-limit", "cpu", "B", "use the host's processors up", _cpu),
    Check("pids-limit", "pids", "B", "use the host's processes up", _pids),
    Check("kill-and-freeze", "kill", "B", "fork faster than it is killed", _kill),
    Check("listener", "tripwire", "A", "try every wall, unseen", _tripwire),
    Check("own-host-user", "uid-range", "A", "signal or read what shares its user on the host", _own_user),
)
