"""The newest entries on disk, before they are in tiles: files to append to, durable with one sync.

Each file is named after the index of its first entry. A record is the entry's
length, the length's complement, the entry, and its leaf hash: so a flipped
byte is told from the torn end of a write that was never acknowledged.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hayflick_tlog.merkle import HASH_BYTES, leaf_hash
from hayflick_tlog.tiles import MAX_ENTRY_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_NAME = re.compile(r"wal-(\d{20})", re.ASCII)
_LENGTH_BYTES = 2
_HEADER_BYTES = 2 * _LENGTH_BYTES


@dataclass(frozen=True)
class Broken(Exception):
    """An entry is not the one that was recorded, or is missing.

    Attributes:
        message: What is wrong.
        index: The entry.
        torn: Whether it looks like the end of a write that never completed.
        offset: Where its record starts in its file.
    """

    message: str
    index: int
    torn: bool = False
    offset: int = 0

    def __str__(self) -> str:
        """What is wrong."""
        return self.message


def path_of(directory: Path, first_index: int) -> Path:
    """Return the path of the file that starts at *first_index*."""
    return directory / f"wal-{first_index:020d}"


def first_indexes(directory: Path) -> list[int]:
    """Return the first index of each file in *directory*, ascending."""
    names = (_NAME.fullmatch(name) for name in os.listdir(directory))  # noqa: PTH208 -- names, not paths
    return sorted(int(match[1]) for match in names if match)


def compose(entry: bytes, leaf: bytes) -> bytes:
    """Return the record of *entry*, whose leaf hash is *leaf*."""
    length = len(entry)
    header = length.to_bytes(_LENGTH_BYTES, "big") + (MAX_ENTRY_BYTES - length).to_bytes(_LENGTH_BYTES, "big")
    return header + entry + leaf


def walk(directory: Path, first_index: int) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield index, entry and leaf hash of each record of a file, checked.

    Raises:
        Broken: at the first that is not whole.
    """
    data = path_of(directory, first_index).read_bytes()
    index, offset = first_index, 0
    while offset < len(data):
        entry, leaf = _record(data, offset, index)
        yield index, entry, leaf
        offset += _HEADER_BYTES + len(entry) + HASH_BYTES
        index += 1


def _record(data: bytes, offset: int, index: int) -> tuple[bytes, bytes]:
    header = data[offset : offset + _HEADER_BYTES]
    if len(header) < _HEADER_BYTES or not any(header):
        # Cut within the header; or the file had grown and its bytes had not arrived.
        raise Broken(f"entry {index} was not written to its end", index, torn=True, offset=offset)
    length = int.from_bytes(header[:_LENGTH_BYTES], "big")
    if length + int.from_bytes(header[_LENGTH_BYTES:], "big") != MAX_ENTRY_BYTES:
        raise Broken(f"entry {index} is not the one that was recorded", index, offset=offset)
    start = offset + _HEADER_BYTES
    entry, leaf = data[start : start + length], data[start + length : start + length + HASH_BYTES]
    if len(leaf) < HASH_BYTES:
        raise Broken(f"entry {index} was not written to its end", index, torn=True, offset=offset)
    if leaf_hash(entry) != leaf:
        # No entry holds a NUL, so one with NULs had pages that never arrived.
        torn = b"\0" in entry or not any(leaf)
        raise Broken(f"entry {index} is not the one that was recorded", index, torn=torn, offset=offset)
    return entry, leaf
