"""A zygote that takes walls away when a test asks: ``python -I zygote.py DIRECTORY``.

Test code alone. For each launch it reads ``DIRECTORY/weakening.json``, a list of
words, each of which takes away one wall and no more. The user namespace and
the mount namespace always stay, and no word maps root; the tests check that
from outside before any attack begins.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from hayflick_sandbox import (
    init,
    mounts,
    networks,
    process,
    steps,
    syscalls,
    template,
    transfer,
    walls,
    zygote,
)

if TYPE_CHECKING:
    from collections.abc import Callable

HELD_FD = 200
SHARED = "/workspace"  # in the template, where no step needs it
WRITABLE = "/dev/shm"  # as this is
OWNED = "/proc"  # empty in the template, for each sandbox has one of its own
SYS = "/sys/fs/cgroup"
# Until the child has set its death signal; before, the end of a thread means nothing to it.
LINGER_SECONDS = 0.3


class Stand:
    """A step that stands in for a real one."""

    def describe(self) -> str:
        """Say it."""
        return f"weakened: {type(self).__name__}"


class Broken(Stand):
    """Landlock as on a kernel without it."""

    def apply(self) -> None:
        """Fail as the kernel would."""
        raise OSError(38, os.strerror(38), "landlock_create_ruleset")


class BestEffort(Stand):
    """A layer that is skipped when it fails: what this project must never do."""

    def __init__(self, step: steps.Step) -> None:
        self._step = step

    def apply(self) -> None:
        """Try, and go on."""
        try:
            self._step.apply()
        except OSError:
            return


class Outlive(Stand):
    """No new privileges, not dumpable, and no death signal."""

    def apply(self) -> None:
        """Do it."""
        import prctl

        prctl.set_no_new_privs(1)
        prctl.set_dumpable(0)


class LooseLimits(process.LimitResources):
    """Core files of any size."""

    def values(self) -> dict[int, int]:
        """Return the limits, cores without one."""
        limits = process.LimitResources(self.limits, self.address_space).values()
        return {**limits, resource.RLIMIT_CORE: resource.RLIM_INFINITY}


class MakeProc(Stand):
    """Only the directory that the next step needs."""

    def apply(self) -> None:
        """Do it."""
        os.mkdir(f"{template.NEW_ROOT}/proc", 0o555)


class FullProc(Stand):
    """The sandbox's own /proc with everything in it."""

    def apply(self) -> None:
        """Do it."""
        flags = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
        syscalls.mount("proc", f"{template.NEW_ROOT}/proc", "proc", flags)


class HostProc(Stand):
    """The host's /proc, as any unprivileged user of the host sees it."""

    def apply(self) -> None:
        """Do it."""
        flags = syscalls.MS_BIND | syscalls.MS_REC
        syscalls.mount(template.HOST_PROC, f"{template.NEW_ROOT}/proc", None, flags)


class WritableRoot(Stand):
    """The root stays writable; it is the worker's own tmpfs."""

    def apply(self) -> None:
        """Do it."""
        _pivot()
        os.chdir("/workspace")


class OutsideCwd(Stand):
    """Begin in the template, which is outside the root."""

    def apply(self) -> None:
        """Do it."""
        outside = os.open("/", os.O_PATH | os.O_CLOEXEC)
        _pivot()
        syscalls.mount_setattr("/", syscalls.MOUNT_ATTR_RDONLY, recursive=False)
        os.fchdir(outside)
        os.close(outside)


def _pivot() -> None:
    os.chdir(template.NEW_ROOT)
    syscalls.pivot_root(".", ".")
    syscalls.umount2(".", syscalls.MNT_DETACH)
    os.chdir("/")


class SharedMounts(Stand):
    """Every mount has a peer group: whoever copied it would be told of mounts below."""

    def apply(self) -> None:
        """Do it."""
        syscalls.mount("none", "/", None, syscalls.MS_REC | 1 << 20)  # MS_SHARED


