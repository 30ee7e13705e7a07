"""What the cgroups of this machine enforce, and why one does not: memory, cpu, pids, kill."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hayflick_sandbox.cgroups import CONTROLLERS, Hierarchy, Tree
from hayflick_sandbox.environment import Facts
from hayflick_sandbox.layer import Layer

_SWAP_LIMITS = {1: "memory.memsw.limit_in_bytes", 2: "memory.swap.max"}
_WRITABLE = {
    "docker": "docker run --security-opt writable-cgroups=true (Docker 28), or --privileged",
    "podman": "podman run --cgroups=split --security-opt unmask=/sys/fs/cgroup",
    "kubernetes": "containerd's cgroup_writable, CRI-O's io.kubernetes.cri-o.cgroup2-mount-hierarchy-rw, "
    "or a privileged container",
}
_MOUNT = "mkdir -p {0} && mount -t cgroup{1} none {0}, or boot with systemd.unified_cgroup_hierarchy=1"


@dataclass(frozen=True, slots=True)
class Mounted:
    """One cgroup mount, as ``/proc/self/mountinfo`` has it."""

    point: str
    version: int
    controllers: frozenset[str]
    read_only: bool


def mounts(mountinfo: str) -> list[Mounted]:
    """Return the cgroup mounts of a mountinfo text, our controllers and version 2 alone."""
    found = []
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, (kind, _, options) = before.split(), after.split(maxsplit=2)
        names = frozenset(options.split(",")) & frozenset(CONTROLLERS)
        if kind == "cgroup2" or (kind == "cgroup" and names):
            read_only = "ro" in fields[5].split(",") or "ro" in options.split(",")
            found.append(Mounted(fields[4], 2 if kind == "cgroup2" else 1, names, read_only))
    return found


def layers(tree: Tree, facts: Facts) -> Iterator[Layer]:
    """Yield the layers that need cgroups, as this node's *tree* has them."""
    swap_limited = {
        one.root for one in tree.hierarchies if (tree.roots[one.root] / _SWAP_LIMITS[one.version]).exists()
    }
    where = {name: one for one in tree.hierarchies for name in one.controllers}
    swap_is_on = len(facts.text("/proc/swaps").splitlines()) > 1
    for name in CONTROLLERS:
        one = where.get(name)
        if one is None:
            yield Layer(name, False, *missing(name, tree.hierarchies, facts))
        elif name == "memory" and swap_is_on and one.root not in swap_limited:
            yield Layer(
                name,
                False,
                f"cgroup v{one.version} at {one.root} cannot limit swap, and swap is on",
                "swapoff -a, or boot with swapaccount=1",
            )
        else:
            yield Layer(name, True, f"cgroup v{one.version} at {one.root}")
    unified = next((one for one in tree.hierarchies if one.version == 2), None)
    if unified is not None:
        yield Layer("kill", True, f"cgroup.kill, cgroup.freeze and cgroup.max.* at {unified.root}")
    else:
        detail, remedy = missing("kill", tree.hierarchies, facts)
        lacks = "a family can be neither frozen nor killed in one write, and the kernel cannot count workers"
        yield Layer("kill", False, f"{detail}: {lacks}", remedy)


def io_layer(tree: Tree) -> Layer:
    """Return the layer "io", which is told of and never insisted on.

    Nothing that a worker can write lies on a disk; what it reads there is what it is
    shown read-only.
    """
    if tree.enforces("io"):
        return Layer("io", True, f"each worker's reads from {', '.join(tree.disks)} are limited")
    return Layer(
        "io",
        False,
        "workers' reads from disk are not limited: there is no io controller here, or no disk it could name",
        "where files lie on a block device: echo +io > /sys/fs/cgroup/cgroup.subtree_control; "
        "workers run without it",
    )


