"""A SQLite index beside the journal: finds entries, holds none.

Derived: it names the place of each entry and the few fields that filters ask
for; what is answered is read from the journal. Missing, foreign or damaged, it
is built anew. As it is written only after the entries are durable, it also
bears witness: a journal that ends before its index was cut.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
from dataclasses import dataclass
from typing import TYPE_CHECKING

from google.protobuf.timestamp_pb2 import Timestamp

from hayflick_logger.journal import Journal, Witness
from hayflick_logger.segments import Head, Place

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

_VERSION = 1
_SCHEMA = f"""
BEGIN;
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
PRAGMA user_version = {_VERSION};
COMMIT;
"""
_PLACES = 'SELECT "index", segment, offset, length FROM entries'
_REBUILD_ROWS = 10_000

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Filter:
    """Which entries; each condition that is given must hold. Instants are (seconds, nanos) of Unix time."""

    contract_id: str = ""
    worker_id: str = ""
    root_id: str = ""
    events: tuple[str, ...] = ()
    start: tuple[int, int] | None = None
    end: tuple[int, int] | None = None


@dataclass(frozen=True)
class Found:
    """An entry that a filter let through."""

    index: int
    place: Place


class Index:
    """The index of one journal. Written by one thread; :meth:`find` may be called from any."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._database = _open(path)
        self.witness = _witness(self._database)

    def close(self) -> None:
        """Close the database."""
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
            self.catch_up(journal)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise  # no room, no permission: building it anew would not help
            log.warning("the index is damaged and will be built anew: %s", error)
            self._start_anew()
            self.catch_up(journal)

    def catch_up(self, journal: Journal) -> None:
        """Add what *journal* holds beyond this index; cheap when that is nothing.

        Raises:
            segments.Broken: the journal does not follow.
            sqlite3.Error: the index cannot be written; it stays as it was.
        """
        head = self.witness.head if self.witness is not None else Head()
        if head == journal.head:
            return
        last = self._database.execute(f'{_PLACES} WHERE "index" = ?', (head.next_index - 1,)).fetchone()
        log.info("indexing entries %d to %d", head.next_index, journal.head.next_index - 1)
        rows: list[tuple[Place, bytes]] = []
        for place, line, reached in journal.lines(head, Place(*last[1:]) if last else None):
            rows.append((place, line))
            if len(rows) == _REBUILD_ROWS or reached == journal.head:
                self.add(rows, reached)
                rows.clear()

    def add(self, placed: Iterable[tuple[Place, bytes]], head: Head) -> None:
        """Add entries that are durable, up to *head*, all or none.

        Raises:
            sqlite3.Error: the index cannot be written; it stays as it was.
        """
        rows = [_row(place, line) for place, line in placed]
        first_hash = self.witness.first_hash if self.witness is not None else bytes.fromhex(rows[0][1])
        with self._database as database:
            database.executemany(
                "INSERT INTO sources (name, last_sequence) VALUES (?, ?) ON CONFLICT (name)"
                " DO UPDATE SET last_sequence = max(last_sequence, excluded.last_sequence)",
                [(row[2], row[3]) for row in rows],
            )
            database.executemany(
                "INSERT INTO entries SELECT ?, id, ?, ?, ?, ?, ?, ?, ?, ?, ?, ? FROM sources WHERE name = ?",
                [(row[0], *row[3:], row[2]) for row in rows],
            )
            database.execute("DELETE FROM extent")
            database.execute("INSERT INTO extent VALUES (?, ?, ?)", (first_hash, head.next_index, head.hash))
        self.witness = Witness(first_hash, head)

    def last_sequence(self, source: str) -> int:
        """Return the highest sequence of *source* in the record; 0 when it has none."""
        row = self._database.execute("SELECT last_sequence FROM sources WHERE name = ?", (source,)).fetchone()
        return int(row[0]) if row else 0

    def place_of(self, source: str, sequence: int) -> Place | None:
        """Return where the entry with *sequence* of *source* lies, if it was recorded."""
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
        conditions = ['"index" >= ?', '"index" < ?']
        values: list[object] = [start_index, end_index]
        for column in ("contract_id", "worker_id", "root_id"):
            if value := getattr(wanted, column):
                conditions.append(f"{column} = ?")
                values.append(value)
        if wanted.events:
            conditions.append(f"event IN ({', '.join('?' * len(wanted.events))})")
            values += wanted.events
        if wanted.start is not None:
            conditions.append("(seconds, nanos) >= (?, ?)")
            values += wanted.start
        if wanted.end is not None:
            conditions.append("(seconds, nanos) < (?, ?)")
            values += wanted.end
        # Every value is bound; the text holds names from this module alone.
        query = f'{_PLACES} WHERE {" AND ".join(conditions)} ORDER BY "index" LIMIT ?'
        with _reader(self._path) as database:
            rows = database.execute(query, (*values, limit))
            return [Found(index, Place(*place)) for index, *place in rows]

    def _start_anew(self) -> None:
        self._database.close()
        _remove(self._path)
        self._database = _open(self._path)
        self.witness = None


def _open(path: Path) -> sqlite3.Connection:
    try:
        return _connect(path)
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        log.warning("the index is damaged and will be built anew: %s", error)
        _remove(path)
        return _connect(path)


def _connect(path: Path) -> sqlite3.Connection:
    # The writer moves from the starting thread to the recorder's, once.
    database = sqlite3.connect(path, check_same_thread=False)
    try:
        path.chmod(0o600)
        database.execute("PRAGMA journal_mode = WAL")
        # Not OFF: losing its end in a power cut is harmless, being mangled by one would cost a rebuild.
        database.execute("PRAGMA synchronous = NORMAL")
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version not in (0, _VERSION):
            raise sqlite3.DatabaseError(f"version {version}, not {_VERSION}")
        if version == 0:
            database.executescript(_SCHEMA)
    except BaseException:
        database.close()
        raise
    return database


@contextlib.contextmanager
def _reader(path: Path) -> Iterator[sqlite3.Connection]:
    # One per call: opening costs 0.1 ms, and threads then share nothing.
    database = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
    try:
        yield database
    finally:
        database.close()


def _remove(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _witness(database: sqlite3.Connection) -> Witness | None:
    row = database.execute("SELECT first_hash, head_index, head_hash FROM extent").fetchone()
    return Witness(row[0], Head(row[1], row[2])) if row else None


def _row(place: Place, line: bytes) -> tuple[int, str, str, int, str, str, str, str, int, int, int, int, int]:
    entry = json.loads(line)
    event = entry["event"]
    stamp = Timestamp()
    stamp.FromJsonString(event["timestamp"])
    ids = (event.get("contract_id", ""), event.get("worker_id", ""), event.get("root_id", ""))
    return (
        *(entry["index"], entry["hash"], entry["source"], entry["sequence"], event["event"], *ids),
        *(stamp.seconds, stamp.nanos, place.segment, place.offset, place.length),
    )