class SharedTmp(Stand):
    """One /tmp for all weak workers, of the zygote's own."""

    def apply(self) -> None:
        """Do it."""
        target = f"{template.NEW_ROOT}/tmp"
        os.makedirs(target, mode=0o755, exist_ok=True)
        syscalls.mount(SHARED, target, None, syscalls.MS_BIND)


class LooseDev(Stand):
    """A /dev that is writable and holds a name it should not."""

    def apply(self) -> None:
        """Do it."""
        dev = f"{template.NEW_ROOT}/dev"
        os.makedirs(dev, mode=0o755, exist_ok=True)
        syscalls.mount("loose", dev, "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, "mode=755,size=64k")
        os.mkdir(f"{dev}/shm")
        for name in ("kmsg", *template.DEVICES):
            with open(f"{dev}/{name}", "w"):
                pass
            source = "null" if name == "kmsg" else name
            syscalls.mount(f"/dev/{source}", f"{dev}/{name}", None, syscalls.MS_BIND)


class Owned(Stand):
    """A path of the host as it is, owners and devices and all."""

    def __init__(self, path: str, place: str) -> None:
        self._path, self._place = path, place

    def apply(self) -> None:
        """Do it."""
        target = f"{template.NEW_ROOT}{self._path}"
        os.makedirs(target, mode=0o755, exist_ok=True)
        syscalls.mount(self._place, target, None, syscalls.MS_BIND)


def _gone(_: Any) -> list[steps.Step]:
    return []


# What each word puts in the place of which step.
STANDS: dict[str, tuple[type, Callable[[Any], list[Any]]]] = {
    "no-seccomp": (walls.FilterSystemCalls, _gone),
    "no-landlock": (walls.ApplyLandlock, _gone),
    "landlock-fails": (walls.ApplyLandlock, lambda _: [Broken()]),
    "landlock-best-effort": (walls.ApplyLandlock, lambda _: [BestEffort(Broken())]),
    "keep-capabilities": (process.DropCapabilities, _gone),
    "gain-privileges": (process.DieWithParent, _gone),
    "immortal": (process.DieWithParent, lambda _: [Outlive()]),
    "see-cgroups": (process.HideCgroups, _gone),
    "dump-cores": (process.LimitResources, lambda one: [LooseLimits(one.limits, one.address_space)]),
    "no-rlimits": (process.LimitResources, _gone),
    "nested-userns": (mounts.ForbidUserNamespaces, lambda _: [MakeProc()]),
    "host-pids": (mounts.ForbidUserNamespaces | mounts.FreshProc, lambda one: [without_pids(one)]),
    "full-proc": (mounts.FreshProc, lambda _: [FullProc()]),
    "host-proc": (mounts.FreshProc, lambda _: [HostProc()]),
    "writable-root": (mounts.EnterRoot, lambda _: [WritableRoot()]),
    "shared-mounts": (process.NameHost, lambda one: [one, SharedMounts()]),
    "outside-cwd": (mounts.EnterRoot, lambda _: [OutsideCwd()]),
    "big-tmp": (mounts.PrivateDirectory, lambda one: [larger(one)]),
    "shared-tmp": (mounts.PrivateDirectory, lambda one: [SharedTmp() if one.path == "/tmp" else one]),
    "loose-dev": (mounts.ShowReadOnly, lambda one: [LooseDev() if one.path == "/dev" else one]),
}
# What the other words change is beside the plan; the orchestrator's own come last.
OTHERS = {
    *(
        "canary-readable",
        "canary-writable",
        "canary-owned",
        "show-sys",
        "one-uid",
        "setgroups",
        "host-net",
        "metadata-on-lo",
        "shared-ipc",
    ),
    *("keep-descriptors", "inherit-environment", "same-luck", "threaded-launch", "follow-links"),
    *(
        "loose-limits",
        "no-tree-kill",
        "polite-kill",
        "no-memory-groups",
        "judged",
        "no-narrowing",
        "proxy-lists-loopback",
        "tell-every-denial",
        "refuse-without-pause",
        "parse-anything",
        "no-bounds",
        "no-output-limit",
        "keep-sent-descriptors",
        "anybody-is-a-descendant",
    ),
}


def without_pids(one: steps.Step) -> steps.Step:
    """Return what makes do without a pid namespace, where no fresh /proc can be had."""
    return HostProc() if isinstance(one, mounts.FreshProc) else MakeProc()


def larger(one: mounts.PrivateDirectory) -> steps.Step:
    """Return a private directory of sixteen times the size."""
    return mounts.PrivateDirectory(one.path, one.size_bytes * 16, one.mode)


class Weak:
    """Stands between the zygote and its plan, and knows the words for the launch in progress."""

    def __init__(self, directory: str) -> None:
        self._canary = f"{directory}/canary"
        self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        self._host_net = os.open("/proc/self/ns/net", os.O_RDONLY)
        self._words: frozenset[str] = frozenset()
        self._one_uid = 0
        os.dup2(os.open(f"{self._canary}/secret", os.O_RDONLY), HELD_FD)
        self._plan, self._launch, self._write = steps.plan, zygote.Zygote._launch, zygote._write
        self._readable_paths, self._build = template.readable_paths, template.build
        self._show = template._show
        self._enter_fresh, self._environment = networks.Networks.enter_fresh, zygote.environment
        self._close_range, self._namespaces = syscalls.close_range, zygote.NAMESPACES
        self._beneath = transfer._BENEATH
        self._leave, self._obey = zygote.Zygote._leave, init.Init._obey

    def take_over(self) -> None:
        """Put all of it in place, for this process."""
        me: Any = self
        steps.plan = me.plan
        zygote._write = me.write
        zygote.environment = me.environment
        template.readable_paths = me.readable_paths
        template.build = me.build
        for owner, name in (
            (zygote.Zygote, "launch"),
            (zygote.Zygote, "leave"),
            (init.Init, "obey"),
            (networks.Networks, "enter_fresh"),
        ):
            real = name if hasattr(owner, name) else f"_{name}"
            method = getattr(me, name)
            setattr(owner, real, lambda *a, _method=method, **k: _method(*a, **k))

    def read(self) -> frozenset[str]:
        """Read the words for the next launch."""
        with open(os.open("weakening.json", os.O_RDONLY, dir_fd=self._directory)) as file:
            self._words = frozenset(json.load(file))
        if unknown := self._words - OTHERS - set(STANDS):
            raise OSError(22, f"no such weakening: {sorted(unknown)}")
        return self._words

    def plan(self, *arguments: Any, **facts: Any) -> list[steps.Step]:
        """Return the plan, weakened."""
        plan = self._plan(*arguments, **facts)
        hidden = {
            path
            for path, word in ((self._canary, "canary-readable"), (SYS, "show-sys"))
            if word not in self._words
        }
        plan = [one for one in plan if getattr(one, "path", None) not in hidden]
        if self._words & {"canary-owned", "canary-writable"}:
            place = OWNED if "canary-owned" in self._words else WRITABLE
            owned = Owned(self._canary, place)
            plan = [owned if getattr(one, "path", None) == self._canary else one for one in plan]
        for word in self._words & set(STANDS):
            kind, stand = STANDS[word]
            plan = [new for one in plan for new in (stand(one) if isinstance(one, kind) else [one])]
        return plan

    def launch(self, server: zygote.Zygote, request: dict[str, Any], *rest: Any) -> None:
        """Launch, with what is beside the plan weakened too."""
        words = self.read()
        if "one-uid" in words:
            # The uid of whoever was born first under this word.
            self._one_uid = self._one_uid or request["uid"]
            request = {**request, "uid": self._one_uid}
        without = syscalls.CLONE_NEWIPC if "shared-ipc" in words else 0
        without |= syscalls.CLONE_NEWPID if "host-pids" in words else 0
        zygote.NAMESPACES = self._namespaces & ~without
        syscalls.close_range = self.close_all_but_one if "keep-descriptors" in words else self._close_range
        transfer._BENEATH = 0 if "follow-links" in words else self._beneath
        if "threaded-launch" in words:
            in_a_thread(lambda: self._launch(server, request, *rest))
        else:
            self._launch(server, request, *rest)

    def close_all_but_one(self, first: int, last: int = 0xFFFFFFFF) -> None:
        """Close as asked, and forget one."""
        self._close_range(first, HELD_FD - 1)
        self._close_range(HELD_FD + 1, last)

    def write(self, path: str, text: str) -> None:
        """Write to the child's /proc, but what denies it groups."""
        if not (path.endswith("/setgroups") and "setgroups" in self._words):
            self._write(path, text)

    def enter_fresh(self, stock: networks.Networks, *, loopback: bool, **rest: Any) -> None:
        """Enter the host's network, or one with an address that must never answer."""
        if "host-net" in self._words:
            syscalls.setns(self._host_net, syscalls.CLONE_NEWNET)
            return
        metadata = "metadata-on-lo" in self._words
        self._enter_fresh(stock, loopback=loopback or metadata, **rest)
        if metadata:
            _address_of_lo("169.254.169.254")

    def environment(self) -> dict[str, str]:
        """Return the environment; called in the zygote, before the fork."""
        import random  # as late as a zygote does, which puts its hook off

        # Not the module's own, which is seeded anew at every fork. What one sandbox is
        # given in the zygote the next must be without.
        luck = random.Random(1) if "same-luck" in self._words else random._inst
        random.random = luck.random
        more = {"SECRET_TOKEN": "canary-of-the-environment"} if "inherit-environment" in self._words else {}
        return {**self._environment(), **more}

    def readable_paths(self, extra: Any = ()) -> template.Template:
        """Add to the template what two words show; the plan leaves it out otherwise."""
        return self._readable_paths([*extra, self._canary, SYS])

    def show(self, source: int, target: str, owner: int | None) -> None:
        """Show it, what no kernel can map as it is."""
        self._show(source, target, None if target == f"{template.STAGE}{SYS}" else owner)

    def build(self, inside: template.Template, *, idmapped: bool) -> None:
        """Build the template, with a directory to share in it."""
        whole = os.open(self._canary, os.O_PATH)
        canary, writable = (syscalls.open_tree(whole, syscalls.OPEN_TREE_CLONE) for _ in range(2))
        template._show = self.show
        self._build(inside, idmapped=idmapped)
        # What is shared between weak workers is the zygote's own, never the host's.
        syscalls.unshare(syscalls.CLONE_NEWIPC)
        syscalls.mount("shared", SHARED, "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, "mode=1777,size=1m")
        syscalls.move_mount(canary, OWNED)
        flags = syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSUID
        syscalls.mount_setattr(OWNED, flags, recursive=False)
        syscalls.move_mount(writable, WRITABLE)
        syscalls.mount_setattr(WRITABLE, syscalls.MOUNT_ATTR_NOSUID, recursive=False)
        for descriptor in (canary, writable, whole):
            os.close(descriptor)

    def leave(self, server: zygote.Zygote) -> None:
        """End what runs, or forget to."""
        if "immortal" not in self._words:
            self._leave(server)

    def obey(self, one: init.Init) -> bool:
        """Obey; and when the orchestrator is gone, perhaps stay."""
        going_on = self._obey(one)
        while not going_on and "immortal" in self._words:
            signal.pause()
        return going_on


def in_a_thread(work: Callable[[], None]) -> None:
    """Make the mistake itself: the thread that forked ends, and the death signal comes."""
    real = sys._current_frames
    sys._current_frames = lambda: {0: None}  # type: ignore[assignment,dict-item,return-value]
    try:
        thread = threading.Thread(target=lambda: (work(), time.sleep(LINGER_SECONDS)))
        thread.start()
        thread.join()
    finally:
        sys._current_frames = real


def _address_of_lo(address: str) -> None:
    """Give the fresh namespace's loopback an address that must never answer."""
    import fcntl
    import socket
    import struct

    packed = struct.pack("16sHH4s8x", b"lo:1", socket.AF_INET, 0, socket.inet_aton(address))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, 0x8916, packed)  # SIOCSIFADDR


if __name__ == "__main__":
    Weak(sys.argv[1]).take_over()
    zygote.main()
