"""A child never holds more than its parent: the kernel's own facts about both, compared. Pure.

The controller compares what was asked for. This compares what is in force, so that
a default, a rounding, or an error of ours in between cannot widen a generation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class KernelFacts:
    """What the kernel holds one worker to; without an entry, or as None, there is no limit.

    Attributes:
        cgroup: Limits of its control groups, by controller.
        rlimits: Hard limits of its init, which every process of it inherits, as
            ``/proc/PID/limits`` names them.
        capabilities: The five sets of its init, as masks.
        no_new_privs: Whether no exec can raise its rights.
        seccomp_mode: 2 where filters are installed.
        seccomp_filters: How many.
        interfaces: Network interfaces that it can use; the loopback only when it is up.
        licences: What the installed system call filter lets through beyond the common set.
        sizes: What ``/proc`` shows to nobody outside: sizes of its private file
            systems, and what its tasks are started with.
    """

    cgroup: Mapping[str, int | None]
    rlimits: Mapping[str, int | None]
    capabilities: Mapping[str, int]
    no_new_privs: bool
    seccomp_mode: int
    seccomp_filters: int
    interfaces: frozenset[str] = frozenset()
    licences: frozenset[str] = frozenset()
    sizes: Mapping[str, int | None] = field(default_factory=dict)


class Widening(NamedTuple):
    """The first fact in which a child holds more than its parent, and what the parent holds."""

    field: str
    limit: str


def widening(child: KernelFacts, parent: KernelFacts) -> Widening | None:
    """Return the first thing of which *child* has more than *parent*, or ``None``."""
    return next(_widenings(child, parent), None)


def _widenings(child: KernelFacts, parent: KernelFacts) -> Iterator[Widening]:
    yield from _higher("cgroup", child.cgroup, parent.cgroup)
    yield from _higher("rlimit", child.rlimits, parent.rlimits)
    yield from _higher("size", child.sizes, parent.sizes)
    for name, mask in child.capabilities.items():
        held = parent.capabilities.get(name, 0)
        if mask & ~held:
            yield Widening(name, f"{held:016x}")
    for name, of_child, of_parent in (
        ("NoNewPrivs", int(child.no_new_privs), int(parent.no_new_privs)),
        ("Seccomp", child.seccomp_mode, parent.seccomp_mode),
        ("Seccomp_filters", child.seccomp_filters, parent.seccomp_filters),
    ):
        if of_child < of_parent:
            yield Widening(name, str(of_parent))
    yield from (Widening(f"seccomp.{name}", "refused") for name in sorted(child.licences - parent.licences))
    more = sorted(child.interfaces - parent.interfaces)
    yield from (Widening(f"net.{name}", "absent or down") for name in more)


def _higher(
    kind: str, child: Mapping[str, int | None], parent: Mapping[str, int | None]
) -> Iterator[Widening]:
    for name, limit in parent.items():
        value = child.get(name)
        if limit is not None and (value is None or value > limit):
            yield Widening(f"{kind}.{name}", str(limit))