def missing(name: str, used: list[Hierarchy], facts: Facts) -> tuple[str, str]:
    """Return why *name*, a controller or "kill", is not to be had, and what mends it here."""
    mounted = mounts(facts.text("/proc/self/mountinfo"))
    words = _by_kernel(name, mounted, facts) or _not_there(name, mounted, facts)
    if words is not None:
        return words
    legacy = next((one for one in mounted if one.version == 1 and name in one.controllers), None)
    holder = legacy or next(one for one in mounted if one.version == 2)
    if holder.read_only:
        remedy = _WRITABLE.get(facts.container, f"mount -o remount,rw {holder.point}")
        return f"{holder.point} is mounted read-only", remedy
    mine = next((one for one in used if one.version == 2), None)
    if holder.version == 2 and mine is not None:
        return _not_handed_down(name, mine, facts)
    return _not_delegated(holder, facts)


def _by_kernel(name: str, mounted: list[Mounted], facts: Facts) -> tuple[str, str] | None:
    """Explain a controller that no version 2 hierarchy can have, by ``/proc/cgroups``."""
    rows = [line.split() for line in facts.text("/proc/cgroups").splitlines()]
    # name, version 1 hierarchy or 0, number of cgroups, enabled; cgroups(7)
    row = next((row for row in rows if len(row) == 4 and row[0] == name), None)
    if row is None or name == "kill" or any(name in one.controllers for one in mounted):
        return None
    if row[3] == "0":
        remedy = f"boot with cgroup_enable={name}, and without cgroup_disable={name}"
        return f"the kernel has the {name} controller switched off", remedy
    if row[1] != "0" and mounted:
        remedy = _MOUNT.format(f"/sys/fs/cgroup/{name}", f" -o {name}")
        return f"cgroup version 1 holds the {name} controller, and is not mounted here", remedy
    return None


def _not_there(name: str, mounted: list[Mounted], facts: Facts) -> tuple[str, str] | None:
    """Explain a machine where no mounted hierarchy has *name*; ``None`` when one has."""
    if any(one.version == 2 or name in one.controllers for one in mounted):
        return None
    if facts.wsl == 2:
        remedy = "systemd=true below [boot] in /etc/wsl.conf, then wsl --shutdown"
        return "WSL mounts no such cgroup hierarchy", remedy
    if not mounted:
        remedy = _WRITABLE.get(facts.container, "mount -t cgroup2 none /sys/fs/cgroup")
        return "no cgroup hierarchy is mounted", remedy
    if name == "kill":
        return "only cgroup version 1 is mounted", _MOUNT.format("/sys/fs/cgroup/unified", "2")
    remedy = _MOUNT.format(f"/sys/fs/cgroup/{name}", f" -o {name}")
    return f"no mounted hierarchy has the {name} controller", remedy


def _not_handed_down(name: str, mine: Hierarchy, facts: Facts) -> tuple[str, str]:
    """Explain a version 2 cgroup that is ours to write and has not this controller."""
    if facts.root and not facts.container:
        return f"{name} is not handed down at {mine.root}", (
            f"echo +{name} > {mine.root}/cgroup.subtree_control"
        )
    if facts.container:
        return f"the container's own cgroup has no {name} controller", (
            "have the engine's cgroup manager hand it down (systemd: Delegate=cpu memory pids)"
        )
    return f"systemd hands this user no {name} controller, at {mine.root}", (
        "in /etc/systemd/system/user@.service.d/delegate.conf: [Service] Delegate=cpu memory pids; "
        "systemctl daemon-reload, and log in again"
    )


def _not_delegated(holder: Mounted, facts: Facts) -> tuple[str, str]:
    """Explain a hierarchy that is there and not ours to write."""
    if facts.container:
        return f"the container may not write to {holder.point}", _WRITABLE.get(
            facts.container, "let the container write to its own cgroup"
        )
    if holder.version == 2 and facts.systemd and not facts.root:
        return f"this user's own cgroup at {holder.point} is not delegated to it", (
            "systemd-run --user --scope -p Delegate=yes COMMAND, or Delegate=yes in the service's unit"
        )
    user = facts.status("Uid").split()[:1]
    owner = user[0] if user else "USER"
    return f"cgroup v{holder.version} at {holder.point} is not delegated to uid {owner}", (
        f"as root: D={holder.point}/hayflick-{owner}; mkdir $D; chown -R {owner} $D; "
        "echo PID > $D/cgroup.procs, with the PID of the shell that starts the services"
        if not facts.root
        else f"let root write to {holder.point}: it lacks CAP_DAC_OVERRIDE, or a security policy forbids it"
    )
