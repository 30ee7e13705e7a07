"""What a worker sees of any file system: the steps that build its root, where it cannot reach."""

from __future__ import annotations

import os
from dataclasses import dataclass

from hayflick_sandbox import syscalls
from hayflick_sandbox.template import NEW_ROOT, RESOLV_OUTSIDE

# Kernel memory of a tmpfs is bounded by its inodes as well as its bytes.
BYTES_PER_INODE = 4_096
# namespaces(7), "The /proc/sys/user directory".
INOTIFY = "max_inotify_instances"
ZEROED = ("max_user_namespaces", INOTIFY)
_NO_EXECUTABLES_FROM_OUTSIDE = syscalls.MS_NOSUID | syscalls.MS_NODEV


def _make(directory: str) -> None:
    """Make *directory*, and those above it where there is need."""
    try:
        os.mkdir(directory, 0o755)
    except FileExistsError:
        return
    except FileNotFoundError:
        os.makedirs(directory, mode=0o755)


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
    """Bind one path of the template, whose flags and whose map of owners are locked."""

    path: str
    idmapped: bool = False

    def describe(self) -> str:
        """Say it."""
        nobody = ", with no owner, so that no socket and no pipe there can be written to"
        return f"show {self.path}, read-only{nobody if self.idmapped else ''}"

    def apply(self) -> None:
        """Do it."""
        target = NEW_ROOT + self.path
        if os.path.isdir(self.path):
            _make(target)
        else:
            _make(os.path.dirname(target))
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
        _make(target)
        # tmpfs takes size=0 for "no limit"; a limit of nothing is one page.
        options = f"mode={self.mode},size={max(self.size_bytes, 4096)},nr_inodes={self.inodes}"
        syscalls.mount("private", target, "tmpfs", _NO_EXECUTABLES_FROM_OUTSIDE, options)


@dataclass(frozen=True, slots=True)
class UseResolver:
    """Tell the worker's programs of the resolver that there is where it has a way out."""

    def describe(self) -> str:
        """Say it."""
        return "show an /etc/resolv.conf that names the forwarder of the way out"

    def apply(self) -> None:
        """Do it."""
        target = f"{NEW_ROOT}/etc/resolv.conf"
        syscalls.mount(f"/etc/{RESOLV_OUTSIDE}", target, None, syscalls.MS_BIND)


@dataclass(frozen=True, slots=True)
class ForbidUserNamespaces:
    """Let the kernel itself refuse nested user namespaces, and watches on files.

    Both are counted for whoever made the worker's user namespace too, which is root or the
    operator (kernel/ucount.c), and of inotify instances that user has 128 by default
    for all that it runs: a few workers would leave the host none.

    By a /proc of its own: in one that all sandboxes share, each user namespace
    leaves an entry of the same name, and finding one's own takes longer the
    more there are (fs/proc/proc_sysctl.c, proc_sys_compare). It is mounted in the
    old root and goes with that: to unmount it by itself would be to wait for all
    processors once more (fs/namespace.c, namespace_unlock).
    """

    def describe(self) -> str:
        """Say it."""
        names = " and ".join(f"user.{name}" for name in ZEROED)
        return f"set {names} to 0 in the worker's user namespace"

    def apply(self) -> None:
        """Do it."""
        os.mkdir(f"{NEW_ROOT}/proc", 0o555)  # for the one that stays
        syscalls.mount("proc", "/proc", "proc", _NO_EXECUTABLES_FROM_OUTSIDE | syscalls.MS_NOEXEC)
        for name in ZEROED:
            path = f"/proc/sys/user/{name}"
            if name == INOTIFY and not os.path.exists(path):
                continue  # a kernel without inotify, which the self-probe looks at too
            descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(descriptor, b"0")
            finally:
                os.close(descriptor)


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
