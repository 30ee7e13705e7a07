"""Why namespaces are refused, in each environment that refuses them, and what mends it there.

Pure: an outcome of :mod:`hayflick_sandbox.trial` and the facts go in, words come
out. The first rule that applies speaks, the particular before the general.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass

from hayflick_sandbox.environment import Facts
from hayflick_sandbox.layer import Layer

KINDS = ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup")
_CONFIG = ", ".join(f"CONFIG_{name}_NS" for name in ("USER", "PID", "NET", "IPC", "UTS"))
_APPARMOR = "kernel.apparmor_restrict_unprivileged_userns"
_CLONE = "kernel.unprivileged_userns_clone"

_UNCONFINED = {
    "docker": (
        "docker run --security-opt seccomp=unconfined --security-opt apparmor=unconfined "
        "--security-opt systempaths=unconfined"
    ),
    "podman": (
        "podman run --security-opt seccomp=unconfined --security-opt unmask=ALL --security-opt label=disable"
    ),
    "kubernetes": (
        "in the pod: hostUsers: false; in the container's securityContext: seccompProfile.type: Unconfined, "
        "appArmorProfile.type: Unconfined, procMount: Unmasked"
    ),
    "lxc": "lxc config set NAME security.nesting=true",
}
_CAPABLE = {
    "docker": "docker run --cap-add SYS_ADMIN",
    "podman": "podman run --cap-add SYS_ADMIN",
    "kubernetes": "securityContext.capabilities.add: [SYS_ADMIN]",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """How far a trial of namespaces came.

    Attributes:
        step: Which of the trial's steps failed, or "" for none.
        errno: What the kernel answered.
        said: What ``newuidmap`` or ``newgidmap`` said.
    """

    step: str = ""
    errno: int = 0
    said: str = ""

    @property
    def refused(self) -> bool:
        """Whether the kernel said that we may not, rather than that it cannot."""
        return self.errno in (errno.EPERM, errno.EACCES)


# What a rule says: what is more to be told, and what mends it.
Words = tuple[str, str]


def judge(outcome: Outcome, facts: Facts) -> Layer:
    """Return the layer "namespaces" for *outcome*, explained by *facts*."""
    if not outcome.step:
        return Layer("namespaces", True, "user, mount, pid, net, ipc, uts and cgroup")
    return Layer("namespaces", False, *explain(outcome, facts))


def explain(outcome: Outcome, facts: Facts) -> Words:
    """Return what failed, in which environment, and what mends it there."""
    answer = os.strerror(outcome.errno)
    what = {
        "privilege": f"root may not even make a mount namespace: {answer}",
        "unshare": f"new namespaces are refused: {answer}",
        "map": f"the user namespace cannot be mapped: {outcome.said or answer}",
        "groups": f"the user's groups cannot be left: {answer}",
        "mount": f"a user namespace is given, but nothing can be mounted in it: {answer}",
        "proc": f"a fresh /proc cannot be mounted: {answer}",
    }[outcome.step]
    for rule in _RULES:
        if (words := rule(outcome, facts)) is not None:
            more, remedy = words
            return f"{what}{more}", remedy
    return what, "run outside a chroot, on a kernel and under a security policy that allow user namespaces"


def _gvisor(_: Outcome, facts: Facts) -> Words | None:
    remedy = "run on the host's own kernel: --runtime=runc instead of runsc"
    return (" (gVisor)", remedy) if facts.gvisor else None


def _wsl(_: Outcome, facts: Facts) -> Words | None:
    remedy = "wsl --set-version DISTRIBUTION 2"
    return (" (WSL 1 has no Linux kernel)", remedy) if facts.wsl == 1 else None


def _used_up(outcome: Outcome, facts: Facts) -> Words | None:
    if outcome.errno == errno.EUSERS:
        return ": 32 user namespaces lie in one another already", "nest fewer containers"
    if outcome.errno != errno.ENOSPC or outcome.step not in ("privilege", "unshare"):
        return None
    names = [f"user.max_{kind}_namespaces" for kind in KINDS]
    zero = [name for name in names if facts.sysctl(name) == "0"]
    if zero:
        return f": {', '.join(zero)} is 0", "sysctl -w " + " ".join(f"{name}=15000" for name in zero)
    return ": the machine's limit is used up", "raise user.max_*_namespaces by sysctl, or end what uses them"


def _no_kernel_support(outcome: Outcome, _: Facts) -> Words | None:
    absent = outcome.errno in (errno.ENOSYS, errno.EINVAL) and outcome.step in ("privilege", "unshare")
    return ("", f"boot a kernel with {_CONFIG}") if absent else None


def _debian_switch(outcome: Outcome, facts: Facts) -> Words | None:
    if outcome.step == "unshare" and outcome.refused and not facts.root and facts.sysctl(_CLONE) == "0":
        return f": {_CLONE} is 0", f"sysctl -w {_CLONE}=1"
    return None


def _apparmor(outcome: Outcome, facts: Facts) -> Words | None:
    if not outcome.refused or facts.root or facts.container or facts.sysctl(_APPARMOR) != "1":
        return None
    profile = "load an AppArmor profile with the rule userns for this Python (docs/degradation.md has it)"
    why = ": AppArmor restricts unprivileged user namespaces (Ubuntu 23.10 and later)"
    return why, f"{profile}, or sysctl -w {_APPARMOR}=0"


def _capability(outcome: Outcome, facts: Facts) -> Words | None:
    if outcome.step != "privilege" or not outcome.refused:
        return None
    lacks = "" if facts.may_administer else ": it lacks CAP_SYS_ADMIN"
    if not facts.container:
        return lacks, "run with CAP_SYS_ADMIN, or as an ordinary user"
    return (
        f"{lacks} ({facts.container})",
        f"{_CAPABLE.get(facts.container, 'add SYS_ADMIN')}, and {_engine(facts)}",
    )


def _masked(outcome: Outcome, facts: Facts) -> Words | None:
    masks = facts.masked_proc
    if outcome.step != "proc" or not outcome.refused or not masks:
        return None
    shown = ", ".join(masks[:3]) + (", …" if len(masks) > 3 else "")
    remedy = _engine(facts) if facts.container else f"umount what lies over /proc: {shown}"
    return f": over the one that is here, {shown} are masked", remedy


def _confined(outcome: Outcome, facts: Facts) -> Words | None:
    if not outcome.refused or not facts.container:
        return None
    return f", in a container ({facts.container}) whose seccomp or AppArmor profile forbids it", _engine(
        facts
    )


def _programs(outcome: Outcome, _: Facts) -> Words | None:
    if outcome.step != "map" or not outcome.said:
        return None
    return (
        "",
        "newuidmap and newgidmap must be set-user-id root, on a mount without nosuid, not below no_new_privs",
    )


_RULES: tuple[Callable[[Outcome, Facts], Words | None], ...] = (
    *(_gvisor, _wsl, _used_up, _no_kernel_support, _debian_switch, _apparmor),
    *(_capability, _masked, _confined, _programs),
)


def _engine(facts: Facts) -> str:
    anyone = "start the container with nested user namespaces allowed and /proc unmasked"
    return _UNCONFINED.get(facts.container, anyone)
