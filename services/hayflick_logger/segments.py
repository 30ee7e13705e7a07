"""The journal's files: their names, their order, and reading them back.

A segment is named after the index of its first entry, so that the files sort
into the record and a missing one shows.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hayflick_logger.entries import GENESIS, BadEntry, check

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_NAME = re.compile(r"journal-(\d{20})\.jsonl", re.ASCII)


@dataclass(frozen=True)
class Place:
    """Where a line lies: the first index of its segment, and its bytes there."""

    segment: int
    offset: int
    length: int


@dataclass(frozen=True)
class Head:
    """How far the record reaches: the next index, and the hash of the entry before it."""

    next_index: int = 0
    hash: bytes = GENESIS


class Broken(Exception):
    """The chain breaks.

    Attributes:
        index: The first entry that does not follow.
        place: Where its line starts.
    """

    def __init__(self, message: str, index: int, place: Place) -> None:
        super().__init__(message)
        self.index = index
        self.place = place


def missing(head: Head) -> Broken:
    """Return the finding that the record ends at *head* where it should go on."""
    return Broken(f"entry {head.next_index} is missing", head.next_index, Place(head.next_index, 0, 0))


def path_of(directory: Path, first_index: int) -> Path:
    """Return the path of the segment that starts at *first_index*."""
    return directory / f"journal-{first_index:020d}.jsonl"


def first_indexes(directory: Path) -> list[int]:
    """Return the first index of each segment in *directory*, ascending."""
    names = (_NAME.fullmatch(name) for name in os.listdir(directory))  # noqa: PTH208 -- names, not paths
    return sorted(int(match[1]) for match in names if match)


def walk(
    directory: Path, segment: int, head: Head, *, offset: int = 0, limit_bytes: int | None = None
) -> Iterator[tuple[Place, bytes, Head]]:
    """Yield each line of *segment* with its place and the head after it, having checked it.

    Args:
        directory: The journal's.
        segment: The first index of the segment.
        head: What the first line must follow.
        offset: Where that line starts.
        limit_bytes: Where to stop, when the file may be growing.

    Raises:
        Broken: at the first line that does not follow.
    """
    if not offset and segment != head.next_index:
        raise missing(head)
    with path_of(directory, segment).open("rb") as file:
        file.seek(offset)
        while (limit_bytes is None or offset < limit_bytes) and (line := file.readline()):
            place = Place(segment, offset, len(line))
            try:
                head = Head(head.next_index + 1, check(line, head.next_index, head.hash))
            except BadEntry as error:
                raise Broken(str(error), head.next_index, place) from error
            yield place, line, head
            offset += len(line)


def read(directory: Path, places: Sequence[Place]) -> list[bytes]:
    """Return the lines at *places*.

    Raises:
        OSError: a segment cannot be read.
        BadEntry: a segment is shorter than it was.
    """
    lines: list[bytes] = []
    opened = -1
    descriptor = -1
    try:
        for place in places:
            if place.segment != opened:
                if descriptor >= 0:
                    os.close(descriptor)
                    descriptor = -1
                descriptor = os.open(path_of(directory, place.segment), os.O_RDONLY | os.O_CLOEXEC)
                opened = place.segment
            line = os.pread(descriptor, place.length, place.offset)
            if len(line) != place.length:
                raise BadEntry(f"segment {place.segment} ends before byte {place.offset + place.length}")
            lines.append(line)
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    return lines
