"""What is done to a record while no logger runs on it."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from hayflick_logger import database
from hayflick_logger.config import Config
from hayflick_logger.directory import Claim
from hayflick_logger.record import INDEX, Record

if TYPE_CHECKING:
    from pathlib import Path


def reindex(directory: Path) -> int:
    """Build the index of the record in *directory* anew; return how many entries it finds.

    Raises:
        HayflickError: JOURNAL_CORRUPT.
        OSError: there is no record, it is not ours alone, or a logger runs on it.
    """
    if not (directory / "log.key").exists():
        raise FileNotFoundError(2, "there is no record", str(directory))
    with closing(Claim(directory.absolute())):
        database.remove(directory / INDEX)
    with closing(Record(Config(listen="unix:///unused", data_dir=directory))) as record:
        return record.journal.next_index
