"""The confinement of one worker, as a list of steps that can be read aloud.

:func:`plan` turns a policy into the list; the child applies it in order, from
the fork to the first instruction of init, and ``python -m hayflick_sandbox
--explain`` prints it. No step is optional at run time: a step that fails ends
the child, and a layer that this machine lacks is left out of the plan only
when its operator let it go by name (see :mod:`hayflick_sandbox.probe`).
"""

from __future__ import annotations

import fcntl
import os
import resource
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import prctl

from hayflick_sandbox import landlock, syscalls
from hayflick_sandbox.policy import Limits, Policy
from hayflick_sandbox.template import HOST_PROC, NEW_ROOT, WORKER_UID, Template

CHANNEL_FD = 3
# Kernel memory of a tmpfs is bounded by its inodes as well as its bytes.
BYTES_PER_INODE = 4_096
# When the host itself runs short, workers go before whatever governs them; proc_pid_oom_score_adj(5).
OOM_SCORE_ADJ = 500
_NO_EXECUTABLES_FROM_OUTSIDE = syscalls.MS_NOSUID | syscalls.MS_NODEV


class Step(Protocol):
    """One thing that makes the sandbox tighter."""

    def describe(self) -> str:
        """Return what it does, as a sentence without a subject."""

    def apply(self) -> None:
        """Do it to this process.

        Raises:
            OSError: the kernel refused.
        """


@dataclass(frozen=True, slots=True)
class JoinCgroups:
    """Enter the worker's version 1 cgroups; the version 2 one was entered at birth.

    Writing "0" to ``tasks`` moves the calling thread alone, which spares the
    kernel the global lock, and us its grace period of some milliseconds
    (kernel/cgroup/cgroup.c, cgroup_procs_write_start).
    """

    task_fds: tuple[int, ...]

    def describe(self) -> str:
        """Say it."""
        return "enter the worker's cgroups: memory without swap, CPU bandwidth, number of processes"

    def apply(self) -> None:
        """Do it."""
        for descriptor in self.task_fds:
            os.write(descriptor, b"0")


@dataclass(frozen=True, slots=True)
class TakeIdentity:
    """Become the worker's user, once the zygote mapped it."""

    sync_fd: int
    host_uid: int

    def describe(self) -> str:
        """Say it."""
        return f"become uid {WORKER_UID} inside, which is the unprivileged uid {self.host_uid} outside"

    def apply(self) -> None:
        """Do it."""
        if os.read(self.sync_fd, 1) != b"1":
            raise OSError(1, "the zygote could not map the worker's identity")
        os.setresgid(WORKER_UID, WORKER_UID, WORKER_UID)
        os.setresuid(WORKER_UID, WORKER_UID, WORKER_UID)


@dataclass(frozen=True, slots=True)
class HideCgroups:
    """Make the worker's own cgroup look like the root of every hierarchy."""

    def describe(self) -> str:
        """Say it."""
        return "enter a new cgroup namespace, so that the tree above is not even named"

    def apply(self) -> None:
        """Do it."""
        syscalls.unshare(syscalls.CLONE_NEWCGROUP)


@dataclass(frozen=True, slots=True)
class ForbidUserNamespaces:
    """Let the kernel itself refuse nested user namespaces."""

    def describe(self) -> str:
        """Say it."""
        return "set user.max_user_namespaces to 0 in the worker's user namespace"

    def apply(self) -> None:
        """Do it."""
        descriptor = os.open(f"{HOST_PROC}/sys/user/max_user_namespaces", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, b"0")
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class KeepDescriptors:
    """Keep the init channel as descriptor 3 and /dev/null as 0, 1, 2; close the rest."""

    channel_fd: int

    def describe(self) -> str:
        """Say it."""
        return "keep one socket to the orchestrator, point stdio at /dev/null, close every other descriptor"

    def apply(self) -> None:
        """Do it."""
        null = os.open("/dev/null", os.O_RDWR)
        # Above everything that is about to be overwritten.
        channel = fcntl.fcntl(self.channel_fd, fcntl.F_DUPFD, 64)
        for number in (0, 1, 2):
            os.dup2(null, number)
        os.dup2(channel, CHANNEL_FD, inheritable=False)
        syscalls.close_range(CHANNEL_FD + 1)


