"""A SQLite index beside the journal: finds entries, holds none.

Derived: it has of each entry the few fields that filters ask for; what is
answered is read from the journal. Missing, foreign or damaged, it
is built anew. As it is written only after the entries are durable, it also
bears witness: a journal that ends before its index was cut.

A transaction costs more than the rows in it, so the newest rows wait in memory,
are found there as well, and are written together a moment later. What a crash
leaves unwritten is added from the journal at the next start.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from typing import TYPE_CHECKING

from hayflick_logger import database
from hayflick_logger.recovery import Witness
from hayflick_logger.rows import Filter, Row, allows, conditions, row_of
from hayflick_tlog.merkle import leaf_hash

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from hayflick_logger.journal import Journal

_VERSION = 2
_SCHEMA = """
CREATE TABLE sources (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, last_sequence INTEGER NOT NULL
);
CREATE TABLE entries (
  "index" INTEGER PRIMARY KEY,
  source_id INTEGER NOT NULL, sequence INTEGER NOT NULL,
  event TEXT NOT NULL, contract_id TEXT NOT NULL, worker_id TEXT NOT NULL, root_id TEXT NOT NULL,
  seconds INTEGER NOT NULL, nanos INTEGER NOT NULL,
  UNIQUE (source_id, sequence)
);
CREATE INDEX by_event ON entries (event);
CREATE INDEX by_contract ON entries (contract_id);
CREATE INDEX by_worker ON entries (worker_id);
CREATE INDEX by_root ON entries (root_id);
CREATE TABLE extent (first_hash BLOB NOT NULL, size INTEGER NOT NULL, root BLOB NOT NULL);
"""
_REBUILD_ROWS = 10_000

log = logging.getLogger(__name__)


class Index:
    """The index of one journal. Written by one thread; :meth:`find` may be called from any.

    Attributes:
        size: How many entries are found.
        witness: How far they are on disk, if any is.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._database = _open(path)
        self.witness = _witness(self._database)
        self.size = self.witness.size if self.witness is not None else 0
        self._root_of: Callable[[int], bytes] | None = None
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
            HayflickError: JOURNAL_CORRUPT: the journal cannot be read back.
            BadEntry: it holds what is no entry.
            sqlite3.Error: the index cannot be written.
        """
        self._root_of = journal.root
        try:
            first = leaf_hash(journal.read([0])[0]) if journal.next_index else b""
            if self.witness is not None and first != self.witness.first_hash:
                self._start_anew()
            self._catch_up(journal)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise  # no room, no permission: building it anew would not help
            log.warning("the index is damaged and will be built anew: %s", error)
            self._start_anew()
            self._catch_up(journal)

    def add(self, placed: Iterable[tuple[int, bytes]]) -> None:
        """Add entries that are durable, in the order of the record; :meth:`flush` writes them.

        Raises:
            BadEntry: one is none.
        """
        rows = {}
        for index, entry in placed:
            row = row_of(index, entry)
            rows[row.source, row.sequence] = row
            self._last[row.source] = max(row.sequence, self._last.get(row.source, 0))
            if not index:
                self._first_hash = leaf_hash(entry)
            self.size = index + 1
        with self._lock:
            self._waiting.update(rows)

    def flush(self) -> None:
        """Write what waits, all or none.

        Raises:
            sqlite3.Error: the index cannot be written; all of it waits on.
        """
        if not self._waiting or self._root_of is None:
            return
        witness = Witness(self._first_hash, self.size, self._root_of(self.size))
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
                "INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [(row.entry_index, ids[row.source], *row[2:]) for row in self._waiting.values()],
            )
            written.execute("DELETE FROM extent")
            extent = (witness.first_hash, witness.size, witness.root)
            written.execute("INSERT INTO extent VALUES (?, ?, ?)", extent)
        self.witness = witness
        # Only now: whoever does not find them waiting finds them written.
        with self._lock:
            self._waiting = {}
        self._last = {}

    def last_sequence(self, source: str) -> int:
        """Return the highest sequence of *source* in the record; 0 when it has none."""
        row = self._database.execute("SELECT last_sequence FROM sources WHERE name = ?", (source,)).fetchone()
        return max(int(row[0]) if row else 0, self._last.get(source, 0))

    def index_of(self, source: str, sequence: int) -> int | None:
        """Return the index of the entry with *sequence* of *source*, if it was recorded."""
        if waiting := self._waiting.get((source, sequence)):
            return waiting.entry_index
        row = self._database.execute(
            'SELECT "index" FROM entries'
            " WHERE source_id = (SELECT id FROM sources WHERE name = ?) AND sequence = ?",
            (source, sequence),
        ).fetchone()
        return int(row[0]) if row else None

    def find(self, wanted: Filter, start_index: int, end_index: int, limit: int) -> list[int]:
        """Return the first *limit* entries in [*start_index*, *end_index*) that *wanted* lets through.

        Raises:
            sqlite3.Error: the index cannot be read.
        """
        # Copied first: what is written meanwhile is still in the copy, and only there.
        with self._lock:
            waiting = list(self._waiting.values())
        written_end = min(end_index, waiting[0].entry_index) if waiting else end_index
        found: list[int] = []
        if start_index < written_end:
            texts, values = conditions(wanted)
            # Every value is bound; the text holds names from this package alone.
            where = " AND ".join(['"index" >= ?', '"index" < ?', *texts])
            with database.reader(self._path) as read:
                rows = read.execute(
                    f'SELECT "index" FROM entries WHERE {where} ORDER BY "index" LIMIT ?',  # noqa: S608
                    (start_index, written_end, *values, limit),
                )
                found = [int(index) for (index,) in rows]
        found += [
            row.entry_index
            for row in waiting
            if start_index <= row.entry_index < end_index and allows(wanted, row)
        ]
        return found[:limit]

    def _catch_up(self, journal: Journal) -> None:
        """Add what *journal* holds beyond this index; cheap when that is nothing."""
        if self.size == journal.next_index:
            return
        log.info("indexing entries %d to %d", self.size, journal.next_index - 1)
        for index, entry in journal.entries(self.size):
            self.add([(index, entry)])
            if self.waiting == _REBUILD_ROWS:
                self.flush()
        self.flush()

    def _start_anew(self) -> None:
        self._database.close()
        database.remove(self._path)
        self._database = _open(self._path)
        self.witness, self.size, self._first_hash = None, 0, b""
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
    row = connection.execute("SELECT first_hash, size, root FROM extent").fetchone()
    return Witness(*row) if row else None
