"""Host user ids for workers: one each, never shared by two that live.

The range lies above what distributions and container managers hand out:
systemd's list of "UIDs and GIDs on systemd systems" leaves 1,879,048,192 to
2,147,483,647 unused. It is cut into blocks, and each orchestrator on a machine
takes a block for itself by a lock that dies with it. Root may choose another
range, for example where something else lives there. An ordinary user's range
is what ``/etc/subuid`` grants (see :mod:`hayflick_sandbox.subordinate`), cut
and locked likewise.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from hayflick_sandbox.subordinate import BLOCK_IDS, LAST_USABLE, Grant, Ids, blocks, find, judge

FIRST_UID = 1_879_048_192
BLOCK_UIDS = 8_192
BLOCKS = 1_024
RANGE = Ids(FIRST_UID, BLOCKS * BLOCK_UIDS)
# People and daemons are below, whatever is configured.
LOWEST_UID = 100_000
LOCK_PATH = Path("/run/hayflick/uids.lock")

# struct flock of fcntl(2): type, whence, start, length, pid. OFD locks want pid 0.
_FLOCK = struct.Struct("hhqqi4x")


class IdentitiesExhausted(Exception):
    """Every host user id of this node is in use by a live worker."""


class UidRange:
    """Leases host user ids to workers and takes them back.

    Attributes:
        first: The first host uid.
        count: How many there are.
        gids: Where each uid has a gid of another number: the host gids, in the
            same order. ``None`` where they have the same number.
        grant: What allows an ordinary user to hand them out, or ``None``.
    """

    def __init__(
        self,
        first: int,
        count: int,
        locks: Iterable[int] = (),
        *,
        gids: Ids | None = None,
        grant: Grant | None = None,
    ) -> None:
        self.first = first
        self.count = count
        self.gids = gids
        self.grant = grant
        self._locks = list(locks)
        self._fresh = iter(range(first, first + count))
        # First in, first out: an id rests as long as possible before it serves again.
        self._returned: deque[int] = deque()
        self._leased: set[int] = set()

    @classmethod
    def claim(cls, lock_path: Path = LOCK_PATH, within: Ids = RANGE) -> UidRange:
        """Return a range that no other orchestrator on this machine holds.

        Args:
            lock_path: The file whose bytes stand for host uids, and are locked for them.
            within: The ids to take a block of.

        Raises:
            IdentitiesExhausted: every block is taken.
            OSError: the lock file cannot be made.
        """
        lock_path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        descriptor = _open_lock(lock_path)
        end = within.first + within.count
        for first in range(within.first, end, BLOCK_UIDS):
            count = min(BLOCK_UIDS, end - first)
            if _lock(descriptor, first, count):
                return cls(first, count, [descriptor])
        os.close(descriptor)
        raise IdentitiesExhausted("every block of host user ids is held by another orchestrator")

    @classmethod
    def claim_subordinate(cls, grant: Grant, directories: Iterable[Path] | None = None) -> UidRange:
        """Return a range out of *grant* that no other orchestrator of this user holds.

        Args:
            grant: The user's subordinate ids.
            directories: Where lock files may be. A block is locked in each that
                is there, for no one of them is common to all sessions of a user.

        Raises:
            IdentitiesExhausted: every block is taken.
            OSError: there is no private directory for a lock.
        """
        wanted = lock_directories() if directories is None else directories
        locks = [_open_lock(path / "uids.lock") for path in wanted if _private(path)]
        if not locks:
            raise PermissionError(errno.EPERM, "no private directory for the lock on subordinate uids")
        for uid, gid in blocks(grant):
            held = [lock for lock in locks if _lock(lock, uid, BLOCK_IDS)]
            if held == locks:
                return cls(uid, BLOCK_IDS, locks, gids=Ids(gid, BLOCK_IDS), grant=grant)
            for lock in held:
                _lock(lock, uid, BLOCK_IDS, fcntl.F_UNLCK)
        for lock in locks:
            os.close(lock)
        raise IdentitiesExhausted("every block of subordinate uids is held by another orchestrator")

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

    @property
    def locks(self) -> tuple[int, ...]:
        """The descriptors that hold the block: it is nobody else's while any copy of one is open."""
        return tuple(self._locks)

    def close(self) -> None:
        """Give the block back to the machine, once no other process holds it either."""
        while self._locks:
            os.close(self._locks.pop())


class _OwnUid(UidRange):
    def lease(self) -> int:
        return self.first

    def release(self, uid: int) -> None:
        del uid


def parse_range(text: str) -> Ids:
    """Return the range that *text* names, as ``FIRST-LAST``.

    Raises:
        ValueError: it names none, or one that workers may not have.
    """
    first, _, last = text.partition("-")
    if not (first.isascii() and first.isdecimal() and last.isascii() and last.isdecimal()):
        raise ValueError(f"must be FIRST-LAST, two host uids, not {text!r}")
    if not LOWEST_UID <= int(first) <= int(last) <= LAST_USABLE:
        raise ValueError(f"{text} is not a range from {LOWEST_UID} on and up to {LAST_USABLE}")
    return Ids(int(first), int(last) - int(first) + 1)


def claim_range(*, subordinate: bool, within: Ids | None = None) -> UidRange:
    """Return this process's range: root's, an ordinary user's subordinate one, or the user alone.

    Args:
        subordinate: Whether the layer "uid-range" is enforced; where it is not, an
            ordinary user's workers are the user.
        within: Where root's lies, instead of where nobody is by systemd's list.

    Raises:
        IdentitiesExhausted: every block is taken.
        OSError: there is no place for the lock, or the grant is gone since it was
            found; EPERM when an ordinary user asks for a range.
    """
    if os.geteuid() == 0:
        return UidRange.claim(within=within or RANGE)
    if within is not None:
        raise PermissionError(errno.EPERM, "uid_range: an ordinary user's is what /etc/subuid grants")
    if not subordinate:
        return UidRange.own()
    grant = judge(find())
    if not isinstance(grant, Grant):
        raise PermissionError(errno.EPERM, grant.detail)
    return UidRange.claim_subordinate(grant)


def lock_directories() -> list[Path]:
    """Return where an ordinary user's locks may be; the last is there for every session of a user.

    Not where the environment says, which differs between sessions; and in both, so
    that a service with a ``/tmp`` of its own and a session before login meet in one.
    """
    uid = os.getuid()
    runtime = Path(f"/run/user/{uid}")
    shared = Path(f"/tmp/hayflick-uids-{uid}")
    return [runtime / "hayflick", shared] if runtime.is_dir() else [shared]


def _private(directory: Path) -> bool:
    """Return whether *directory*, made if need be, is this user's and nobody else's."""
    try:
        with contextlib.suppress(FileExistsError):
            directory.mkdir()
            directory.chmod(0o700)  # whatever the umask made of it
        found = directory.lstat()
    except OSError:
        return False
    return (
        stat.S_ISDIR(found.st_mode)
        and found.st_uid == os.geteuid()
        and not stat.S_IMODE(found.st_mode) & 0o077
    )


def _open_lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    os.fchmod(descriptor, 0o600)  # whatever the umask made of it
    return descriptor


def _lock(descriptor: int, start: int, length: int, kind: int = fcntl.F_WRLCK) -> bool:
    """Lock a range of a lock file, or with F_UNLCK let it go; return whether it was possible."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))
    except (BlockingIOError, PermissionError):
        return False
    return True
