"""What this machine can enforce, found out by trying, and what to do about the rest.

A layer that is missing is refused, unless the operator let it go by name; three
of them cannot be let go, because without them there is no sandbox.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hayflick_sandbox import landlock, syscalls
from hayflick_sandbox.cgroups import CONTROLLERS, Tree
from hayflick_sandbox.identities import BLOCK_UIDS, BLOCKS, FIRST_UID

# cgroup.kill came last of what we need (5.14).
MINIMUM_KERNEL = (5, 14)
INDISPENSABLE = frozenset({"kernel", "namespaces", "seccomp"})

_NAMESPACE_REMEDIES = {
    "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": (
        "1",
        "sysctl kernel.apparmor_restrict_unprivileged_userns=0, or an AppArmor profile with userns",
    ),
    "/proc/sys/kernel/unprivileged_userns_clone": ("0", "sysctl kernel.unprivileged_userns_clone=1"),
    "/proc/sys/user/max_user_namespaces": ("0", "sysctl user.max_user_namespaces=15000"),
}


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of the sandbox on this machine.

    Attributes:
        name: As an operator names it to let it go.
        enforced: Whether it holds here.
        detail: What was found.
        remedy: What mends it; empty when it is enforced.
    """

    name: str
    enforced: bool
    detail: str
    remedy: str = ""


class LimitNotEnforceable(Exception):
    """This machine lacks a layer, and nobody let it go by name."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(f"{layer.name}: {layer.detail}; {layer.remedy}")
        self.layer = layer


def probe(tree: Tree) -> tuple[Layer, ...]:
    """Return every layer as it is on this machine.

    Call it from a single-threaded process: it forks to try namespaces.

    Args:
        tree: This node's cgroups, which show what controllers it really has.
    """
    return (
        _kernel(),
        _namespaces(),
        _identities(),
        *_cgroups(tree),
        _seccomp(),
        _landlock(),
    )


def require(layers: Iterable[Layer], allow_degraded: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the layers that are missing and were let go.

    Raises:
        LimitNotEnforceable: a missing layer was not let go, or cannot be.
        ValueError: *allow_degraded* names no layer, or one without which there is no sandbox.
    """
    layers = tuple(layers)
    allowed = frozenset(allow_degraded)
    known = {layer.name for layer in layers}
    for name in sorted(allowed):
        if name not in known:
            raise ValueError(
                f"allow_degraded: there is no layer {name!r}; there are {', '.join(sorted(known))}"
            )
        if name in INDISPENSABLE:
            raise ValueError(f"allow_degraded: there is no sandbox without {name!r}")
    missing = [layer for layer in layers if not layer.enforced]
    for layer in missing:
        if layer.name not in allowed:
            raise LimitNotEnforceable(layer)
    return tuple(layer.name for layer in missing)


def _kernel() -> Layer:
    release = platform.release()
    found = re.match(r"(\d+)\.(\d+)", release)
    numbers = (int(found[1]), int(found[2])) if found else (0, 0)
    wanted = ".".join(map(str, MINIMUM_KERNEL))
    return Layer(
        "kernel",
        numbers >= MINIMUM_KERNEL,
        f"Linux {release} on {platform.machine()}",
        "" if numbers >= MINIMUM_KERNEL else f"boot Linux {wanted} or later",
    )


def _namespaces() -> Layer:
    """Try, in a child that ends at once, to enter every kind of namespace that we use."""
    flags = (
        syscalls.CLONE_NEWUSER
        | syscalls.CLONE_NEWNS
        | syscalls.CLONE_NEWPID
        | syscalls.CLONE_NEWNET
        | syscalls.CLONE_NEWIPC
        | syscalls.CLONE_NEWUTS
        | syscalls.CLONE_NEWCGROUP
    )
    pid = os.fork()
    if pid == 0:
        status = 255
        try:
            syscalls.unshare(flags)
            status = 0
        except OSError as error:
            status = error.errno or 255
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return Layer("namespaces", True, "user, mount, pid, net, ipc, uts and cgroup")
    remedy = "run as root, or on a kernel or container that allows user namespaces"
    for path, (bad, mend) in _NAMESPACE_REMEDIES.items():
        if _text(path) == bad:
            remedy = mend
    return Layer("namespaces", False, f"unshare: {os.strerror(code)}", remedy)


