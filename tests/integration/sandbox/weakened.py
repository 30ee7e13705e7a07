"""A zygote whose sandboxes lack one thing each, chosen by how large a file they may write. For tests alone.

It is run in place of ``python -I -m hayflick_sandbox.zygote`` by :data:`COMMAND`; nothing in
the product can do this. No user code runs in such a sandbox.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import prctl

from hayflick_sandbox import process, steps, syscalls, zygote
from hayflick_sandbox.policy import Limits, Policy
from hayflick_sandbox.template import NEW_ROOT

MS_SHARED = 1 << 20
PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE = 47, 2

CAPABILITY_SETS = ("inheritable", "permitted", "effective", "bounding", "ambient")

Plan = list[steps.Step]
Weaken = Callable[[Plan], Plan]


class Do:
    """A step made of a function."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.action = action

    def describe(self) -> str:
        """Say it."""
        return "weaken"

    def apply(self) -> None:
        """Do it."""
        self.action()


def _name(step: steps.Step) -> str:
    return type(step).__name__


def without(*names: str) -> Weaken:
    """Leave steps out."""
    return lambda plan: [step for step in plan if _name(step) not in names]


def instead(name: str, action: Callable[[], object]) -> Weaken:
    """Do something else in place of a step."""
    return lambda plan: [Do(action) if _name(step) == name else step for step in plan]


def before(name: str, action: Callable[[], object]) -> Weaken:
    """Do something more just before a step."""
    return lambda plan: [
        part for step in plan for part in ([Do(action), step] if _name(step) == name else [step])
    ]


def last(action: Callable[[], object]) -> Weaken:
    """Do something more before the system calls are filtered."""
    return before("FilterSystemCalls", action)


def _cover(path: str, more: int = 0) -> Callable[[], None]:
    flags = syscalls.MS_NOSUID | syscalls.MS_NODEV | more
    return lambda: syscalls.mount("cover", NEW_ROOT + path, "tmpfs", flags, "mode=755")


def _bare_dev(plan: Plan) -> Plan:
    found = []
    for step in plan:
        found.append(step)
        if isinstance(step, steps.ShowReadOnly) and step.path == "/dev":
            found.append(Do(_cover("/dev")))
    return found


def _writable_root() -> None:
    os.chdir(NEW_ROOT)
    syscalls.pivot_root(".", ".")
    syscalls.umount2(".", syscalls.MNT_DETACH)
    os.chdir("/workspace")


def _whole_proc() -> None:
    flags = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
    syscalls.mount("proc", f"{NEW_ROOT}/proc", "proc", flags)


def _keep_capabilities() -> None:
    import ctypes

    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    full = (1 << 32) - 1
    # effective, permitted, inheritable: the lower half, then the upper, where 41 are known.
    sets = (ctypes.c_uint32 * 6)(full, full, full, 0x1FF, 0x1FF, 0x1FF)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())
    assert libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, 0, 0, 0) == 0


def _keep_a_group(plan: Plan) -> Plan:
    identity = next(step for step in plan if isinstance(step, process.TakeIdentity))

    def become() -> None:
        assert os.read(identity.sync_fd, 1) == b"1"
        os.setresgid(1_000, 1_000, -1)  # the saved one stays that of the zygote
        os.setresuid(1_000, 1_000, 1_000)

    return instead("TakeIdentity", become)(plan)


def _unheard(plan: Plan) -> Plan:
    return [
        dataclasses.replace(step, listener=False) if isinstance(step, steps.FilterSystemCalls) else step
        for step in plan
    ]


def _no_new_privileges_only() -> None:
    prctl.set_no_new_privs(1)
    prctl.set_dumpable(1)


