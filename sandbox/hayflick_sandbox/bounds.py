"""What is written to control groups, for a worker, a family and a contract. Pure.

cgroups(7), and the kernel's admin-guide/cgroup-v1 and admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hayflick_sandbox.policy import Limits

CPU_PERIOD_MICROSECONDS = 100_000
# Each worker is two directories: its own, and the leaf in it that holds its processes.
DIRECTORIES_PER_WORKER = 2
# Where a limit can be read back, by controller and version.
LIMIT_FILES = {
    ("memory", 1): "memory.limit_in_bytes",
    ("memory", 2): "memory.max",
    ("cpu", 1): "cpu.cfs_quota_us",
    ("cpu", 2): "cpu.max",
    ("pids", 1): "pids.max",
    ("pids", 2): "pids.max",
}
# A root is one level below its contract, and its leaf two.
LEVELS_OF_A_ROOT = 2


class HeldByKernel(Exception):
    """The kernel makes no further control group below a contract.

    Attributes:
        limit: The term that it holds: ``max_replicas`` or ``max_depth``.
    """

    def __init__(self, limit: str) -> None:
        super().__init__(f"the contract's control group holds what {limit} allows")
        self.limit = limit


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the kernel holds a whole contract to, and each family of it.

    Attributes:
        max_replicas: Workers of the contract on this node at once.
        max_depth: The deepest generation; a root is generation 0.
        family_memory_bytes: Memory of a root and all its descendants; 0 for no limit.
        family_cpu_millis: Their CPU bandwidth, in thousandths of one CPU; 0 for no limit.
        family_pids: Their processes and threads, inits included; 0 for no limit.
    """

    max_replicas: int
    max_depth: int
    family_memory_bytes: int = 0
    family_cpu_millis: int = 0
    family_pids: int = 0

    @property
    def counts(self) -> tuple[tuple[str, int], ...]:
        """The files of a contract's version 2 directory, and their values.

        A cgroup that is removed no longer counts, also while the kernel keeps it
        for what it was charged with (``nr_dying_descendants`` of cgroup.stat).
        """
        return (
            ("cgroup.max.descendants", DIRECTORIES_PER_WORKER * self.max_replicas),
            ("cgroup.max.depth", LEVELS_OF_A_ROOT + self.max_depth),
        )

    def family_settings(self, versions: Mapping[str, int]) -> Iterator[tuple[str, str]]:
        """Yield the files of a root's own directory; *versions* is of each controller."""
        if self.family_memory_bytes:
            yield from _memory(self.family_memory_bytes, versions)
        if self.family_cpu_millis:
            yield from _cpu(self.family_cpu_millis, versions)
        if self.family_pids and "pids" in versions:
            yield "pids.max", str(self.family_pids)

    def narrow(self, limits: Limits) -> Limits:
        """Return a member's *limits* as its family lets it use them.

        Version 1 refuses a share of CPU that is greater than the one above it.
        """
        if not self.family_cpu_millis or limits.cpu_millis <= self.family_cpu_millis:
            return limits
        return dataclasses.replace(limits, cpu_millis=self.family_cpu_millis)


def settings(limits: Limits, versions: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Yield the files to write for one worker, in the order the kernel wants them."""
    yield from _memory(limits.memory_bytes, versions)
    yield from _cpu(limits.cpu_millis, versions)
    if "pids" in versions:
        yield "pids.max", str(limits.pids + 1)  # and its init


def limit_in(text: str) -> int | None:
    """Return the limit in the text of one of :data:`LIMIT_FILES`, ``None`` for no limit.

    A CPU bandwidth is its quota: everyone's period is the same.
    """
    word = text.split(maxsplit=1)[0]
    return None if word in ("max", "-1") else int(word)


def _memory(limit_bytes: int, versions: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    if versions.get("memory") == 1:
        yield "memory.limit_in_bytes", str(limit_bytes)
        # Memory and swap together may not exceed memory alone: no swap.
        yield "memory.memsw.limit_in_bytes", str(limit_bytes)
    elif versions.get("memory") == 2:
        yield "memory.max", str(limit_bytes)
        yield "memory.swap.max", "0"


def _cpu(millis: int, versions: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    quota = millis * CPU_PERIOD_MICROSECONDS // 1_000
    if versions.get("cpu") == 1:
        # The period is the kernel's default; writing it would have the kernel walk
        # the whole tree once more.
        yield "cpu.cfs_quota_us", str(quota)
    elif versions.get("cpu") == 2:
        yield "cpu.max", f"{quota} {CPU_PERIOD_MICROSECONDS}"
