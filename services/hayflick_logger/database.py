"""SQLite files beside the journal: opened by one writer, read over connections of their own."""

from __future__ import annotations

import contextlib
import sqlite3
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def connect(path: Path, schema: str, version: int) -> sqlite3.Connection:
    """Return a connection that writes to *path*, made with *schema* when it is new.

    Raises:
        sqlite3.OperationalError: no room, no permission.
        sqlite3.DatabaseError: the file is damaged, or not of this *version*.
    """
    # The writer moves from the starting thread to the recorder's, once.
    database = sqlite3.connect(path, check_same_thread=False)
    try:
        path.chmod(0o600)
        database.execute("PRAGMA journal_mode = WAL")
        # Not OFF: losing its end in a power cut is harmless, being mangled by one would cost a rebuild.
        database.execute("PRAGMA synchronous = NORMAL")
        (found,) = database.execute("PRAGMA user_version").fetchone()
        if found not in (0, version):
            raise sqlite3.DatabaseError(f"version {found}, not {version}")
        if found == 0:
            database.executescript(f"BEGIN; {schema} PRAGMA user_version = {version}; COMMIT;")
    except BaseException:
        database.close()
        raise
    return database


@contextlib.contextmanager
def reader(path: Path) -> Iterator[sqlite3.Connection]:
    """Yield a connection that only reads *path*.

    One per call: opening costs 0.1 ms, and threads then share nothing.
    """
    database = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
    try:
        yield database
    finally:
        database.close()


def remove(path: Path) -> None:
    """Remove the file, and what SQLite keeps beside it."""
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
