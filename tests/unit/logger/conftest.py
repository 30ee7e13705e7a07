"""What the logger's unit tests share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hayflick.v1 import logger_pb2
from hayflick_logger.config import Config
from hayflick_logger.record import Record
from hayflick_rpc import events

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SEGMENT_BYTES = 64 * 1024


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory that only this user may enter, as the record demands."""
    path = tmp_path / "record"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def open_elsewhere() -> Iterator[Callable[[Path], Record]]:
    """Open another record; the one opened before is closed first."""
    opened: list[Record] = []

    def open_(path: Path) -> Record:
        while opened:
            opened.pop().close()
        path.mkdir(mode=0o700, exist_ok=True)
        opened.append(Record(config(path)))
        return opened[0]

    yield open_
    for record in opened:
        record.close()


def config(directory: Path) -> Config:
    """Return the settings of a record in *directory* with small files."""
    return Config(
        listen="unix:///unused", data_dir=directory, max_segment_bytes=SEGMENT_BYTES, max_metrics=1_000
    )


@pytest.fixture
def open_record(directory: Path) -> Iterator[Callable[[], Record]]:
    """Open the record of *directory*; the one opened before is closed first, as on a restart."""
    opened: list[Record] = []

    def close() -> None:
        while opened:
            opened.pop().close()

    def open_() -> Record:
        close()
        record = Record(config(directory))
        opened.append(record)
        return record

    yield open_
    close()


@pytest.fixture
def add() -> Callable[..., None]:
    """Record events under a source: one for each sequence, with the sequence in its details."""

    def add_(record: Record, *sequences: int, source: str = "test", **fields: str) -> None:
        plan = record.plan()
        plan.take(source, [(number, events.to_json(make_event(number, **fields))) for number in sequences])
        record.commit(plan)

    return add_


def make_event(number: int, **fields: str) -> logger_pb2.Event:
    """Return an event that carries *number*."""
    event = logger_pb2.Event(**{"event": "audit", **fields})
    event.timestamp.seconds = 1_800_000_000 + number
    event.details["number"] = number
    return event
