"""The record: entries that are durable when acknowledged, and the signed tree over them.

The newest entries lie in a write-ahead file; from there they move, 256 at a
time and on a thread of their own, to the bundles and hash tiles of a C2SP
tlog-tiles log. One thread appends (the recorder's); any may read. An append is
one write and one ``fdatasync``, however many entries it holds. When either
fails, the file is cut back to the last byte that was durable, the entries are
refused, and the next append tries anew: a full disk stops decisions, not the
logger.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_logger import entries, recovery, wal
from hayflick_logger.directory import sync
from hayflick_logger.files import TileFiles
from hayflick_logger.keys import load_signer
from hayflick_rpc.errors import HayflickError
from hayflick_tlog.checkpoint import Checkpoint
from hayflick_tlog.edge import Edge
from hayflick_tlog.merkle import leaf_hash, root, root_of
from hayflick_tlog.tiles import HEIGHT, WIDTH, BadTile, Tile, join_bundle, parse_path
from hayflick_tlog.verify import Finding, verify_log

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from hayflick_logger.recovery import Witness

CHECKPOINT = "checkpoint"
# How many entries wait for their tiles before some are made.
TILE_ENTRIES = 8 * WIDTH
# Entries are kept in memory until they are in tiles; when those cannot be
# written, appending stops here.
MAX_UNTILED_ENTRIES = 64 * WIDTH
MAX_UNTILED_BYTES = 64 * 1024 * 1024

log = logging.getLogger(__name__)


class Draft(NamedTuple):
    """An event that has no place in the record yet."""

    source: str
    sequence: int
    event: bytes


@dataclass(frozen=True)
class _Tail:
    """What is durable and where; swapped as one, so that readers see one moment.

    Attributes:
        edge: The tree over all entries.
        tiled: How many of them are in whole tiles on disk.
        entries: The others, with their hashes.
    """

    edge: Edge
    tiled: int
    entries: tuple[bytes, ...]


class Journal:
    """The files in one directory.

    Args:
        directory: Claimed by this process; see ``directory.py``.
        origin: The log's name, when it is made anew; made up when empty.
        max_segment_bytes: Size from which on a new write-ahead file is begun.
        check_all: Verify every entry now, and not just the newest.
        witness: What the index knows to be in the record.

    Raises:
        HayflickError: JOURNAL_CORRUPT, naming the index, when an entry is not
            the one that was recorded and not merely the torn end of a write
            that was never acknowledged, or when the record ends before its
            checkpoint or its witness says.
        OSError: the files cannot be read or made.
    """

    def __init__(
        self,
        directory: Path,
        *,
        origin: str = "",
        max_segment_bytes: int,
        check_all: bool = True,
        witness: Witness | None = None,
    ) -> None:
        self.directory = directory
        self.files = TileFiles(directory / "log")
        self.signer = load_signer(directory, origin)
        self._max_segment_bytes = max_segment_bytes
        found = recovery.recover(directory, self.files, self._published(), witness, check_all=check_all)
        self.healed_bytes = found.healed_bytes
        self._tail = _Tail(found.edge, found.tiled, found.entries)
        self._untiled_bytes = sum(map(len, found.entries))
        self._lock = threading.Lock()  # held to swap the tail
        self._published_size = -1
        self._tiler = ThreadPoolExecutor(1, "tiler")
        self._tiling: Future[None] | None = None
        self._descriptor = -1
        self._size_bytes = 0
        self._dirty = False
        self._open_segment(found.segment)

    @property
    def edge(self) -> Edge:
        """The tree over all that is durable."""
        return self._tail.edge

    @property
    def published(self) -> bool:
        """Whether the checkpoint on disk covers all that is durable."""
        return self._published_size == self.next_index

    @property
    def next_index(self) -> int:
        """The index of the entry that will come next."""
        return self._tail.edge.size

    def close(self) -> None:
        """Publish, and close the file that grows."""
        try:
            self.publish()
        except OSError as error:
            log.warning("the checkpoint on disk stays behind: %s", error)
        self._tiler.shutdown()
        os.close(self._descriptor)
        self._descriptor = -1

    # Writing

    def append(self, drafts: Sequence[Draft]) -> list[tuple[int, bytes]]:
        """Make *drafts* durable; return the index and the entry of each.

        Raises:
            HayflickError: AUDIT_UNAVAILABLE: none of them is in the record.
        """
        if not drafts:
            return []
        first = self.next_index
        composed = [
            entries.compose(first + at, draft.source, draft.sequence, draft.event)
            for at, draft in enumerate(drafts)
        ]
        leaves = [leaf_hash(entry) for entry in composed]
        data = b"".join(map(wal.compose, composed, leaves))
        try:
            self._require_tiles()
            self._cut_back()
            if self._size_bytes >= self._max_segment_bytes:
                self._open_segment(first)
            self._dirty = True
            _write_all(self._descriptor, data)
            os.fdatasync(self._descriptor)
        except OSError as error:
            with contextlib.suppress(OSError):  # if it fails now, the next append does it first
                self._cut_back()
            name = errno.errorcode.get(error.errno or 0, "unknown")
            log.error("cannot append: %s", error)  # noqa: TRY400 -- the errno says it all
            raise HayflickError(
                ErrorReason.ERROR_REASON_AUDIT_UNAVAILABLE,
                f"the record cannot be written: {name}",
                metadata={"errno": name},
                retry_after_seconds=1.0,
            ) from error
        self._dirty = False
        self._size_bytes += len(data)
        with self._lock:
            tail = self._tail
            edge, _ = tail.edge.grown(leaves)
            self._tail = _Tail(edge, tail.tiled, (*tail.entries, *composed))
            self._untiled_bytes += sum(map(len, composed))
        self._tile_when_due()
        return [(first + at, entry) for at, entry in enumerate(composed)]

    def publish(self) -> None:
        """Write the partial tiles and a signed checkpoint, when there is something new.

        Raises:
            OSError: the disk refused.
        """
        if self.published:
            return
        # What fills a bundle is written once, durable, and never as a partial one.
        while len(self._tail.entries) >= WIDTH:
            if self._tiling is None or self._tiling.done():
                self._tiling = self._tiler.submit(self._tile)
            self._tiling.result()
        tail = self._tail
        files = [(tile.path, data) for tile, data in tail.edge.partial()]
        if tail.entries:
            bundle = Tile(None, tail.tiled // WIDTH, len(tail.entries))
            files.append((bundle.path, join_bundle(tail.entries)))
        self.files.write(files, durable=False)
        # Durable, for it bears witness: a record that ends before it was cut.
        self.files.write([(CHECKPOINT, self.sign(tail.edge).encode())], durable=True)
        self._published_size = tail.edge.size

    def sign(self, edge: Edge) -> str:
        """Return the signed checkpoint of *edge*."""
        return Checkpoint(self.signer.name, edge.size, edge.root).sign(self.signer)

    def _tile_when_due(self) -> None:
        tail = self._tail
        due = tail.edge.size - tail.tiled >= TILE_ENTRIES or self._untiled_bytes >= MAX_UNTILED_BYTES // 4
        if due and (self._tiling is None or self._tiling.done()):
            self._tiling = self._tiler.submit(self._tile)

    def _require_tiles(self) -> None:
        """Refuse to grow what waits for tiles without end."""
        tail = self._tail
        if (
            tail.edge.size - tail.tiled < MAX_UNTILED_ENTRIES and self._untiled_bytes < MAX_UNTILED_BYTES
        ) or self._tiling is None:
            return
        self._tiling.result()  # raises what the disk said
        self._tile_when_due()

    def _tile(self) -> None:
        """Move what fills whole bundles from the tail to tiles; drop the write-ahead files that held it."""
        tail = self._tail
        whole = tail.edge.size // WIDTH * WIDTH - tail.tiled
        edge = self.files.edge(tail.tiled // WIDTH)
        some = tail.entries[:whole]
        _, tiles = edge.grown(map(leaf_hash, some))
        bundles = [
            (Tile(None, (tail.tiled + start) // WIDTH).path, join_bundle(some[start : start + WIDTH]))
            for start in range(0, whole, WIDTH)
        ]
        # Those of level 0 last, when the rest is durable: a bundle counts once its hashes are there.
        lowest = [(tile.path, data) for tile, data in tiles if not tile.level]
        above = [(tile.path, data) for tile, data in tiles if tile.level]
        self.files.write([*bundles, *above], durable=True)
        self.files.write(lowest, durable=True)
        with self._lock:
            now = self._tail
            self._tail = _Tail(now.edge, tail.tiled + whole, now.entries[whole:])
            self._untiled_bytes -= sum(map(len, some))
        self._drop_segments(tail.tiled + whole)
        for start in range(tail.tiled, tail.tiled + whole, WIDTH):
            for level in (None, 0):
                self.files.drop_partial(Tile(level, start // WIDTH))
        for tile, _ in tiles:
            self.files.drop_partial(tile)

    def _drop_segments(self, tiled: int) -> None:
        firsts = wal.first_indexes(self.directory)
        for first, following in pairwise(firsts):
            if following <= tiled:
                wal.path_of(self.directory, first).unlink()

    def _open_segment(self, first: int) -> None:
        """Make *first* the file that grows; a new name is durable before it is used."""
        path = wal.path_of(self.directory, first)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o600)
        try:
            size_bytes = os.fstat(descriptor).st_size
            sync(self.directory)
        except OSError:
            os.close(descriptor)
            raise
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = descriptor
        self._size_bytes = size_bytes

    def _cut_back(self) -> None:
        """Remove what a failed append left behind the last durable byte."""
        if self._dirty:
            os.ftruncate(self._descriptor, self._size_bytes)
            os.fdatasync(self._descriptor)
            self._dirty = False

    # Reading

    def read(self, indexes: Sequence[int]) -> list[bytes]:
        """Return the entries at *indexes*, ascending, from any thread.

        Raises:
            HayflickError: JOURNAL_CORRUPT when the files no longer hold them.
        """
        tail = self._tail
        bundle: tuple[int, list[bytes]] = (-1, [])
        found = []
        for index in indexes:
            if index >= tail.tiled:
                found.append(tail.entries[index - tail.tiled])
                continue
            if bundle[0] != index // WIDTH:
                try:
                    bundle = index // WIDTH, self.files.bundle(index // WIDTH)
                except (OSError, BadTile) as error:
                    raise recovery.corrupt(f"the record cannot be read back: {error}", index) from error
            found.append(bundle[1][index % WIDTH])
        return found

    def entries(self, start: int) -> Iterator[tuple[int, bytes]]:
        """Yield index and entry from *start* on, as far as the record reached when this was called.

        Raises:
            HayflickError: JOURNAL_CORRUPT when the files no longer hold them.
        """
        end = self.next_index
        for first in range(start, end, WIDTH):
            indexes = range(first, min(first + WIDTH, end))
            yield from zip(indexes, self.read(indexes), strict=True)

    def tile(self, tile: Tile) -> bytes | None:
        """Return the bytes of a tile or bundle of what is durable; ``None`` when there is none yet.

        Raises:
            OSError, BadTile: it cannot be read back.
        """
        tail = self._tail
        leaves = 1 << (HEIGHT * ((tile.level or 0) + 1))  # that a whole tile covers
        end = tile.index * leaves + tile.width * (leaves // WIDTH)
        if end > tail.edge.size:
            return None
        if tile.level is None:
            first = tile.index * WIDTH
            return join_bundle(self.read(range(first, first + tile.width)))
        return b"".join(self._hashes(tail, tile.level, tile.index)[: tile.width])

    def subtree(self, level: int, index: int) -> bytes:
        """Return the hash of a complete subtree of what is durable; see :mod:`hayflick_tlog.merkle`.

        Raises:
            OSError, BadTile: a tile cannot be read back.
        """
        tiles_level, inner = divmod(level, HEIGHT)
        first = index << inner  # in hashes of that tile level
        hashes = self._hashes(self._tail, tiles_level, first >> HEIGHT)
        start = first % WIDTH
        return root_of(hashes[start : start + (1 << inner)])

    def root(self, size: int) -> bytes:
        """Return the root over the first *size* entries."""
        edge = self._tail.edge
        return edge.root if size == edge.size else root(size, self.subtree)

    def verify(self) -> Finding:
        """Recompute the tree over everything, from any thread."""

        def read(path: str) -> bytes:
            try:
                return self.files.read(path)
            except FileNotFoundError:
                # Not on disk yet, or only under another width: from what is durable.
                if (data := self.tile(parse_path(path))) is None:
                    raise
                return data

        tail = self._tail
        finding = verify_log(read, self.sign(tail.edge), self.signer.verifier)
        broken = self._broken_tail(tail)
        if broken is None or not finding.intact:
            return finding
        return replace(finding, intact=False, first_bad_index=broken.index, detail=str(broken))

    def _broken_tail(self, tail: _Tail) -> wal.Broken | None:
        """Compare the write-ahead files with what they were written from."""
        for first in wal.first_indexes(self.directory):
            try:
                for index, entry, _ in wal.walk(self.directory, first):
                    if index >= tail.edge.size:
                        break  # it is being written just now
                    if index >= tail.tiled and entry != tail.entries[index - tail.tiled]:
                        return wal.Broken(f"entry {index} is not the one that was recorded", index)
            except FileNotFoundError:
                continue  # in tiles since
            except wal.Broken as broken:
                if broken.index < tail.edge.size:
                    return broken
        return None

    def _hashes(self, tail: _Tail, level: int, index: int) -> Sequence[bytes]:
        if (partial := tail.edge.hashes(Tile(level, index))) is not None:
            return partial
        if level == 0 and (index + 1) * WIDTH > tail.tiled:  # whole, and not on disk yet
            start = index * WIDTH - tail.tiled
            return [leaf_hash(entry) for entry in tail.entries[start : start + WIDTH]]
        try:
            return self.files.hashes(level, index)
        except FileNotFoundError:
            return [root_of(self._hashes(tail, level - 1, index * WIDTH + at)) for at in range(WIDTH)]

    def _published(self) -> Checkpoint | None:
        try:
            note = self.files.read(CHECKPOINT).decode()
        except FileNotFoundError:
            return None
        return recovery.open_checkpoint(note, self.signer.verifier)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
