"""The lineage as a cgroup tree: one small module for v2, hybrid and v1 controllers.

A node owns ``hayflick/<node>`` in every hierarchy it uses, and below it each
worker has the same relative path in all of them, with a leaf ``self`` for its
own processes beside its children. A family is thus one directory: killing or
freezing it is one write to the version 2 hierarchy, however many processes it
holds. Limits are written where the controller lives, v1 or v2.

Each worker is exactly two directories, and the version 2 hierarchy holds every
contract to so many, so deep: what the controller decided, the kernel decides again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from hayflick_sandbox import delegation, disks
from hayflick_sandbox.bounds import LIMIT_FILES, Bounds, HeldByKernel, limit_in, settings
from hayflick_sandbox.policy import Limits

CONTROLLERS = ("memory", "cpu", "pids")
# The last two are wanted, and not insisted on.
_WANTED = frozenset({*CONTROLLERS, *disks.CONTROLLERS})
OWN = "hayflick"
ATTEMPTS = 10
ROOT_PARTS = 3  # contract, root, leaf
CHARGED_AT_ONCE_BYTES = 64 * 4_096  # MEMCG_CHARGE_BATCH of the kernel, in pages
LEAF = "self"  # no worker's id, which is hexadecimal


@dataclass(frozen=True, slots=True)
class Usage:
    """What a worker's own processes use; a figure that no controller gives is ``None``."""

    memory_bytes: int | None
    memory_peak_bytes: int | None
    cpu_seconds: float | None
    pids: int | None


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """One mounted cgroup hierarchy and the controllers that it has for us.

    Attributes:
        root: Below which directory we work: the mount point, or a cgroup that was delegated to us.
        version: 1 or 2.
        controllers: Those of ours that it has.
        mounted: What of the hierarchy is mounted; see proc_pid_mountinfo(5), field 4.
    """

    root: Path
    version: int
    controllers: frozenset[str]
    mounted: str = "/"


def hierarchies(
    mountinfo: str | None = None, read: Callable[[Path], str] = Path.read_text
) -> list[Hierarchy]:
    """Return the mounted hierarchies that matter to us, version 2 first.

    Args:
        mountinfo: The text of ``/proc/self/mountinfo``; see proc_pid_mountinfo(5).
        read: How to read a file; for tests.
    """
    if mountinfo is None:
        mountinfo = Path("/proc/self/mountinfo").read_text(encoding="utf-8")
    found: list[Hierarchy] = []
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        mounted, point = (field.replace("\\040", " ") for field in before.split()[3:5])
        kind, _, options = after.split(maxsplit=2)
        if kind == "cgroup2":
            names = frozenset(read(Path(point, "cgroup.controllers")).split())
            found.insert(0, Hierarchy(Path(point), 2, names & _WANTED, mounted))
        elif kind == "cgroup":
            ours = frozenset(options.split(",")) & _WANTED
            if ours:
                found.append(Hierarchy(Path(point), 1, ours, mounted))
    return found


def places(one: Hierarchy, own: Mapping[str, str]) -> list[Hierarchy]:
    """Return where in a hierarchy to work, best first: at its top, or in our own cgroup there.

    Args:
        one: The hierarchy, as it is mounted.
        own: Our path in each hierarchy; see :func:`delegation.own_paths`.
    """
    controller = "" if one.version == 2 else min(one.controllers)
    ours = delegation.own_directory(one.root, one.mounted, own.get(controller, ""))
    if ours is None or ours == one.root:
        return [one]
    return [one, dataclasses.replace(one, root=ours)]


