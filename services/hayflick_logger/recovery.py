"""What a record's files prove when the logger starts: how far it reaches, and that nothing was changed."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_logger import wal
from hayflick_rpc.errors import HayflickError
from hayflick_tlog.checkpoint import Checkpoint
from hayflick_tlog.edge import Edge
from hayflick_tlog.merkle import leaf_hash
from hayflick_tlog.note import BadNote
from hayflick_tlog.tiles import WIDTH, BadTile

if TYPE_CHECKING:
    from pathlib import Path

    from hayflick_logger.files import TileFiles
    from hayflick_tlog.note import Verifier

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Witness:
    """What the index remembers of the record: it was written after the entries were durable.

    Attributes:
        first_hash: The leaf hash of entry 0, by which a record is told from another.
        size: How many entries there were, at least.
        root: The root over them.
    """

    first_hash: bytes
    size: int
    root: bytes


@dataclass(frozen=True)
class Found:
    """What the files prove.

    Attributes:
        edge: The tree over all entries.
        tiled: How many of them are in whole tiles.
        entries: The others.
        healed_bytes: How much of a torn write was removed.
        segment: The write-ahead file to go on with, by its first index.
    """

    edge: Edge
    tiled: int
    entries: tuple[bytes, ...]
    healed_bytes: int
    segment: int


def recover(
    directory: Path,
    files: TileFiles,
    checkpoint: Checkpoint | None,
    witness: Witness | None,
    *,
    check_all: bool,
) -> Found:
    """Read the record in *directory*, and remove the torn end of a write that was never acknowledged.

    Args:
        directory: Where the write-ahead files are.
        files: The tiles.
        checkpoint: The last that was published; the record must still hold all of it.
        witness: What the index knows.
        check_all: Compare every entry with its hash, and not just the newest.

    Raises:
        HayflickError: JOURNAL_CORRUPT, naming the index.
    """
    bundles = files.whole_bundles()
    firsts = wal.first_indexes(directory)
    if witness is not None and _first_hash(directory, files, bundles, firsts) not in (
        None,
        witness.first_hash,
    ):
        log.warning("the index is another record's; it will be built anew")
        witness = None
    known = max(checkpoint.size if checkpoint else 0, witness.size if witness else 0)
    try:
        edge = _checked(files, bundles) if check_all else files.edge(bundles)
    except (OSError, BadTile) as error:
        raise corrupt(f"the tiles cannot be read back: {error}", -1) from error
    tiled = edge.size
    marks = _Marks(checkpoint, witness)
    if check_all:
        marks.passed(files, edge)
    entries: list[bytes] = []
    healed_bytes = reached = 0
    for first in firsts:
        if first > edge.size:
            raise corrupt(f"entry {edge.size} is missing", edge.size)
        try:
            reached = first
            for index, entry, leaf in wal.walk(directory, first):
                reached = index + 1
                if index < edge.size:
                    continue  # in tiles already
                entries.append(entry)
                edge, _ = edge.grown([leaf])
                marks.check(edge)
        except wal.Broken as broken:
            if not broken.torn or broken.index < known or first != firsts[-1]:
                raise corrupt(str(broken), broken.index) from broken
            healed_bytes = _cut(wal.path_of(directory, first), broken.offset)
            log.warning("removed %d bytes of a torn write after entry %d", healed_bytes, broken.index - 1)
    marks.require(edge)
    segment = firsts[-1] if firsts and reached == edge.size else edge.size
    return Found(edge, tiled, tuple(entries), healed_bytes, segment)


def _first_hash(directory: Path, files: TileFiles, bundles: int, firsts: list[int]) -> bytes | None:
    """Return the leaf hash of entry 0, where one can be read."""
    try:
        if bundles:
            return files.hashes(0, 0)[0]
        _, _, leaf = next(wal.walk(directory, firsts[0]))
    except (OSError, BadTile, wal.Broken, IndexError, StopIteration):
        return None
    return leaf


class _Marks:
    """The trees that the record must have been, by whoever vouches for each."""

    def __init__(self, checkpoint: Checkpoint | None, witness: Witness | None) -> None:
        self._roots: dict[int, bytes] = {}
        if checkpoint is not None:
            self._roots[checkpoint.size] = checkpoint.root
        if witness is not None and (checkpoint is None or witness.size != checkpoint.size):
            self._roots[witness.size] = witness.root
        self._highest = max(self._roots, default=0)

    def passed(self, files: TileFiles, edge: Edge) -> None:
        """Compare those within the tiles."""
        for size in [size for size in self._roots if 0 < size < edge.size]:
            start = size // WIDTH * WIDTH
            older = files.edge(start // WIDTH)
            if size > start:
                older, _ = older.grown(files.hashes(0, start // WIDTH)[: size - start])
            self.check(older)
        self.check(edge)

    def check(self, edge: Edge) -> None:
        """Compare *edge*, when somebody vouches for its size."""
        expected = self._roots.get(edge.size)
        if expected is not None and expected != edge.root:
            raise corrupt(f"the first {edge.size} entries are not those that were signed", edge.size - 1)

    def require(self, edge: Edge) -> None:
        """Refuse a record that ends too early."""
        if self._highest > edge.size:
            raise corrupt(
                f"{self._highest} entries were recorded and {edge.size} are there; if those are lost for"
                " good, begin a record in another directory and keep this one as it is",
                edge.size,
            )


def _checked(files: TileFiles, bundles: int) -> Edge:
    """Return the edge over *bundles*, each entry compared with its hash, each tile with those below it."""
    edge = Edge()
    for index in range(bundles):
        hashes = [leaf_hash(entry) for entry in files.bundle(index)]
        stated = files.hashes(0, index)
        if hashes != stated:
            at = next(at for at in range(WIDTH) if hashes[at] != stated[at])
            bad = index * WIDTH + at
            raise corrupt(f"entry {bad} is not the one that was recorded", bad)
        edge, whole = edge.grown(hashes)
        for tile, data in whole[1:]:
            if files.read(tile.path) != data:
                raise corrupt(f"{tile.path} is not the tile that was written", index * WIDTH)
    return edge


def open_checkpoint(note: str, verifier: Verifier) -> Checkpoint:
    """Return the checkpoint in *note*.

    Raises:
        HayflickError: JOURNAL_CORRUPT: this record's key did not sign it.
    """
    try:
        return Checkpoint.open(note, verifier)
    except BadNote as error:
        raise corrupt(f"the checkpoint is not this record's: {error}", -1) from error


def corrupt(message: str, index: int) -> HayflickError:
    """Return the error for a record that was changed, at *index* when it is known (not negative)."""
    return HayflickError(
        ErrorReason.ERROR_REASON_JOURNAL_CORRUPT,
        message,
        metadata={"index": str(index)} if index >= 0 else {},
    )


def _cut(path: Path, size_bytes: int) -> int:
    """Cut the file at *path* down to *size_bytes*; return how many bytes went."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        gone = os.fstat(descriptor).st_size - size_bytes
        os.ftruncate(descriptor, size_bytes)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return gone
