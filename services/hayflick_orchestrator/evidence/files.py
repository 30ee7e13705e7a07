"""What lies in a sandbox's directories, read from outside through the root of its init.

Whatever a worker planted is met by the kernel's own refusals: no link is
followed, nothing but a regular file is opened, no path is resolved in one go.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import select
import stat
from typing import TYPE_CHECKING, Any

from hayflick_sandbox import syscalls

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hayflick_orchestrator.evidence.budget import Budget

DIRECTORIES = ("workspace", "tmp", "dev/shm")
CHUNK_BYTES = 256 * 1024
_BENEATH = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS
_SAME_MOUNT = _BENEATH | syscalls.RESOLVE_NO_XDEV
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
# A FIFO or a device that takes a file's place must neither block us nor be started.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
_KINDS = (
    (stat.S_ISREG, "file"),
    (stat.S_ISDIR, "directory"),
    (stat.S_ISLNK, "link"),
    (stat.S_ISFIFO, "fifo"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "character device"),
    (stat.S_ISBLK, "block device"),
)

Json = dict[str, Any]


@contextlib.contextmanager
def root_of(pid: int, pidfd: int) -> Iterator[int]:
    """Open the root directory of the process *pid*, which *pidfd* is a descriptor of.

    Raises:
        OSError: ESRCH when it is not that process any more; EACCES where this
            process may not look into that one.
    """
    root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Alive after the open: its number cannot have come to another meanwhile.
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        if poller.poll(0):
            raise OSError(errno.ESRCH, "the process ended")
        yield root
    finally:
        os.close(root)


def listing(root: int, budget: Budget) -> Json:
    """Return what lies in the :data:`DIRECTORIES` below the descriptor *root*."""
    walk = _Walk(budget)
    found: Json = {}
    for path in DIRECTORIES:
        try:
            # Each may be a mount of its own, made with the sandbox; below it nothing is.
            top = syscalls.openat2(root, path, _DIRECTORY, _BENEATH)
        except OSError as error:
            found[path] = {"unreadable": _name(error)}
            continue
        try:
            entries: list[Json] = []
            walk.left = budget.caps.entries_per_tree  # who floods one hides nothing in another
            walk.into(top, "", 0, entries)
            found[path] = {"entries": entries}
        finally:
            os.close(top)
    return {"directories": found, "entry_count": walk.count, "hashed_bytes": walk.hashed_bytes}


class _Walk:
    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._caps = budget.caps
        self.left = 0
        self.count = 0
        self.hashed_bytes = 0

    def into(self, directory: int, prefix: str, depth: int, entries: list[Json]) -> None:
        """Add what lies in *directory* to *entries*, each directory before what is in it."""
        for name in self._names(directory):
            entry: Json = {"path": f"{prefix}{name}"}
            entries.append(entry)
            try:
                status = os.stat(name, dir_fd=directory, follow_symlinks=False)
                self._describe(directory, name, status, entry)
                if stat.S_ISDIR(status.st_mode):
                    self._descend(directory, name, entry, depth, entries)
                elif stat.S_ISREG(status.st_mode):
                    self._hash(directory, name, status, entry)
            except OSError as error:
                entry["unreadable"] = _name(error)
                self._budget.omit("unreadable_entries")

    def _names(self, directory: int) -> list[str]:
        """Return the names in *directory* that there is room for, in order."""
        names: list[str] = []
        with os.scandir(directory) as found:
            for entry in found:
                if self.left <= 0 or self._budget.entries <= 0 or not self._budget.timely:
                    # How many more there are is not counted: they may be millions.
                    self._budget.omit("directories_cut_short")
                    break
                self.left -= 1
                self.count += 1
                self._budget.entries -= 1
                names.append(entry.name)
        return sorted(names)

    def _describe(self, directory: int, name: str, status: os.stat_result, entry: Json) -> None:
        entry |= {
            "kind": next((word for is_one, word in _KINDS if is_one(status.st_mode)), "unknown"),
            "mode": f"{stat.S_IMODE(status.st_mode):04o}",
            "uid": status.st_uid,
            "size_bytes": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "links": status.st_nlink,
        }
        if stat.S_ISLNK(status.st_mode):
            entry["target"] = os.readlink(name, dir_fd=directory)

    def _descend(self, directory: int, name: str, entry: Json, depth: int, entries: list[Json]) -> None:
        if depth >= self._caps.depth:
            entry["not_listed"] = "too deep"
            self._budget.omit("directories_too_deep")
            return
        below = syscalls.openat2(directory, name, _DIRECTORY, _SAME_MOUNT)
        try:
            self.into(below, f"{entry['path']}/", depth + 1, entries)
        finally:
            os.close(below)

    def _hash(self, directory: int, name: str, status: os.stat_result, entry: Json) -> None:
        if status.st_size > self._caps.file_bytes:
            entry["not_hashed"] = "too large"
        elif self.hashed_bytes + status.st_size > self._caps.hashed_bytes_per_worker:
            entry["not_hashed"] = "too much in all"
        elif not self._budget.timely:
            entry["not_hashed"] = "no time left"
        if "not_hashed" in entry:
            self._budget.omit("files_not_hashed")
            return
        file = syscalls.openat2(directory, name, _FILE, _SAME_MOUNT)
        try:
            opened = os.fstat(file)
            if not stat.S_ISREG(opened.st_mode):
                entry["not_hashed"] = "not a regular file any more"
                return
            digest, left = hashlib.sha256(), status.st_size
            while left > 0 and (data := os.read(file, min(left, CHUNK_BYTES))):
                digest.update(data)
                left -= len(data)
            self.hashed_bytes += status.st_size - left
            entry["sha256"] = digest.hexdigest()
            if left or opened.st_size != status.st_size:
                entry["changed_meanwhile"] = True
        finally:
            os.close(file)


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, "EIO")