def _identities() -> Layer:
    if os.geteuid() == 0:
        if all(_maps(f"/proc/self/{kind}_map") for kind in ("uid", "gid")):
            return Layer("uid-range", True, "every worker has a host uid of its own")
        return Layer(
            "uid-range",
            False,
            f"this root's user namespace lacks the uids from {FIRST_UID} on",
            f"run in the initial user namespace, or map {BLOCKS * BLOCK_UIDS} uids and gids from {FIRST_UID}",
        )
    return Layer(
        "uid-range",
        False,
        f"an ordinary user can map only itself (uid {os.geteuid()}), so workers share it on the host",
        "run the orchestrator as root, or allow_degraded uid-range",
    )


def _maps(path: str) -> bool:
    """Return whether the id map at *path* holds every id that workers may get (user_namespaces(7))."""
    last = FIRST_UID + BLOCKS * BLOCK_UIDS
    return any(
        first <= FIRST_UID and last <= first + count
        for first, _, count in (map(int, line.split()) for line in _text(path).splitlines())
    )


def _cgroups(tree: Tree) -> Iterable[Layer]:
    where = {name: one for one in tree.hierarchies for name in one.controllers}
    for name in CONTROLLERS:
        one = where.get(name)
        if one is not None and name == "memory" and _swaps_freely(tree.roots[one.root], one.version):
            yield Layer(
                name,
                False,
                f"cgroup v{one.version} at {one.root} cannot limit swap, and swap is on",
                "swapoff -a, or boot with swapaccount=1, or allow_degraded memory",
            )
        elif one is not None:
            yield Layer(name, True, f"cgroup v{one.version} at {one.root}")
        else:
            yield Layer(name, False, "no writable cgroup hierarchy has this controller", _cgroup_remedy(name))
    unified = next((one for one in tree.hierarchies if one.version == 2), None)
    if unified is not None:
        yield Layer("kill", True, f"cgroup.kill and cgroup.freeze at {unified.root}")
    else:
        yield Layer(
            "kill",
            False,
            "no writable cgroup2 hierarchy: a subtree can be neither frozen nor killed in one write",
            _cgroup_remedy("kill"),
        )


def _swaps_freely(node: Path, version: int) -> bool:
    """Return whether a worker could leave its memory limit behind by being swapped out."""
    limit = "memory.memsw.limit_in_bytes" if version == 1 else "memory.swap.max"
    swaps = _text("/proc/swaps").splitlines()[1:]
    return bool(swaps) and not (node / limit).exists()


def _cgroup_remedy(name: str) -> str:
    if os.geteuid() == 0:
        mend = (
            "mount cgroup2 at /sys/fs/cgroup"
            if name == "kill"
            else f"echo +{name} > /sys/fs/cgroup/cgroup.subtree_control"
        )
        return f"{mend}, or allow_degraded {name}"
    return f"run as root, or allow_degraded {name}"


def _seccomp() -> Layer:
    actions = _text("/proc/sys/kernel/seccomp/actions_avail").split()
    if {"errno", "kill_process"} <= set(actions):
        return Layer("seccomp", True, "filters with errno and kill_process")
    return Layer(
        "seccomp", False, "the kernel has no seccomp filters", "boot a kernel with CONFIG_SECCOMP_FILTER"
    )


def _landlock() -> Layer:
    version = landlock.abi()
    if version:
        return Layer("landlock", True, f"ABI {version}")
    return Layer(
        "landlock",
        False,
        "the kernel has no Landlock, or it is off",
        "boot with lsm=landlock,… on a kernel with CONFIG_SECURITY_LANDLOCK, or allow_degraded landlock",
    )


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return ""
