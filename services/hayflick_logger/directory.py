"""The record's directory: this user's alone, and one logger's at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class Claim:
    """Holds *directory*, made with mode 0700 when missing, until it is closed.

    Raises:
        OSError: EAGAIN when another logger holds it; EPERM when others may
            enter it.
    """

    def __init__(self, directory: Path) -> None:
        if not directory.exists():
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            sync(directory.parent)
        status = directory.stat()
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
            raise OSError(
                errno.EPERM, "the record's directory must be this user's own, with mode 0700", str(directory)
            )
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._lock = os.open(directory / "lock", flags, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise OSError(error.errno, "another logger holds the record", str(directory)) from error

    def close(self) -> None:
        """Let go of the directory."""
        os.close(self._lock)


def sync(directory: Path) -> None:
    """Make the names in *directory* durable.

    Raises:
        OSError: the disk refused.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
