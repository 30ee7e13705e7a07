"""Metric samples, kept beside the record and not in it: bounded, the oldest give way.

Unlike the record they may be lost: a power cut can take the last seconds, a
crash what was not written yet, a damaged file is set aside, and a batch that is
sent again after a lost answer counts twice. New samples wait in memory, to be
written together: a transaction costs more than the samples in it.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hayflick.v1 import logger_pb2
from hayflick_logger import database

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_VERSION = 1
_SCHEMA = """
CREATE TABLE samples (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  name TEXT NOT NULL, value REAL NOT NULL, seconds INTEGER NOT NULL, nanos INTEGER NOT NULL,
  contract_id TEXT NOT NULL, worker_id TEXT NOT NULL
);
CREATE INDEX by_worker ON samples (worker_id);
CREATE INDEX by_contract ON samples (contract_id);
"""

# Reached only while they cannot be written; then no more are taken.
MAX_WAITING_SAMPLES = 10_000
_COLUMNS = "id, name, value, seconds, nanos, contract_id, worker_id"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MetricFilter:
    """Which samples; each condition that is given must hold."""

    contract_id: str = ""
    worker_id: str = ""
    name: str = ""


class MetricStore:
    """The last *max_samples* samples. May be called from any thread."""

    def __init__(self, path: Path, *, max_samples: int) -> None:
        self._path = path
        self._max_samples = max_samples
        try:
            self._database = database.connect(path, _SCHEMA, _VERSION)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            aside = path.with_name(path.name + ".damaged")
            log.warning("the metrics are damaged; set aside as %s: %s", aside, error)
            path.replace(aside)
            self._database = database.connect(path, _SCHEMA, _VERSION)
        self._waiting: list[logger_pb2.MetricSample] = []
        self._lock = threading.Lock()  # held to write, or to change what waits

    @property
    def waiting(self) -> int:
        """How many samples are not written yet."""
        return len(self._waiting)

    def close(self) -> None:
        """Write what waits, if that can be, and close the database."""
        try:
            self.flush()
        except sqlite3.Error as error:
            log.warning("%d metric samples are lost: %s", self.waiting, error)
        self._database.close()

    def add(self, samples: Sequence[logger_pb2.MetricSample]) -> None:
        """Keep *samples*, all or none; :meth:`flush` writes them.

        Raises:
            sqlite3.Error: too many wait, and cannot be written.
        """
        if len(self._waiting) >= MAX_WAITING_SAMPLES:
            self.flush()
        with self._lock:
            self._waiting += samples

    def flush(self) -> None:
        """Write what waits, all or none, and let the oldest go when there are too many.

        Raises:
            sqlite3.Error: they cannot be written, and wait on.
        """
        with self._lock:
            if self._waiting:
                self._write(self._waiting)
                self._waiting = []

    def find(
        self, wanted: MetricFilter, after_id: int, limit: int
    ) -> list[tuple[int, logger_pb2.MetricSample]]:
        """Return the first *limit* samples behind *after_id* that *wanted* lets through, with their ids.

        Raises:
            sqlite3.Error: they cannot be read, or what waits cannot be written.
        """
        self.flush()
        conditions, values = ["id > ?"], [after_id]
        for column in ("contract_id", "worker_id", "name"):
            if value := getattr(wanted, column):
                conditions.append(f"{column} = ?")
                values.append(value)
        # Every value is bound; the text holds names from this module alone.
        query = f"SELECT {_COLUMNS} FROM samples WHERE {' AND '.join(conditions)} ORDER BY id LIMIT ?"  # noqa: S608
        with database.reader(self._path) as read:
            return [(row[0], _sample(row)) for row in read.execute(query, (*values, limit))]

    def _write(self, samples: Sequence[logger_pb2.MetricSample]) -> None:
        rows = [
            (
                *(sample.name, sample.value, sample.timestamp.seconds, sample.timestamp.nanos),
                *(sample.contract_id, sample.worker_id),
            )
            for sample in samples
        ]
        with self._database as written:
            written.executemany(
                "INSERT INTO samples (name, value, seconds, nanos, contract_id, worker_id)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                rows,
            )
            written.execute(
                "DELETE FROM samples WHERE id <= (SELECT max(id) FROM samples) - ?", (self._max_samples,)
            )


def _sample(row: tuple[int, str, float, int, int, str, str]) -> logger_pb2.MetricSample:
    _, name, value, seconds, nanos, contract_id, worker_id = row
    sample = logger_pb2.MetricSample(name=name, value=value, contract_id=contract_id, worker_id=worker_id)
    sample.timestamp.seconds, sample.timestamp.nanos = seconds, nanos
    return sample