class Tree:
    """This node's part of the cgroup tree."""

    def __init__(self, node: str, used: list[Hierarchy]) -> None:
        self.node = node
        self.hierarchies = used
        self._unified = next((one for one in used if one.version == 2), None)
        self._of = {name: one for one in used for name in one.controllers}
        self._versions = {name: one.version for name, one in self._of.items()}
        self._bounds: dict[str, tuple[tuple[str, int], ...]] = {}
        self.roots = {one.root: one.root / OWN / node for one in used}
        # The same as text, by hierarchy in their order and by controller, "" for version 2:
        # what every birth and every reading goes by, where pathlib takes as long as the kernel.
        self._tops = [(one, str(self.roots[one.root])) for one in used]
        self._top_of = {name: top for one, top in self._tops for name in one.controllers}
        if self._unified is not None:
            self._top_of[""] = str(self.roots[self._unified.root])
        self.disks = self._throttled(disks.behind(("/", "/usr", sys.base_prefix, sys.prefix)))

    @classmethod
    def create(cls, node: str) -> Tree:
        """Make this node's directory in every hierarchy that lets us.

        A hierarchy that does not is left out; :meth:`enforces` tells what is
        missing, and whoever needs it refuses. Where the top of a hierarchy is not
        ours to write, our own cgroup may be.
        """
        own = delegation.own_paths(Path("/proc/self/cgroup").read_text(encoding="utf-8"))
        used = []
        for mounted in hierarchies():
            for one in places(mounted, own):
                directory = one.root / OWN / node
                try:
                    _make(directory)
                    used.append(one if one.version == 1 else _delegate(one, directory))
                    break
                except OSError:
                    with contextlib.suppress(OSError):
                        _remove_own(one, directory)
        tree = cls(node, used)
        idle = [one for one in used if one.controllers == {"blkio"}]
        if tree.disks or not idle:
            return tree
        # A hierarchy in which nothing can be limited is only a cost to each birth.
        for one in idle:
            _remove_own(one, tree.roots[one.root])
        return cls(node, [one for one in used if one not in idle])

    def _throttled(self, candidates: Iterable[str]) -> tuple[str, ...]:
        """Return those of *candidates* that the kernel takes a limit for, shown by setting none."""
        taken = []
        for disk in candidates:
            for name, value in disks.unlimited(self._versions, disk):
                with contextlib.suppress(OSError):
                    _write(self.roots[self._of[name.partition(".")[0]].root] / name, value)
                    taken.append(disk)
        return tuple(taken)

    def enforces(self, what: str) -> bool:
        """Return whether *what* is enforced: ``memory``, ``cpu``, ``pids``, ``io`` or ``kill``."""
        if what == "io":
            return bool(self.disks)
        return self._unified is not None if what == "kill" else what in self._of

    def version(self, controller: str) -> int:
        """Return the version of the hierarchy that has *controller*.

        Raises:
            LookupError: none has it.
        """
        return self._versions[controller]

    def add(self, path: str, limits: Limits | None = None, bounds: Bounds | None = None) -> None:
        """Make the cgroups of a worker at *path*, with *limits* on its own processes.

        Args:
            path: ``<contract>/<root>``, or a parent's path + ``/`` + the id.
            limits: Written to the leaf before any process can be in it.
            bounds: What its contract and its family are held to, written before
                its first worker.

        Raises:
            HeldByKernel: the contract has as many workers, or as deep, as *bounds* allow.
            OSError: the kernel refused one of the writes.
        """
        parts = PurePosixPath(path, LEAF).parts
        written: list[tuple[str, str, str]] = []
        if bounds is not None:
            self._bound(parts[0], bounds)
            if len(parts) == ROOT_PARTS:
                written += [(path, *one) for one in bounds.family_settings(self._versions)]
            limits = None if limits is None else bounds.narrow(limits)
        try:
            self._make(path)
        except BlockingIOError as error:  # EAGAIN: cgroup.max.descendants or cgroup.max.depth
            raise HeldByKernel(self._held_by(parts)) from error
        if limits is not None:
            leaf = f"{path}/{LEAF}"
            written += [(leaf, *one) for one in settings(limits, self._versions)]
            written += [(leaf, *one) for one in disks.settings(limits, self._versions, self.disks)]
        for where, name, value in written:
            _write(f"{self._top_of[name.partition('.')[0]]}/{where}/{name}", value)

    def _bound(self, contract: str, bounds: Bounds) -> None:
        """Have the kernel hold a whole contract to its population and depth."""
        if self._unified is None or self._bounds.get(contract) == bounds.counts:
            return
        directory = f"{self._top_of['']}/{contract}"
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory)
        _enable(directory, self._unified.controllers)
        for name, value in bounds.counts:
            _write(f"{directory}/{name}", str(value))
        self._bounds[contract] = bounds.counts

    def _held_by(self, parts: Sequence[str]) -> str:
        # The contract's own directory is level 0 to the kernel.
        levels = dict(self._bounds.get(parts[0], ())).get("cgroup.max.depth", len(parts))
        return "max_depth" if len(parts) - 1 > levels else "max_replicas"

    def _make(self, path: str) -> None:
        for one, top in self._tops:
            try:
                _make_group(one, f"{top}/{path}")
            except FileNotFoundError:
                # The first of its contract; what is above a child is always there.
                *above, _ = PurePosixPath(path).parts
                for depth in range(len(above)):
                    _make_group(one, f"{top}/{'/'.join(above[: depth + 1])}")
                _make_group(one, f"{top}/{path}")
            with contextlib.suppress(FileExistsError):
                os.mkdir(f"{top}/{path}/{LEAF}")

    @contextlib.contextmanager
    def leaves(self, path: str) -> Iterator[list[int]]:
        """Open what a process enters the cgroups at *path* by: each ``tasks`` file, then the version 2 leaf.

        Raises:
            OSError: there are no such cgroups.
        """
        opened: list[int] = []
        try:
            for one, top in self._tops:
                if one.version == 1:
                    opened.append(os.open(f"{top}/{path}/{LEAF}/tasks", os.O_WRONLY | os.O_CLOEXEC))
            if self._unified is not None:
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
                opened.append(os.open(f"{self._top_of['']}/{path}/{LEAF}", flags))
            yield opened
        finally:
            for descriptor in opened:
                os.close(descriptor)

    def limits(self, path: str) -> dict[str, int | None]:
        """Return what the kernel holds the worker at *path* to, by controller; ``None`` for no limit.

        Raises:
            OSError: there are no such cgroups.
        """
        return {
            name: limit_in(_read(f"{self._top_of[name]}/{path}/{LEAF}/{LIMIT_FILES[name, version]}"))
            for name, version in self._versions.items()
            if (name, version) in LIMIT_FILES
        }

    def memory_reached(self, path: str) -> tuple[bool, bool]:
        """Return whether the worker at *path* ever reached its own memory limit, and its family the budget.

        Version 2 tells what could not be reclaimed (``oom``). Version 1 has no such
        count, and newer kernels keep no ``memory.failcnt`` either, so there the
        highest usage ever is compared with the limit.
        """
        one = self._of.get("memory")
        if one is None:
            return False, False

        def reached(directory: Path) -> bool:
            try:
                if one.version == 2:
                    return _fields(_read(directory / "memory.events.local"))["oom"] > 0
                limit = int(_read(directory / "memory.limit_in_bytes"))
                return int(_read(directory / "memory.max_usage_in_bytes")) > limit - CHARGED_AT_ONCE_BYTES
            except FileNotFoundError:
                return False

        family = "/".join(PurePosixPath(path).parts[: ROOT_PARTS - 1])
        return reached(self._leaf(path, "memory")), reached(self._directory(one, family))

    def usage(self, path: str) -> Usage:
        """Return what the worker at *path* uses, its descendants not counted."""

        def number(controller: str, v1: str, v2: str) -> int | None:
            one = self._of.get(controller)
            if one is None:
                return None
            try:
                name = v1 if one.version == 1 else v2
                return int(_read(f"{self._top_of[controller]}/{path}/{LEAF}/{name}"))
            except OSError:
                return None

        return Usage(
            memory_bytes=number("memory", "memory.usage_in_bytes", "memory.current"),
            memory_peak_bytes=number("memory", "memory.max_usage_in_bytes", "memory.peak"),
            cpu_seconds=self._cpu_seconds(path),
            pids=number("pids", "pids.current", "pids.current"),
        )

    def _cpu_seconds(self, path: str) -> float | None:
        if self._unified is None:
            return None
        try:
            # cpu.stat is there in every v2 cgroup, with or without the controller.
            stat = _fields(_read(f"{self._top_of['']}/{path}/{LEAF}/cpu.stat"))
        except OSError:
            return None
        return stat["usage_usec"] / 1_000_000

    def oom_kills(self, path: str) -> int:
        """Return how many processes of the worker the kernel killed for want of memory."""
        one = self._of.get("memory")
        if one is None:
            return 0
        name = "memory.oom_control" if one.version == 1 else "memory.events"
        try:
            return _fields(_read(f"{self._top_of['memory']}/{path}/{LEAF}/{name}")).get("oom_kill", 0)
        except FileNotFoundError:
            return 0

    def kill(self, path: str) -> bool:
        """Kill every process at and below *path* in one write.

        Returns:
            Whether the kernel could be asked; without a version 2 hierarchy the
            caller must kill by pidfd.
        """
        return self._order(path, "cgroup.kill", "1")

    def freeze(self, path: str) -> None:
        """Begin to freeze every process at and below *path*; see :meth:`frozen`.

        Raises:
            OSError: EOPNOTSUPP without a version 2 hierarchy.
        """
        if not self._order(path, "cgroup.freeze", "1"):
            raise OSError(errno.EOPNOTSUPP, "freezing needs a mounted cgroup2 hierarchy")

    def thaw(self, path: str) -> None:
        """Let every process at and below *path* go on where it stood."""
        self._order(path, "cgroup.freeze", "0")

    def frozen(self, path: str) -> bool:
        """Return whether every process at and below *path* is frozen."""
        return self._event(path, "frozen") == 1

    def populated(self, path: str) -> bool:
        """Return whether any process lives at or below *path*."""
        return self._event(path, "populated") == 1

    def events_fd(self, path: str) -> int:
        """Return a descriptor of the cgroup's events; POLLPRI on it means that one changed."""
        if self._unified is None:
            raise OSError(errno.EOPNOTSUPP, "events need a mounted cgroup2 hierarchy")
        return os.open(self._directory(self._unified, path) / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)

    def remove(self, path: str) -> None:
        """Remove the cgroups at and below *path*, which must hold no process.

        Raises:
            OSError: EBUSY when one still does.
        """
        self._bounds.pop(path, None)
        for one in self.hierarchies:
            _remove_tree(self._directory(one, path))

    def processes(self) -> Iterator[int]:
        """Yield the host pid of every process of this node's workers."""
        for one in self.hierarchies[:1]:
            for directory, _, _ in os.walk(self.roots[one.root]):
                yield from map(int, _read(Path(directory) / "cgroup.procs").split())

    def members(self, path: str) -> list[int]:
        """Return the host pids of the worker's own processes, its descendants' not among them.

        Raises:
            OSError: ENOENT when it has no cgroup any more.
        """
        for one in self.hierarchies[:1]:
            return list(map(int, _read(self._directory(one, path) / LEAF / "cgroup.procs").split()))
        return []

    def close(self) -> None:
        """Remove all of this node's cgroups, and the common parent when nobody needs it.

        Raises:
            OSError: EBUSY when a process still lives in one.
        """
        for one in self.hierarchies:
            _remove_own(one, self.roots[one.root])

    def _order(self, path: str, file: str, value: str) -> bool:
        if self._unified is None:
            return False
        # Where nobody is, all are killed, frozen and thawed.
        with contextlib.suppress(FileNotFoundError):
            _write(self._directory(self._unified, path) / file, value)
        return True

    def _event(self, path: str, name: str) -> int:
        if self._unified is None:
            raise OSError(errno.EOPNOTSUPP, "events need a mounted cgroup2 hierarchy")
        try:
            return _fields(_read(self._directory(self._unified, path) / "cgroup.events"))[name]
        except FileNotFoundError:
            return 0  # removed since, which only an empty one can be

    def _directory(self, one: Hierarchy, path: str) -> Path:
        return self.roots[one.root] / path

    def _leaf(self, path: str, controller: str | None = None) -> Path:
        one = self._unified if controller is None else self._of[controller]
        assert one is not None
        return self._directory(one, path) / LEAF


