"""What databases do in ways of their own, behind one face."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hayflick_controller.store import sqlite

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy import Connection, Engine

    from hayflick_controller.store.protocol import Notice


@dataclass(frozen=True, slots=True)
class Database:
    """One database.

    Attributes:
        engine: Makes the connections.
        set_durable: Chooses whether the next commit waits for the disk.
        controller_id: Who opens it; empty where the database itself knows.
        claim: Shows the others that this controller lives, or refuses.
        alive: Whether another controller lives.
        tell: Tells the others at the commit.
        turn: The number of the commit under way among all controllers' commits; 0 where there is one.
    """

    engine: Engine
    set_durable: Callable[[Connection, bool], None]
    controller_id: str = ""
    claim: Callable[[Connection, str], None] = lambda *_: None
    alive: Callable[[Connection, str], bool] = lambda *_: False
    tell: Callable[[Connection, str, Sequence[Notice]], None] = lambda *_: None
    turn: Callable[[Connection], int] = lambda _: 0


def sqlite_database(path: Path | None) -> Database:
    """Return the SQLite file at *path*, or a database in memory for ``None``.

    Raises:
        OSError: The file or its directory cannot be made safe.
    """
    if path is not None:
        sqlite.prepare_file(path)
    return Database(sqlite.engine(path), sqlite.set_durable)


def postgres_database(url: str, controller_id: str) -> Database:
    """Return the PostgreSQL database at *url*, for a controller of this name."""
    # Not needed, nor paid for, by those who run on SQLite.
    from hayflick_controller.store import postgres

    return Database(
        postgres.engine(url),
        postgres.set_durable,
        controller_id,
        postgres.claim,
        postgres.alive,
        postgres.tell,
        postgres.turn,
    )
