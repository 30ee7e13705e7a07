"""The tiles and bundles of the log on disk: written whole, durable, and never changed."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from hayflick_logger.directory import sync
from hayflick_tlog.edge import Edge
from hayflick_tlog.merkle import root_of
from hayflick_tlog.tiles import HEIGHT, WIDTH, Tile, split_bundle, split_tile

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


class TileFiles:
    """The files below one directory, which is a C2SP tlog-tiles log that any web server may serve."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(mode=0o700, exist_ok=True)

    def read(self, path: str) -> bytes:
        """Return the bytes of the file at *path*.

        Raises:
            OSError: there is none.
        """
        return (self.directory / path).read_bytes()

    def bundle(self, index: int) -> list[bytes]:
        """Return the entries of a whole bundle.

        Raises:
            OSError, BadTile: it cannot be read.
        """
        return split_bundle(self.read(Tile(None, index).path), WIDTH)

    def hashes(self, level: int, index: int) -> list[bytes]:
        """Return the hashes of a whole tile.

        Raises:
            OSError, BadTile: it cannot be read.
        """
        return split_tile(self.read(Tile(level, index).path), WIDTH)

    def write(self, files: Iterable[tuple[str, bytes]], *, durable: bool) -> None:
        """Write each file under a name of its own, then give it its name; with *durable*, sync them all.

        Raises:
            OSError: the disk refused; what was written before stays.
        """
        parents: set[Path] = set()
        for path, data in files:
            target = self.directory / path
            if not target.parent.exists():
                self._make(target.parent, parents)
            fresh = target.with_name(target.name + ".new")
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(descriptor, view) :]
                if durable:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
            fresh.rename(target)
            parents.add(target.parent)
        if durable:
            for parent in parents:
                sync(parent)

    def drop_partial(self, tile: Tile) -> None:
        """Remove the partial forms of a tile or bundle that is whole now."""
        shutil.rmtree(self.directory / f"{tile.path}.p", ignore_errors=True)

    def whole_bundles(self) -> int:
        """Return how many bundles, from the first on, are there whole with their hash tiles."""
        low, high = 0, 1
        while self._has(high - 1):
            low, high = high, high * 2
        while low < high:  # the first that is missing lies in between
            middle = (low + high) // 2
            if self._has(middle):
                low = middle + 1
            else:
                high = middle
        return low

    def edge(self, bundles: int) -> Edge:
        """Return the edge of the tree over the first *bundles* whole bundles, from their tiles.

        Raises:
            OSError, BadTile: a tile cannot be read.
        """
        size, levels = bundles * WIDTH, []
        level = 0
        while size >> (HEIGHT * level):
            count = (size >> (HEIGHT * level)) % WIDTH
            first = (size >> (HEIGHT * level)) - count
            below = range(first, first + count) if level else range(0)
            levels.append(tuple(root_of(self.hashes(level - 1, index)) for index in below))
            level += 1
        return Edge(size, tuple(levels))

    def _has(self, bundle: int) -> bool:
        return all((self.directory / Tile(level, bundle).path).exists() for level in (None, 0))

    def _make(self, directory: Path, parents: set[Path]) -> None:
        if directory.exists():
            return
        self._make(directory.parent, parents)
        directory.mkdir(mode=0o700)
        parents.add(directory.parent)