def _make_group(one: Hierarchy, directory: str) -> None:
    """Make a directory that has others below it, unless it is there."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory)
        if one.version == 2:
            _enable(directory, one.controllers)


def _make(directory: Path) -> None:
    """Make *directory* and its parent, which a node that ends just now may remove."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError:
            if attempt == ATTEMPTS:
                raise
        else:
            return


def _delegate(one: Hierarchy, node: Path) -> Hierarchy:
    """Hand the controllers of a version 2 hierarchy down to *node*'s children; return what came through."""
    # Handing them to the top is the host's business: systemd has done so on most
    # machines, and what is missing there the probe reports with its remedy. In a
    # cgroup that was handed to us it is ours.
    if delegation.is_handed(one.root):
        with contextlib.suppress(OSError):
            delegation.hand_down(one.root, one.controllers)
    through = one.controllers & set((node.parent / "cgroup.controllers").read_text().split())
    _enable(node.parent, through)
    _enable(node, through)
    return dataclasses.replace(one, controllers=through)


def _enable(directory: Path | str, controllers: frozenset[str]) -> None:
    if controllers:
        wanted = " ".join(f"+{name}" for name in sorted(controllers))
        _write(f"{directory}/cgroup.subtree_control", wanted)


def _write(path: Path | str, value: str) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        if os.path.basename(path) in ("memory.memsw.limit_in_bytes", "memory.swap.max"):
            return  # a kernel without swap accounting; probe reports it where swap is on
        raise
    try:
        os.write(descriptor, value.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)


def _read(path: Path | str) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, 65_536).decode()
    finally:
        os.close(descriptor)


def _fields(text: str) -> dict[str, int]:
    pairs = (line.split() for line in text.splitlines())
    return {name: int(value) for name, value in pairs}


def _remove_own(one: Hierarchy, node: Path) -> None:
    """Remove a node's cgroups, and what nodes have in common when this was the last."""
    _remove_tree(node)
    try:
        node.parent.rmdir()
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
            raise
        return
    if one.version == 2:
        delegation.take_back(one.root, node.parent, frozenset(CONTROLLERS))


def _remove_tree(directory: Path) -> None:
    """Remove a tree of cgroups, deepest first; its files go by themselves."""
    try:  # nobody is below most workers, and looking for them costs more than all the rest
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(f"{directory}/{LEAF}")
        os.rmdir(directory)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
            raise
    else:
        return
    for path, _, _ in os.walk(directory, topdown=False):
        try:
            os.rmdir(path)
        except FileNotFoundError:
            continue


__all__ = ["LEAF", "Bounds", "HeldByKernel", "Hierarchy", "Tree", "Usage", "hierarchies"]
