"""A SQLite index beside the journal: finds entries, holds none.

Derived: it names the place of each entry and the few fields that filters ask
for; what is answered is read from the journal. Missing, foreign or damaged, it
is built anew. As it is written only after the entries are durable, it also
bears witness: a journal that ends before its index was cut.

A transaction costs more than the rows in it, so the newest rows wait in memory,
are found there as well, and are written together a moment later. What a crash
leaves unwritten is added from the journal at the next start.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hayflick_logger import database
from hayflick_logger.journal import GENESIS_HEAD, Journal, Witness
from hayflick_logger.rows import Filter, Row, allows, conditions, row_of
from hayflick_logger.segments import Head, Place

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_VERSION = 1
_SCHEMA = """
CREATE TABLE sources (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, last_sequence INTEGER NOT NULL
);
CREATE TABLE entries (
  "index" INTEGER PRIMARY KEY,
  source_id INTEGER NOT NULL, sequence INTEGER NOT NULL,
  event TEXT NOT NULL, contract_id TEXT NOT NULL, worker_id TEXT NOT NULL, root_id TEXT NOT NULL,
  seconds INTEGER NOT NULL, nanos INTEGER NOT NULL,
  segment INTEGER NOT NULL, offset INTEGER NOT NULL, length INTEGER NOT NULL,
  UNIQUE (source_id, sequence)
);
CREATE INDEX by_event ON entries (event);
CREATE INDEX by_contract ON entries (contract_id);
CREATE INDEX by_worker ON entries (worker_id);
CREATE INDEX by_root ON entries (root_id);
CREATE TABLE extent (first_hash BLOB NOT NULL, head_index INTEGER NOT NULL, head_hash BLOB NOT NULL);
"""
_PLACES = 'SELECT "index", segment, offset, length FROM entries'
_REBUILD_ROWS = 10_000

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """An entry that a filter let through."""

    index: int
    place: Place


class Index:
    """The index of one journal. Written by one thread; :meth:`find` may be called from any.

    Attributes:
        head: How far entries are found.
        witness: How far they are on disk, if any is.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._database = _open(path)
        self.witness = _witness(self._database)
        self.head = self.witness.head if self.witness is not None else GENESIS_HEAD
        self._first_hash = self.witness.first_hash if self.witness is not None else b""
        self._waiting: dict[tuple[str, int], Row] = {}  # by source and sequence, in the order of the record
        self._last: dict[str, int] = {}  # of the sources in it
        self._lock = threading.Lock()  # held to change or to copy what waits, never to write

    @property
    def waiting(self) -> int:
        """How many rows are not on disk yet."""
        return len(self._waiting)

    def close(self) -> None:
        """Write what waits, if that can be, and close the database."""
        try:
            self.flush()
        except sqlite3.Error as error:
            log.warning("the index ends behind the record, and will catch up: %s", error)
        self._database.close()

    def attach(self, journal: Journal) -> None:
        """Bring the index in line with *journal*: continue it, or build it anew when it is another's.

        Raises:
            segments.Broken: the journal does not follow.
            sqlite3.Error: the index cannot be written.
        """
        try:
            first = next(journal.lines(), None)
            if self.witness is not None and (first is None or first[2].hash != self.witness.first_hash):
                self._start_anew()
            self._catch_up(journal)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise  # no room, no permission: building it anew would not help
            log.warning("the index is damaged and will be built anew: %s", error)
            self._start_anew()
            self._catch_up(journal)

    def add(self, placed: Iterable[tuple[Place, bytes]], head: Head) -> None:
        """Add entries that are durable, up to *head*; :meth:`flush` writes them."""
        rows = {}
        for place, line in placed:
            row = row_of(place, line)
            rows[row.source, row.sequence] = row
            self._last[row.source] = max(row.sequence, self._last.get(row.source, 0))
            if not self._first_hash:
                self._first_hash = bytes.fromhex(json.loads(line)["hash"])
        with self._lock:
            self._waiting.update(rows)
        self.head = head

    def flush(self) -> None:
        """Write what waits, all or none.

        Raises:
            sqlite3.Error: the index cannot be written; all of it waits on.
        """
        if not self._waiting:
            return
        with self._database as written:
            written.executemany(
                "INSERT INTO sources (name, last_sequence) VALUES (?, ?)"
                " ON CONFLICT (name)"
                " DO UPDATE SET last_sequence = max(last_sequence, excluded.last_sequence)",
                self._last.items(),
            )
            select = "SELECT id FROM sources WHERE name = ?"
            ids = {name: written.execute(select, (name,)).fetchone()[0] for name in self._last}
            written.executemany(
                "INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (
                        *(row.entry_index, ids[row.source], *row[2:-1]),
                        *(row.place.segment, row.place.offset, row.place.length),
                    )
                    for row in self._waiting.values()
                ],
            )
            written.execute("DELETE FROM extent")
            extent = (self._first_hash, self.head.next_index, self.head.hash)
            written.execute("INSERT INTO extent VALUES (?, ?, ?)", extent)
        self.witness = Witness(self._first_hash, self.head)
        # Only now: whoever does not find them waiting finds them written.
        with self._lock:
            self._waiting = {}
        self._last = {}

    def last_sequence(self, source: str) -> int:
        """Return the highest sequence of *source* in the record; 0 when it has none."""
        row = self._database.execute("SELECT last_sequence FROM sources WHERE name = ?", (source,)).fetchone()
        return max(int(row[0]) if row else 0, self._last.get(source, 0))

    def place_of(self, source: str, sequence: int) -> Place | None:
        """Return where the entry with *sequence* of *source* lies, if it was recorded."""
        if waiting := self._waiting.get((source, sequence)):
            return waiting.place
        row = self._database.execute(
            "SELECT segment, offset, length FROM entries"
            " WHERE source_id = (SELECT id FROM sources WHERE name = ?) AND sequence = ?",
            (source, sequence),
        ).fetchone()
        return Place(*row) if row else None

    def find(self, wanted: Filter, start_index: int, end_index: int, limit: int) -> list[Found]:
        """Return the first *limit* entries in [*start_index*, *end_index*) that *wanted* lets through.

        Raises:
            sqlite3.Error: the index cannot be read.
        """
        # Copied first: what is written meanwhile is still in the copy, and only there.
        with self._lock:
            waiting = list(self._waiting.values())
        written_end = min(end_index, waiting[0].entry_index) if waiting else end_index
        found: list[Found] = []
        if start_index < written_end:
            texts, values = conditions(wanted)
            # Every value is bound; the text holds names from this package alone.
            where = " AND ".join(['"index" >= ?', '"index" < ?', *texts])
            with database.reader(self._path) as read:
                rows = read.execute(
                    f'{_PLACES} WHERE {where} ORDER BY "index" LIMIT ?',
                    (start_index, written_end, *values, limit),
                )
                found = [Found(index, Place(*place)) for index, *place in rows]
        found += [
            Found(row.entry_index, row.place)
            for row in waiting
            if start_index <= row.entry_index < end_index and allows(wanted, row)
        ]
        return found[:limit]

    def _catch_up(self, journal: Journal) -> None:
        """Add what *journal* holds beyond this index; cheap when that is nothing."""
        if self.head == journal.head:
            return
        last_index = self.head.next_index - 1
        last = self._database.execute(f'{_PLACES} WHERE "index" = ?', (last_index,)).fetchone()
        log.info("indexing entries %d to %d", self.head.next_index, journal.head.next_index - 1)
        for place, line, reached in journal.lines(self.head, Place(*last[1:]) if last else None):
            self.add([(place, line)], reached)
            if self.waiting == _REBUILD_ROWS:
                self.flush()
        self.flush()

    def _start_anew(self) -> None:
        self._database.close()
        database.remove(self._path)
        self._database = _open(self._path)
        self.witness, self.head, self._first_hash = None, GENESIS_HEAD, b""
        self._waiting, self._last = {}, {}


def _open(path: Path) -> sqlite3.Connection:
    try:
        return database.connect(path, _SCHEMA, _VERSION)
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        log.warning("the index is damaged and will be built anew: %s", error)
        database.remove(path)
        return database.connect(path, _SCHEMA, _VERSION)


def _witness(connection: sqlite3.Connection) -> Witness | None:
    row = connection.execute("SELECT first_hash, head_index, head_hash FROM extent").fetchone()
    return Witness(row[0], Head(row[1], row[2])) if row else None
