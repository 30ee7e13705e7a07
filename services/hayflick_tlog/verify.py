"""Verifying a whole log that somebody else kept, with nothing but its files and a public key.

The files are read by a function that takes a path and returns bytes, so that
a directory, a web server and a running logger are verified alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from hayflick_tlog.checkpoint import Checkpoint
from hayflick_tlog.edge import Edge
from hayflick_tlog.merkle import leaf_hash, root_of
from hayflick_tlog.note import Verifier
from hayflick_tlog.tiles import WIDTH, BadTile, Tile, split_bundle, split_tile

Read = Callable[[str], bytes]
"""Returns the bytes of the file at a path below the log's directory; raises OSError when there is none."""


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        checkpoint: What was signed.
        intact: Whether the entries are the ones that were signed.
        first_bad_index: The first entry that is not; ``None`` when all are.
        detail: What is wrong, for people; empty when nothing is. With intact entries
            it is a hash tile, from which others would make proofs that fail.
    """

    checkpoint: Checkpoint
    intact: bool
    first_bad_index: int | None = None
    detail: str = ""


def verify_log(
    read: Read, note: str, verifier: Verifier, *, on_entry: Callable[[int, bytes], None] | None = None
) -> Finding:
    """Recompute the tree over every entry and compare it with the checkpoint in *note*.

    Args:
        read: The log's files.
        note: The signed checkpoint.
        verifier: The log's public key.
        on_entry: Called with each index and entry up to the first that is bad.

    Raises:
        BadNote: the key did not sign the checkpoint.
    """
    checkpoint = Checkpoint.open(note, verifier)
    entries, tiles = Edge(), Edge()
    suspect: tuple[int, str] | None = None
    damaged = ""
    for start in range(0, checkpoint.size, WIDTH):
        block = _Block.read(read, start, min(WIDTH, checkpoint.size - start))
        suspect = suspect or block.suspect()
        if suspect is None:
            entries, whole = entries.grown(block.hashes)
            damaged = damaged or _damaged(read, whole)
            block.show(on_entry)
        # The tree over what the tiles state goes on behind a bad entry: it tells
        # whether the tile or the entry was changed.
        if block.stated is not None and tiles.size == start:
            tiles, _ = tiles.grown(block.stated)
    if suspect is None and entries.root == checkpoint.root:
        damaged = damaged or _damaged(read, entries.partial())
        return Finding(checkpoint, intact=True, detail=damaged)
    if suspect is None:
        suspect = _by_higher_tiles(read, checkpoint), "entries and their tiles were changed alike"
    elif tiles.root != checkpoint.root and _entries_root(read, checkpoint.size) == checkpoint.root:
        detail = f"the entries are intact; the hash tile of entry {suspect[0]} was changed"
        return Finding(checkpoint, intact=True, detail=detail)
    return Finding(checkpoint, intact=False, first_bad_index=suspect[0], detail=suspect[1])


def _damaged(read: Read, tiles: Iterable[tuple[Tile, bytes]]) -> str:
    """Return what is wrong with the first of *tiles* that does not read as it must; empty when none is."""
    for tile, expected in tiles:
        try:
            if _read(read, tile) == expected:
                continue
            what = "was changed"
        except (OSError, BadTile):
            what = "cannot be read"
        return f"the entries are intact; the hash tile {tile.path} {what}"
    return ""


@dataclass(frozen=True)
class _Block:
    """The entries of one tile of level 0, and the hashes that the tile states for them.

    Attributes:
        start: The index of the first.
        width: How many there must be.
        entries: Those that could be read, from the first on.
        wrong: Why that is not all; empty when it is.
        stated: ``None`` when the tile cannot be read.
    """

    start: int
    width: int
    entries: list[bytes]
    wrong: str
    stated: list[bytes] | None

    @classmethod
    def read(cls, read: Read, start: int, width: int) -> _Block:
        """Read the block that begins at *start*."""
        entries, wrong = _bundle(read, start // WIDTH, width)
        try:
            stated = split_tile(_read(read, Tile(0, start // WIDTH, width)), width)
        except (OSError, BadTile):
            stated = None
        return cls(start, width, entries, wrong, stated)

    @property
    def hashes(self) -> list[bytes]:
        """The leaf hashes of the entries that could be read."""
        return [leaf_hash(entry) for entry in self.entries]

    def show(self, on_entry: Callable[[int, bytes], None] | None) -> None:
        """Tell each entry, where somebody wants to hear it."""
        if on_entry is not None:
            for index, entry in enumerate(self.entries, self.start):
                on_entry(index, entry)

    def suspect(self) -> tuple[int, str] | None:
        """Return the first entry that does not agree with the tile, and why."""
        for at, (one, other) in enumerate(zip(self.hashes, self.stated or [], strict=False)):
            if one != other:
                return self.start + at, f"entry {self.start + at} is not the one that was recorded"
        return (self.start + len(self.entries), self.wrong) if self.wrong else None


def entries_of(read: Read, size: int, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield the entries from *start* up to *size*, unverified.

    Raises:
        OSError, BadTile: a bundle cannot be read.
    """
    for first in range(start - start % WIDTH, size, WIDTH):
        width = min(WIDTH, size - first)
        for at, entry in enumerate(split_bundle(_read(read, Tile(None, first // WIDTH, width)), width)):
            if first + at >= start:
                yield first + at, entry


def _read(read: Read, tile: Tile) -> bytes:
    """Return a tile or bundle; a whole or a wider one may have taken a partial one's place since."""
    try:
        return read(tile.path)
    except OSError as error:
        missing = error
    for width in (WIDTH, *range(tile.width + 1, WIDTH)):
        try:
            wider = read(Tile(tile.level, tile.index, width).path)
        except OSError:
            continue
        if tile.level is not None:
            return b"".join(split_tile(wider, width)[: tile.width])
        return _cut(wider, tile.width)
    raise missing


def _cut(bundle: bytes, width: int) -> bytes:
    at = 0
    for _ in range(width):
        at += 2 + int.from_bytes(bundle[at : at + 2], "big")
    return bundle[:at]


def _bundle(read: Read, index: int, width: int) -> tuple[list[bytes], str]:
    """Return the entries of a bundle, and what is wrong with it; damage keeps those before it."""
    try:
        data = _read(read, Tile(None, index, width))
    except OSError as error:
        return [], f"bundle {index} cannot be read: {error}"
    try:
        return split_bundle(data, width), ""
    except BadTile as error:
        for shorter in range(width - 1, 0, -1):
            try:
                return split_bundle(_cut(data, shorter), shorter), str(error)
            except BadTile:
                continue
        return [], str(error)


def _entries_root(read: Read, size: int) -> bytes | None:
    """Return the root over the entries alone; ``None`` when one cannot be read."""
    edge = Edge()
    try:
        for _, entry in entries_of(read, size):
            edge, _ = edge.grown([leaf_hash(entry)])
    except (OSError, BadTile):
        return None
    return edge.root


def _by_higher_tiles(read: Read, checkpoint: Checkpoint) -> int:
    """Return the first entry of the first 256 whose hash the next level up does not know."""
    for start in range(0, checkpoint.size - WIDTH + 1, WIDTH):
        index = start // WIDTH
        try:
            width = min(WIDTH, checkpoint.size // WIDTH - index // WIDTH * WIDTH)
            above = split_tile(_read(read, Tile(1, index // WIDTH, width)), width)
            below = split_tile(_read(read, Tile(0, index)), WIDTH)
        except (OSError, BadTile):
            return start
        if root_of(below) != above[index % WIDTH]:
            return start
    return checkpoint.size - checkpoint.size % WIDTH
