"""The files of a log as C2SP tlog-tiles lays them out: their paths, hash tiles and entry bundles.

Pure. A tile holds up to 256 hashes of one level of *tiles*: those of level 0
are leaf hashes, those of level 1 the roots of whole tiles of level 0, and so
on. A bundle holds the entries of one tile of level 0, each behind its length.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from hayflick_tlog.merkle import HASH_BYTES

HEIGHT = 8
WIDTH = 1 << HEIGHT
MAX_ENTRY_BYTES = 2**16 - 1
# 2**48 entries; nothing will ever be there, so nobody may ask for it.
MAX_LEVEL = 5
MAX_INDEX = 2**40

_LENGTH_BYTES = 2
_PATH = re.compile(r"tile/(entries|[0-5])/((?:x\d{3}/){0,4}\d{3})(?:\.p/([1-9]\d{0,2}))?", re.ASCII)


class BadTile(Exception):
    """Bytes that are no tile or bundle, or a path that names none."""


@dataclass(frozen=True)
class Tile:
    """Names one tile or bundle.

    Attributes:
        level: Of the hashes; ``None`` for a bundle of entries.
        index: Its place among those of its level.
        width: How many hashes or entries it holds; below 256 it is partial.
    """

    level: int | None
    index: int
    width: int = WIDTH

    @property
    def path(self) -> str:
        """Where it lies, relative to the log's directory or URL."""
        digits, rest = f"{self.index % 1000:03d}", self.index // 1000
        while rest:
            digits, rest = f"x{rest % 1000:03d}/{digits}", rest // 1000
        kind = "entries" if self.level is None else str(self.level)
        return f"tile/{kind}/{digits}" + (f".p/{self.width}" if self.width < WIDTH else "")


def parse_path(path: str) -> Tile:
    """Return what *path* names.

    Raises:
        BadTile: nothing.
    """
    match = _PATH.fullmatch(path)
    if match is None:
        raise BadTile(f"{path[:64]!r} is no path of a tile")
    kind, digits, width = match.groups()
    index = int(digits.replace("x", "").replace("/", ""))
    tile = Tile(None if kind == "entries" else int(kind), index, int(width or WIDTH))
    # One spelling each: without leading zero groups, and partial only below the full width.
    if tile.path != path or index > MAX_INDEX:
        raise BadTile(f"{path[:64]!r} is no path of a tile")
    return tile


def split_tile(data: bytes, width: int) -> list[bytes]:
    """Return the hashes in a tile.

    Raises:
        BadTile: it does not hold *width* hashes.
    """
    if len(data) != width * HASH_BYTES:
        raise BadTile(f"a tile of {width} hashes has {width * HASH_BYTES} bytes, not {len(data)}")
    return [data[at : at + HASH_BYTES] for at in range(0, len(data), HASH_BYTES)]


def join_bundle(entries: Iterable[bytes]) -> bytes:
    """Return *entries* as a bundle; each has at most MAX_ENTRY_BYTES."""
    return b"".join(len(entry).to_bytes(_LENGTH_BYTES, "big") + entry for entry in entries)


def split_bundle(data: bytes, width: int) -> list[bytes]:
    """Return the entries in a bundle.

    Raises:
        BadTile: it does not hold *width* entries and nothing else.
    """
    entries: list[bytes] = []
    at = 0
    for _ in range(width):
        end = at + _LENGTH_BYTES + int.from_bytes(data[at : at + _LENGTH_BYTES], "big")
        if at + _LENGTH_BYTES > len(data) or end > len(data):
            raise BadTile(f"a bundle ends within entry {len(entries)} of {width}")
        entries.append(data[at + _LENGTH_BYTES : end])
        at = end
    if at != len(data):
        raise BadTile(f"a bundle has {len(data) - at} bytes behind its {width} entries")
    return entries
