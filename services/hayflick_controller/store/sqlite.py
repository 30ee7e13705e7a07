"""Everything about SQLite that another database would do otherwise."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Any

import sqlalchemy
from sqlalchemy import event, pool

if TYPE_CHECKING:
    import sqlite3
    from pathlib import Path

BUSY_TIMEOUT_SECONDS = 5.0
FILE_MODE = 0o600
DIRECTORY_MODE = 0o700


def prepare_file(path: Path) -> None:
    """Make *path* and its directory if need be; nobody but this user may read either.

    Raises:
        OSError: EPERM when the directory is another's or open to others.
    """
    path.parent.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
    found = path.parent.stat()
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise OSError(errno.EPERM, "must be this user's own, with mode 0700", str(path.parent))
    # Made before SQLite does, so that the signing keys are never in a file
    # that the umask left open; -wal and -shm inherit its mode.
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
    try:
        os.fchmod(descriptor, FILE_MODE)
    finally:
        os.close(descriptor)


def engine(path: Path | None) -> sqlalchemy.Engine:
    """Return an engine over the file at *path*, or over memory for ``None``.

    One connection, because one thread writes; WAL lets others (a backup, a
    curious operator) read meanwhile.
    """
    url = sqlalchemy.URL.create("sqlite", database=str(path) if path else ":memory:")
    made = sqlalchemy.create_engine(
        url,
        poolclass=pool.StaticPool,
        connect_args={"timeout": BUSY_TIMEOUT_SECONDS, "check_same_thread": False},
    )
    event.listen(made, "connect", _set_up)
    event.listen(made, "begin", _begin_immediate)
    return made


def set_durable(connection: sqlalchemy.Connection, durable: bool) -> None:
    """Choose, between transactions, whether commits wait for the disk.

    With WAL, NORMAL keeps the database whole through a power cut but may lose
    the last commits; FULL loses none.
    """
    driver: Any = connection.connection.driver_connection
    driver.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")


def _set_up(driver: sqlite3.Connection, record: object) -> None:
    del record
    driver.isolation_level = None  # we say BEGIN ourselves: the driver's comes too late
    driver.execute("PRAGMA journal_mode = WAL")
    driver.execute("PRAGMA foreign_keys = ON")
    driver.execute("PRAGMA synchronous = NORMAL")


def _begin_immediate(connection: sqlalchemy.Connection) -> None:
    # Take the write lock at once: a transaction that read first and wrote
    # later could find its facts outdated and fail with SQLITE_BUSY.
    connection.exec_driver_sql("BEGIN IMMEDIATE")
