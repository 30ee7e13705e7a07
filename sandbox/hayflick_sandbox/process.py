"""What a worker's init is to the rest of the machine: the steps about the process itself."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
from dataclasses import dataclass

import prctl

from hayflick_sandbox import syscalls
from hayflick_sandbox.policy import Limits
from hayflick_sandbox.template import HOST_PROC, WORKER_UID

CHANNEL_FD = 3
# When the host itself runs short, workers go before whatever governs them; proc_pid_oom_score_adj(5).
OOM_SCORE_ADJ = 500


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
            # Counted for whoever made the user namespace as well, over all workers.
            resource.RLIMIT_SIGPENDING: 64,
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