@dataclass(frozen=True, slots=True)
class EqualFooting:
    """Inherit no favours: an orchestrator may be shielded from the OOM killer, or have priority."""

    def describe(self) -> str:
        """Say it."""
        return f"be an ordinary process to the scheduler, and the OOM killer's choice ({OOM_SCORE_ADJ})"

    def apply(self) -> None:
        """Do it."""
        if os.sched_getscheduler(0) != os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        if os.getpriority(os.PRIO_PROCESS, 0) < 0:
            os.setpriority(os.PRIO_PROCESS, 0, 0)
        descriptor = os.open(f"{HOST_PROC}/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, str(OOM_SCORE_ADJ).encode())
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class FreshRoot:
    """Start from an empty file system in memory."""

    def describe(self) -> str:
        """Say it."""
        return "mount an empty tmpfs as the new root"

    def apply(self) -> None:
        """Do it."""
        options = "mode=755,size=64k,nr_inodes=256"
        syscalls.mount("root", NEW_ROOT, "tmpfs", _NO_EXECUTABLES_FROM_OUTSIDE, options)


@dataclass(frozen=True, slots=True)
class ShowReadOnly:
    """Bind one path of the template, whose read-only flag is locked."""

    path: str

    def describe(self) -> str:
        """Say it."""
        return f"show {self.path}, read-only"

    def apply(self) -> None:
        """Do it."""
        target = NEW_ROOT + self.path
        if os.path.isdir(self.path):
            os.makedirs(target, mode=0o755, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
            os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        syscalls.mount(self.path, target, None, syscalls.MS_BIND | syscalls.MS_REC)


@dataclass(frozen=True, slots=True)
class Link:
    """Recreate a link that the system's layout needs."""

    path: str
    target: str

    def describe(self) -> str:
        """Say it."""
        return f"link {self.path} to {self.target}"

    def apply(self) -> None:
        """Do it."""
        os.symlink(self.target, NEW_ROOT + self.path)


@dataclass(frozen=True, slots=True)
class PrivateDirectory:
    """A writable directory of the worker's own, bounded in bytes and inodes."""

    path: str
    size_bytes: int
    mode: str

    def describe(self) -> str:
        """Say it."""
        return (
            f"mount a private, writable {self.path} of at most {self.size_bytes} bytes "
            f"and {self.inodes} files"
        )

    @property
    def inodes(self) -> int:
        """How many files it can hold."""
        return max(64, self.size_bytes // BYTES_PER_INODE)

    def apply(self) -> None:
        """Do it."""
        target = NEW_ROOT + self.path
        os.makedirs(target, mode=0o755, exist_ok=True)
        # tmpfs takes size=0 for "no limit"; a limit of nothing is one page.
        options = f"mode={self.mode},size={max(self.size_bytes, 4096)},nr_inodes={self.inodes}"
        syscalls.mount("private", target, "tmpfs", _NO_EXECUTABLES_FROM_OUTSIDE, options)


@dataclass(frozen=True, slots=True)
class FreshProc:
    """A /proc that holds the worker's own processes and nothing of the host.

    ``subset=pid`` (kernel 5.8) leaves out every file that is not about a
    process, /proc/sys among them, so there is nothing to mask.
    """

    def describe(self) -> str:
        """Say it."""
        return "mount a fresh /proc with the worker's own processes and no system-wide file"

    def apply(self) -> None:
        """Do it."""
        os.mkdir(f"{NEW_ROOT}/proc", 0o555)
        flags = _NO_EXECUTABLES_FROM_OUTSIDE | syscalls.MS_NOEXEC
        syscalls.mount("proc", f"{NEW_ROOT}/proc", "proc", flags, "subset=pid")


@dataclass(frozen=True, slots=True)
class EnterRoot:
    """Make the new root the only root there is."""

    def describe(self) -> str:
        """Say it."""
        return "pivot into the new root, detach the old one, make the root itself read-only"

    def apply(self) -> None:
        """Do it."""
        os.chdir(NEW_ROOT)
        syscalls.pivot_root(".", ".")
        syscalls.umount2(".", syscalls.MNT_DETACH)
        os.chdir("/")
        syscalls.mount_setattr("/", syscalls.MOUNT_ATTR_RDONLY, recursive=False)
        os.chdir("/workspace")


@dataclass(frozen=True, slots=True)
class NameHost:
    """Give the machine a name that says nothing of the host."""

    hostname: str

    def describe(self) -> str:
        """Say it."""
        return f"call the machine {self.hostname!r}"

    def apply(self) -> None:
        """Do it."""
        syscalls.sethostname(self.hostname)


@dataclass(frozen=True, slots=True)
class OwnKeyring:
    """Leave the keyring that would be shared with every process of the session."""

    def describe(self) -> str:
        """Say it."""
        return "join a new session keyring"

    def apply(self) -> None:
        """Do it."""
        syscalls.keyctl_join_session_keyring()


@dataclass(frozen=True, slots=True)
class LimitResources:
    """Set the rlimits, hard and soft alike."""

    limits: Limits
    address_space: bool

    def values(self) -> dict[int, int]:
        """Return each rlimit and its value."""
        limits = self.limits
        values = {
            resource.RLIMIT_NPROC: limits.pids + 1,
            resource.RLIMIT_NOFILE: limits.open_files,
            resource.RLIMIT_FSIZE: limits.file_size_bytes,
            resource.RLIMIT_STACK: limits.stack_bytes,
            # No core file is that small, and 1 is the one value at which the kernel
            # does not start a piped core_pattern handler either (fs/coredump.c).
            resource.RLIMIT_CORE: 1,
            resource.RLIMIT_MEMLOCK: 0,
            resource.RLIMIT_MSGQUEUE: 0,
            resource.RLIMIT_RTPRIO: 0,
            resource.RLIMIT_NICE: 0,
            resource.RLIMIT_SIGPENDING: 1_024,
        }
        if self.address_space:
            values[resource.RLIMIT_AS] = limits.memory_bytes
        return values

    def describe(self) -> str:
        """Say it."""
        names = {
            getattr(resource, name): name.removeprefix("RLIMIT_")
            for name in dir(resource)
            if name.startswith("RLIMIT_") and name != "RLIMIT_OFILE"
        }
        return "set rlimits: " + ", ".join(f"{names[kind]}={value}" for kind, value in self.values().items())

    def apply(self) -> None:
        """Do it."""
        for kind, value in self.values().items():
            _, hard = resource.getrlimit(kind)
            wanted = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (wanted, wanted))


@dataclass(frozen=True, slots=True)
class LeaveSession:
    """No controlling terminal to type into, no files for others to read."""

    def describe(self) -> str:
        """Say it."""
        return "start a session without a terminal; create files for the worker alone (umask 077)"

    def apply(self) -> None:
        """Do it."""
        os.setsid()
        os.umask(0o077)


@dataclass(frozen=True, slots=True)
class ApplyLandlock:
    """Say again, to another part of the kernel, what may be read and written."""

    tcp: bool

    def rules(self) -> dict[str, int]:
        """Return the paths and the rights below them."""
        writable = dict.fromkeys(("/workspace", "/tmp", "/dev/shm"), landlock.READ_WRITE)
        return {
            "/": landlock.READ,
            "/dev": landlock.DEVICE,
            "/proc": landlock.READ | landlock.WRITE_FILE,
            **writable,
        }

    def describe(self) -> str:
        """Say it."""
        files, net, scopes = landlock.handled(landlock.abi())
        return (
            f"apply Landlock (ABI {landlock.abi()}, rights {files:#x}, TCP {0 if self.tcp else net:#x}, "
            f"scopes {scopes:#x}): write only to /workspace, /tmp and /dev/shm, no signal "
            "and no abstract socket across the sandbox's border"
        )

    def apply(self) -> None:
        """Do it."""
        landlock.restrict(self.rules(), tcp=self.tcp)


@dataclass(frozen=True, slots=True)
class DropCapabilities:
    """Give up every capability, and every way to get one back."""

    last: int

    def describe(self) -> str:
        """Say it."""
        return "drop all capabilities from all five sets and lock the secure bits"

    def apply(self) -> None:
        """Do it."""
        for capability in range(self.last + 1):
            syscalls.prctl_capbset_drop(capability)
        syscalls.prctl_set_securebits(syscalls.SECBITS_LOCKED_DOWN)
        syscalls.capset_none()


@dataclass(frozen=True, slots=True)
class DieWithParent:
    """End with the zygote, gain nothing from an exec, be opaque to other processes."""

    def describe(self) -> str:
        """Say it."""
        return "set no_new_privs, a death signal tied to the zygote, and make init non-dumpable"

    def apply(self) -> None:
        """Do it."""
        prctl.set_no_new_privs(1)
        prctl.set_pdeathsig(signal.SIGKILL)
        prctl.set_dumpable(0)


@dataclass(frozen=True, slots=True)
class FilterSystemCalls:
    """Last: from here on, only listed system calls."""

    programs: tuple[bytes, bytes]

    def describe(self) -> str:
        """Say it."""
        allow, refuse = (len(program) // 8 for program in self.programs)
        return (
            f"install the seccomp filters ({allow} + {refuse} BPF instructions): listed calls pass, "
            "refused ones answer EPERM, unknown ones ENOSYS, foreign architectures die"
        )

    def apply(self) -> None:
        """Do it."""
        for program in self.programs:
            syscalls.seccomp_set_mode_filter(program)


@dataclass(frozen=True, slots=True)
class Host:
    """What is the same for every sandbox of one zygote."""

    template: Template
    last_capability: int
    degraded: frozenset[str]
    filters: tuple[bytes, bytes]
    inet_filters: tuple[bytes, bytes]


def plan(
    policy: Policy,
    host: Host,
    *,
    host_uid: int,
    channel_fd: int = -1,
    sync_fd: int = -1,
    task_fds: Sequence[int] = (),
) -> list[Step]:
    """Return the steps that confine a child just cloned, in order."""
    limits = policy.limits
    present = host.degraded.isdisjoint
    steps: list[Step] = []
    if task_fds or present({"memory"}):
        steps.append(JoinCgroups(tuple(task_fds)))
    steps += [
        # Before the change of user, which makes /proc/self root's.
        EqualFooting(),
        TakeIdentity(sync_fd, host_uid),
        HideCgroups(),
        ForbidUserNamespaces(),
        KeepDescriptors(channel_fd),
        FreshRoot(),
        # Before the binds, for this Python may itself live below one of them.
        PrivateDirectory("/tmp", limits.tmp_bytes, "1777"),
        PrivateDirectory("/workspace", limits.workspace_bytes, "700"),
        *(Link(path, target) for path, target in host.template.links),
        *(ShowReadOnly(path) for path in (*host.template.binds, "/etc", "/dev")),
        PrivateDirectory("/dev/shm", limits.tmp_bytes, "1777"),
        FreshProc(),
        EnterRoot(),
        NameHost(policy.hostname),
    ]
    steps += [OwnKeyring(), LimitResources(limits, address_space=not present({"memory"})), LeaveSession()]
    if present({"landlock"}):
        steps.append(ApplyLandlock(tcp=policy.loopback))
    steps += [
        DropCapabilities(host.last_capability),
        DieWithParent(),
        FilterSystemCalls(host.inet_filters if policy.loopback else host.filters),
    ]
    return steps
