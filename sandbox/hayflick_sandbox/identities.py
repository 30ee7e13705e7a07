"""Host user ids for workers: one each, never shared by two that live.

The range lies above what distributions and container managers hand out:
systemd's list of "UIDs and GIDs on systemd systems" leaves 1,879,048,192 to
2,147,483,647 unused. It is cut into blocks, and each orchestrator on a machine
takes a block for itself by a lock that dies with it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections import deque
from pathlib import Path

FIRST_UID = 1_879_048_192
BLOCK_UIDS = 8_192
BLOCKS = 1_024
LOCK_PATH = Path("/run/hayflick/uids.lock")

# struct flock of fcntl(2): type, whence, start, length, pid. OFD locks want pid 0.
_FLOCK = struct.Struct("hhqqi4x")


class IdentitiesExhausted(Exception):
    """Every host user id of this node is in use by a live worker."""


class UidRange:
    """Leases host user ids to workers and takes them back."""

    def __init__(self, first: int, count: int, lock_fd: int | None = None) -> None:
        self.first = first
        self.count = count
        self._lock_fd = lock_fd
        self._fresh = iter(range(first, first + count))
        # First in, first out: an id rests as long as possible before it serves again.
        self._returned: deque[int] = deque()
        self._leased: set[int] = set()

    @classmethod
    def claim(cls, lock_path: Path = LOCK_PATH) -> UidRange:
        """Return a range that no other orchestrator on this machine holds.

        Raises:
            IdentitiesExhausted: every block is taken.
            OSError: the lock file cannot be made.
        """
        lock_path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        for block in range(BLOCKS):
            try:
                fcntl.fcntl(
                    descriptor,
                    fcntl.F_OFD_SETLK,
                    _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, block, 1, 0),
                )
            except (BlockingIOError, PermissionError):
                continue
            return cls(FIRST_UID + block * BLOCK_UIDS, BLOCK_UIDS, descriptor)
        os.close(descriptor)
        raise IdentitiesExhausted("every block of host user ids is held by another orchestrator")

    @classmethod
    def own(cls) -> UidRange:
        """Return the degraded range of an ordinary user: everyone is the user.

        Raises:
            PermissionError: the user is root, whose own id no worker may have.
        """
        if os.getuid() == 0:
            raise PermissionError(errno.EPERM, "no worker may run with root's own uid")
        return _OwnUid(os.getuid(), 1)

    def lease(self) -> int:
        """Return an id that no live worker has.

        Raises:
            IdentitiesExhausted: there is none.
        """
        uid = next(self._fresh, None)
        if uid is None:
            if not self._returned:
                raise IdentitiesExhausted(f"all {self.count} host user ids of this node are in use")
            uid = self._returned.popleft()
        self._leased.add(uid)
        return uid

    def release(self, uid: int) -> None:
        """Take back *uid*, whose worker is seen dead.

        Raises:
            KeyError: it was not leased.
        """
        self._leased.remove(uid)
        self._returned.append(uid)

    def close(self) -> None:
        """Give the block back to the machine."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None


class _OwnUid(UidRange):
    def lease(self) -> int:
        return self.first

    def release(self, uid: int) -> None:
        del uid
