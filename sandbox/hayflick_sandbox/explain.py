"""The confinement, read aloud."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hayflick_sandbox import seccomp, steps
from hayflick_sandbox.identities import FIRST_UID
from hayflick_sandbox.policy import Policy
from hayflick_sandbox.probe import Layer
from hayflick_sandbox.template import readable_paths

_BIRTH = (
    "fork from a single-threaded zygote into new user, mount, pid, ipc and uts namespaces, "
    "born in the worker's own cgroup (clone3) and in an unused network namespace that "
    "the worker has no power over, with loopback {loopback}"
)


def confinement(policy: Policy, degraded: frozenset[str]) -> Iterator[str]:
    """Yield each step of the confinement of *policy* on this machine, in order."""
    host = steps.Host(
        template=readable_paths(),
        last_capability=int(Path("/proc/sys/kernel/cap_last_cap").read_text(encoding="ascii")),
        degraded=degraded,
        filters=seccomp.compile_filters(inet=False),
        inet_filters=seccomp.compile_filters(inet=True),
    )
    yield _BIRTH.format(loopback="up" if policy.loopback else "down")
    for step in steps.plan(policy, host, host_uid=FIRST_UID):
        yield step.describe()


def system_calls() -> Iterator[str]:
    """Yield the system call policy, a group a paragraph."""
    policy = seccomp.document()
    for group in seccomp.groups(policy):
        yield f"allow {group.name}: {group.reason}\n    {' '.join(group.calls)}"
    yield "allow socket: AF_UNIX; AF_INET and AF_INET6 where the policy gives loopback; else EAFNOSUPPORT"
    for name, values in policy["allow_values"].items():
        yield f"allow {name}: with {', '.join(hex(value) for value in values)} alone"
    for name, calls in policy["refuse"].items():
        yield f"refuse {name}: EPERM\n    {' '.join(calls)}"
    yield "refuse by argument: EPERM\n" + "\n".join(
        f"    {line}"
        for line in (
            "clone with any namespace flag; clone3 answers ENOSYS, its flags lie behind a pointer",
            "ioctl TIOCSTI, TIOCLINUX, TIOCCONS, whatever the upper 32 bits say",
            "prctl PR_SET_SECUREBITS, PR_SET_MM; seccomp with NEW_LISTENER",
            "prlimit64 on another process, or of RLIMIT_CORE",
        )
    )
    yield "everything else: ENOSYS; foreign architectures and x32 numbers: the process dies"


def table(layers: tuple[Layer, ...]) -> Iterator[str]:
    """Yield one line for each layer of this machine."""
    width = max(len(layer.name) for layer in layers)
    for layer in layers:
        mark = "enforced" if layer.enforced else "MISSING "
        remedy = f"  →  {layer.remedy}" if layer.remedy else ""
        yield f"{layer.name:<{width}}  {mark}  {layer.detail}{remedy}"
