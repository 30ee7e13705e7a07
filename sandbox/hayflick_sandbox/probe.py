"""What this machine can enforce, found out by trying, and what to do about the rest.

A layer that is missing is refused, unless the operator let it go by name; some
of them cannot be let go, because without them there is no sandbox, and one that
most machines cannot have to the full is told and costs the grade alone.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable

from hayflick_sandbox import (
    controllers,
    idmaps,
    landlock,
    notifications,
    refusals,
    subordinate,
    syscalls,
    template,
    trial,
)
from hayflick_sandbox.cgroups import Tree
from hayflick_sandbox.environment import Facts
from hayflick_sandbox.identities import BLOCK_UIDS, BLOCKS, FIRST_UID
from hayflick_sandbox.layer import Layer, LimitNotEnforceable

# cgroup.kill came last of what we need (5.14).
MINIMUM_KERNEL = (5, 14)
INDISPENSABLE = frozenset({"kernel", "namespaces", "seccomp", "launch"})

# It doubles what the mounts hide; where it cannot be had, that stands alone and the grade says so.
GRADED = frozenset({"idmapped-mounts"})


def probe(tree: Tree, facts: Facts | None = None) -> tuple[Layer, ...]:
    """Return every layer as it is on this machine.

    Call it from a single-threaded process: it forks to try namespaces. Whether
    all of them together make a sandbox, only a launch tells:
    :func:`hayflick_sandbox.session.try_launch`.

    Args:
        tree: This node's cgroups, which show what controllers it really has.
        facts: What surrounds us; read now when not given.
    """
    facts = facts or Facts.read()
    grant = None if facts.root else subordinate.judge(subordinate.find())
    outcome = trial.attempt(grant if isinstance(grant, subordinate.Grant) else None)
    identities = judge_identities(facts, grant, outcome)
    if isinstance(grant, subordinate.Grant) and outcome.step in ("map", "groups"):
        # The subordinate ids cannot be mapped: a layer less, but maybe not a machine without sandboxes.
        outcome = trial.attempt(None)
    return (
        judge_kernel(facts),
        refusals.judge(outcome, facts),
        identities,
        *controllers.layers(tree, facts),
        judge_seccomp(facts),
        judge_tripwire(notifications.try_listener()),
        judge_landlock(*_landlock_abi(), facts),
        judge_idmaps(*idmaps.try_each(template.readable_paths().shown), facts),
    )


def require(layers: Iterable[Layer], allow_degraded: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the layers that are missing and were let go, or cost the grade alone.

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
        if layer.name not in allowed | GRADED:
            raise LimitNotEnforceable(layer)
    return tuple(layer.name for layer in missing)


def judge_kernel(facts: Facts) -> Layer:
    """Return the layer "kernel"."""
    found = re.match(r"(\d+)\.(\d+)", facts.release)
    numbers = (int(found[1]), int(found[2])) if found else (0, 0)
    enough = numbers >= MINIMUM_KERNEL
    wanted = ".".join(map(str, MINIMUM_KERNEL))
    if facts.gvisor:
        remedy = "run on the host's own kernel, not gVisor's: --runtime=runc instead of runsc"
        return Layer("kernel", False, f"gVisor, which calls itself Linux {facts.release}", remedy)
    if facts.wsl == 1:
        remedy = "wsl --set-version DISTRIBUTION 2"
        return Layer("kernel", False, f"WSL 1, which calls itself Linux {facts.release}", remedy)
    if not enough and facts.wsl == 2:
        return Layer("kernel", False, f"Linux {facts.release}", f"wsl --update, to Linux {wanted} or later")
    detail = f"Linux {facts.release}"
    return Layer("kernel", enough, detail, "" if enough else f"boot Linux {wanted} or later")


def judge_identities(
    facts: Facts, grant: subordinate.Grant | subordinate.Refusal | None, outcome: refusals.Outcome
) -> Layer:
    """Return the layer "uid-range".

    Args:
        facts: What surrounds us.
        grant: What an ordinary user may hand out; ``None`` for root.
        outcome: How the trial with that grant went.
    """
    if facts.root:
        if all(_mapped(facts.text(f"/proc/self/{kind}_map")) for kind in ("uid", "gid")):
            return Layer("uid-range", True, "every worker has a host uid of its own")
        return Layer(
            "uid-range",
            False,
            f"this root's user namespace lacks the uids from {FIRST_UID} on",
            f"run in the initial user namespace, or map {BLOCKS * BLOCK_UIDS} uids and gids from {FIRST_UID}",
        )
    if isinstance(grant, subordinate.Grant):
        if outcome.step not in ("map", "groups"):
            first, count = grant.uids.first, grant.count
            detail = f"every worker has a host uid of its own, of {count} subordinate ones from {first} on"
            return Layer("uid-range", True, detail)
        detail, remedy = refusals.explain(outcome, facts)
        return Layer("uid-range", False, f"subordinate ids are granted, but {detail}", remedy)
    assert grant is not None
    return Layer("uid-range", False, grant.detail, grant.remedy)


def judge_seccomp(facts: Facts) -> Layer:
    """Return the layer "seccomp"."""
    actions = facts.text("/proc/sys/kernel/seccomp/actions_avail").split()
    if {"errno", "kill_process"} <= set(actions):
        return Layer("seccomp", True, "filters with errno and kill_process")
    return Layer(
        "seccomp", False, "the kernel has no seccomp filters", "boot a kernel with CONFIG_SECCOMP_FILTER"
    )


def judge_tripwire(number: int) -> Layer:
    """Return the layer "tripwire".

    Args:
        number: The errno for which there is no listener, or 0.
    """
    if number == 0:
        return Layer("tripwire", True, "refused calls are seen by a seccomp listener")
    if number == errno.EBUSY:
        detail = "a container runtime's listener is over this process, and there can be but one"
        remedy = "run without a seccomp profile that notifies"
    elif number == errno.EPERM:
        detail = "a seccomp listener is refused, by a container's profile for one"
        remedy = "update the container engine, or its seccomp profile"
    else:
        detail = f"the kernel gives no seccomp listener: {os.strerror(number)}"
        remedy = "boot Linux 5.5 or later with CONFIG_SECCOMP_FILTER"
    return Layer("tripwire", False, detail, remedy)


def judge_landlock(version: int, number: int, facts: Facts) -> Layer:
    """Return the layer "landlock".

    It is on wherever the kernel has it, with all that its ABI can do; what an
    older ABI cannot is said.

    Args:
        version: The kernel's ABI, or 0.
        number: The errno for which there is none.
        facts: What surrounds us.
    """
    if version:
        lacks = [f"{what} (ABI {since})" for since, what in landlock.FEATURES.items() if since > version]
        partial = (
            f"; partial, without {', '.join(lacks)}: mounts and seccomp stand alone there" if lacks else ""
        )
        return Layer("landlock", True, f"ABI {version}{partial}")
    if number == errno.EOPNOTSUPP:
        detail, remedy = (
            "the kernel has Landlock, and it is off",
            "boot with lsm=landlock,… before the others",
        )
    elif number in (errno.EPERM, errno.EACCES):
        by = "the container's seccomp profile" if facts.container else "a seccomp filter"
        detail = f"Landlock's system calls are refused by {by}"
        remedy = "update the container engine, or its seccomp profile"
    else:
        detail = "the kernel has no Landlock"
        remedy = "boot Linux 5.13 or later with CONFIG_SECURITY_LANDLOCK, and lsm=landlock,…"
    return Layer("landlock", False, detail, remedy)


def judge_idmaps(path: str, number: int, facts: Facts) -> Layer:
    """Return the layer "idmapped-mounts".

    Args:
        path: The first that workers shall see and that cannot be mounted so; "" for none or for all.
        number: The errno, or 0.
        facts: What surrounds us.
    """
    if number == 0:
        return Layer("idmapped-mounts", True, "nobody owns what workers see, so no socket there answers them")
    without = "only its name keeps a socket of the host below what workers see from them"
    if not facts.root or number == errno.EPERM:
        why = "mounts that map no owner take root in the initial user namespace"
        return Layer("idmapped-mounts", False, f"{why}; {without}", "run as root, outside a user namespace")
    if number == errno.EINVAL and path:
        why = f"the file system of {path} cannot be mounted with a map of owners"
        remedy = f"put {path} on ext4, xfs or btrfs; or a newer kernel, which can map more of them"
        return Layer("idmapped-mounts", False, f"{why}; {without}", remedy)
    why = f"mounts that map no owner are refused{f' at {path}' if path else ''}: {os.strerror(number)}"
    return Layer("idmapped-mounts", False, f"{why}; {without}", "boot a kernel with CONFIG_USER_NS")


def _landlock_abi() -> tuple[int, int]:
    try:
        return syscalls.landlock_abi(), 0
    except OSError as error:
        return 0, error.errno or errno.ENOSYS


def _mapped(text: str) -> bool:
    """Return whether an id map holds every id that workers may get (user_namespaces(7))."""
    last = FIRST_UID + BLOCKS * BLOCK_UIDS
    return any(
        first <= FIRST_UID and last <= first + count
        for first, _, count in (map(int, line.split()) for line in text.splitlines())
    )


__all__ = ["GRADED", "INDISPENSABLE", "Layer", "LimitNotEnforceable", "probe", "require"]
