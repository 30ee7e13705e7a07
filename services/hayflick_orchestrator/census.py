"""The census: what was declared against what the kernel shows; no I/O, no clock.

A drift is a difference that has no innocent reason once it lasts. A birth or an
end that is seen half-way looks like one, so only what two counts in a row saw
is told.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

# Of one count, told one by one; a host that is that wrong needs no longer list.
MAX_TOLD = 100


class DriftKind(enum.Enum):
    """What is not as it was declared."""

    STRAY_GROUP = "stray_group"
    STRAY_PROCESS = "stray_process"
    ESCAPED_PROCESS = "escaped_process"
    UNLIMITED_PROCESS = "unlimited_process"
    MISSING_INIT = "missing_init"


@dataclass(frozen=True, slots=True)
class Place:
    """A sandbox that was declared.

    Attributes:
        path: Its place in the lineage tree.
        worker_id: Whose; empty where a predicate is evaluated.
        init_pid: Of its init on the host; 0 before it is forked.
        settled: Whether it lives for certain: ready before and after the count,
            and not about to end.
    """

    path: str
    worker_id: str = ""
    init_pid: int = 0
    settled: bool = False


@dataclass(frozen=True, slots=True)
class PidNamespace:
    """The pid namespace of a process, as far as it may be seen.

    Attributes:
        inode: Its identity, or ``None`` where the kernel does not show it to us.
        depth: How many namespaces deep, or ``None`` where that was not read.
    """

    inode: int | None = None
    depth: int | None = None

    def differs(self, other: PidNamespace) -> bool:
        """Return whether they are certainly not the same."""
        if self.inode is not None and other.inode is not None:
            return self.inode != other.inode
        if self.depth is not None and other.depth is not None:
            return self.depth != other.depth
        return False


@dataclass(frozen=True, slots=True)
class Observed:
    """What the kernel shows.

    Attributes:
        groups: Each control group of the node, by its path, and the processes in it.
        limits: For each hierarchy of limits beside that, the processes in each worker's own group.
        namespaces: The pid namespace of each process on the host that may be seen.
    """

    groups: Mapping[str, frozenset[int]]
    limits: Mapping[str, Mapping[str, frozenset[int]]] = field(default_factory=dict)
    namespaces: Mapping[int, PidNamespace] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, order=True)
class Drift:
    """One difference.

    Attributes:
        kind: Which.
        path: Where.
        pid: Of which process; 0 for none.
        worker_id: Whose place it is; empty for nobody's.
    """

    kind: str
    path: str
    pid: int = 0
    worker_id: str = ""


def compare(places: Sequence[Place], observed: Observed, leaf: str) -> set[Drift]:
    """Return all that is not as declared.

    Args:
        places: The sandboxes that live, are being born or are ending.
        observed: What the kernel shows.
        leaf: The name of a worker's own group within its place.
    """
    leaves = {f"{place.path}/{leaf}": place for place in places}
    drifts = set(_strays(places, leaves, observed))
    for path, place in leaves.items():
        if place.settled:
            drifts.update(_of_place(path, place, observed))
    drifts.update(_escaped(leaves, observed))
    return drifts


def _strays(places: Sequence[Place], leaves: Mapping[str, Place], observed: Observed) -> Iterator[Drift]:
    """Yield groups of nobody, and processes where no process may be."""
    by_path = {place.path: place for place in places}
    known = set(leaves) | {prefix for path in by_path for prefix in _prefixes(path)}
    for path, pids in observed.groups.items():
        owner = _owner(path, by_path)
        # Whatever is in a group of nobody is told of with it, once.
        if path and path not in known and (_parent(path) in known or not _parent(path)):
            yield Drift(DriftKind.STRAY_GROUP.value, path, worker_id=owner)
        if path not in leaves:
            for pid in pids:
                yield Drift(DriftKind.STRAY_PROCESS.value, path, pid, owner)


def _of_place(path: str, place: Place, observed: Observed) -> Iterator[Drift]:
    pids = observed.groups.get(path, frozenset())
    if place.init_pid not in pids:
        yield Drift(DriftKind.MISSING_INIT.value, path, place.init_pid, place.worker_id)
    own = observed.namespaces.get(place.init_pid, PidNamespace())
    for pid in pids:
        if own.differs(observed.namespaces.get(pid, own)):
            yield Drift(DriftKind.STRAY_PROCESS.value, path, pid, place.worker_id)
    for groups in observed.limits.values():
        for pid in pids - groups.get(path, frozenset()):
            yield Drift(DriftKind.UNLIMITED_PROCESS.value, path, pid, place.worker_id)


def _escaped(leaves: Mapping[str, Place], observed: Observed) -> Iterator[Drift]:
    """Yield processes of a worker's pid namespace that are not in its group."""
    homes: dict[int, tuple[str, Place]] = {}
    for path, place in leaves.items():
        inode = observed.namespaces.get(place.init_pid, PidNamespace()).inode
        if place.settled and inode is not None:
            homes[inode] = (path, place)
    for pid, namespace in observed.namespaces.items():
        home = homes.get(namespace.inode) if namespace.inode is not None else None
        if home is None or pid == home[1].init_pid:
            continue
        path, place = home
        if pid not in observed.groups.get(path, frozenset()):
            yield Drift(DriftKind.ESCAPED_PROCESS.value, path, pid, place.worker_id)


class Sightings:
    """Tells what lasts from what passes: a drift is told when two counts in a row saw it, and once."""

    def __init__(self) -> None:
        self._seen: set[Drift] = set()
        self._told: set[Drift] = set()

    def confirm(self, drifts: Iterable[Drift]) -> list[Drift]:
        """Return those of *drifts* that are to be told now, in order, :data:`MAX_TOLD` at most."""
        now = set(drifts)
        self._told &= now
        fresh = sorted((now & self._seen) - self._told)[:MAX_TOLD]
        self._told.update(fresh)
        self._seen = now
        return fresh


def _prefixes(path: str) -> Iterator[str]:
    """Yield *path* and every group above it."""
    while path:
        yield path
        path = _parent(path)


def _owner(path: str, by_path: Mapping[str, Place]) -> str:
    """Return the worker in whose place *path* lies."""
    return next((by_path[prefix].worker_id for prefix in _prefixes(path) if prefix in by_path), "")


def _parent(path: str) -> str:
    return path.rpartition("/")[0]