# By name: what is done, and which checks must then say so, and no other.
WEAKENINGS: dict[str, tuple[Weaken, frozenset[str]]] = {
    name: (weaken, frozenset(failed.split()))
    for name, weaken, failed in (
        ("whole", lambda plan: plan, ""),
        ("no-landlock", without("ApplyLandlock"), "landlock-files landlock-scopes"),
        (
            *("no-seccomp", without("FilterSystemCalls")),
            "seccomp-mode seccomp-filters clone3 unlisted-call refused-call socket-families listener",
        ),
        (
            *("capabilities", instead("DropCapabilities", _keep_capabilities)),
            " ".join(f"capabilities-{one}" for one in CAPABILITY_SETS),
        ),
        (
            *("new-privileges", without("DieWithParent", "DropCapabilities")),
            "no-new-privileges capabilities-permitted capabilities-effective capabilities-bounding",
        ),
        (
            "dumpable",
            instead("DieWithParent", _no_new_privileges_only),
            "not-dumpable init-environment init-memory",
        ),
        ("no-rlimits", without("LimitResources"), "rlimits no-core"),
        (
            "watches",
            instead("ForbidUserNamespaces", lambda: Path(f"{NEW_ROOT}/proc").mkdir(0o555)),
            "no-watches",
        ),
        ("same-session", without("LeaveSession"), "session umask"),
        ("cgroups-shown", without("HideCgroups"), "namespace-cgroup cgroups-hidden"),
        ("no-listener", _unheard, "listener"),
        ("no-cgroups", without("JoinCgroups"), ""),
        ("unnamed", without("NameHost"), "hostname"),
        ("one-uts", without("NameHost"), "hostname namespace-uts"),
        ("one-ipc", lambda plan: plan, "namespace-ipc"),
        ("one-net", lambda plan: plan, "namespace-net"),
        ("writable-root", instead("EnterRoot", _writable_root), "read-only/ mounts-read-only"),
        ("writable-etc", before("EnterRoot", _cover("/etc")), "read-only/etc mounts-read-only"),
        (
            *("writable-usr", before("EnterRoot", _cover("/usr"))),
            "read-only/usr mounts-read-only mounts-idmapped",
        ),
        ("owned", before("EnterRoot", _cover("/usr/share", syscalls.MS_RDONLY)), "mounts-idmapped"),
        ("bare-dev", _bare_dev, "devices read-only/dev mounts-read-only"),
        (
            *(
                "setuid-root",
                instead("FreshRoot", lambda: syscalls.mount("root", NEW_ROOT, "tmpfs", 0, "mode=755")),
            ),
            "mounts-nosuid",
        ),
        (
            "shared",
            before("NameHost", lambda: syscalls.mount("none", "/", None, MS_SHARED)),
            "mounts-private",
        ),
        ("whole-proc", instead("FreshProc", _whole_proc), "no-proc-sys own-processes"),
        ("sysfs", before("EnterRoot", lambda: Path(f"{NEW_ROOT}/sys").mkdir()), "no-sys"),
        ("template", before("EnterRoot", lambda: Path(f"{NEW_ROOT}/.hayflick").mkdir()), "no-template"),
        ("descriptor", last(lambda: os.dup2(0, 9)), "descriptors"),
        (
            "stdio",
            last(lambda: os.dup2(os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC), 1)),
            "stdio descriptors",
        ),
        ("environment", last(lambda: os.environ.update(SECRET_TOKEN="canary")), "environment"),
        ("saved-group", _keep_a_group, "identity"),
        ("two-uids", lambda plan: plan, "uid-map"),
        ("two-gids", lambda plan: plan, "gid-map"),
        ("setgroups", lambda plan: plan, "setgroups"),
        ("groups", lambda plan: plan, "groups"),
    )
}
_WITHOUT_NAMESPACE = {"one-uts": syscalls.CLONE_NEWUTS, "one-ipc": syscalls.CLONE_NEWIPC}


COMMAND = (sys.executable, "-I", __file__)
"""What to run in place of :data:`hayflick_sandbox.zygote_client.COMMAND`."""


def policy(name: str) -> Policy:
    """Return the policy of a sandbox that is to lack what *name* says."""
    return Policy(Limits(file_size_bytes=list(WEAKENINGS).index(name)))


def main() -> None:
    """Serve as the zygote does, but for what the policy of a sandbox asks for; see :func:`policy`."""
    real_plan, real_write, namespaces = steps.plan, zygote._write, zygote.NAMESPACES
    real_enter = zygote.Networks.enter_fresh
    host_net = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    wanted = ""

    def plan(asked: Policy, host: steps.Host, **options: Any) -> Sequence[steps.Step]:
        nonlocal wanted
        wanted = list(WEAKENINGS)[asked.limits.file_size_bytes]
        zygote.NAMESPACES = namespaces & ~_WITHOUT_NAMESPACE.get(wanted, 0)
        os.setgroups([12_345] if wanted == "groups" else [])
        return WEAKENINGS[wanted][0](real_plan(asked, host, **options))

    def write(path: str, text: str) -> None:
        if wanted == "setgroups" and path.endswith("/setgroups"):
            return
        for name, kind in (("two-uids", "uid_map"), ("two-gids", "gid_map")):
            if wanted == name and path.endswith(kind):
                text = text.removesuffix("1") + "2"
        real_write(path, text)

    def enter(networks: zygote.Networks, **options: Any) -> None:
        real_enter(networks, **options)
        if wanted == "one-net":
            syscalls.setns(host_net, syscalls.CLONE_NEWNET)

    steps.plan = plan  # type: ignore[assignment]
    zygote._write = write
    zygote.Networks.enter_fresh = enter  # type: ignore[method-assign]
    zygote.main()


if __name__ == "__main__":
    main()
