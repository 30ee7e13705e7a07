"""The growing end of a tree: the hashes that are not yet in a whole tile.

Pure. What lies before the edge is in whole tiles, which never change.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hayflick_tlog.merkle import root_of
from hayflick_tlog.tiles import HEIGHT, WIDTH, Tile


@dataclass(frozen=True)
class Edge:
    """A tree as it is at one moment. Growing it makes another.

    Attributes:
        size: How many leaves the tree has.
        levels: The hashes of the last, partial tile of each level, from level 0 up.
    """

    size: int = 0
    levels: tuple[tuple[bytes, ...], ...] = ()

    def grown(self, leaves: Iterable[bytes]) -> tuple[Edge, list[tuple[Tile, bytes]]]:
        """Return the edge with *leaves* behind it, and the tiles that they made whole, lowest first."""
        levels = [list(level) for level in self.levels]
        size = self.size
        whole: list[tuple[Tile, bytes]] = []
        for leaf in leaves:
            size += 1
            carried, level = leaf, 0
            while True:
                if level == len(levels):
                    levels.append([])
                levels[level].append(carried)
                if len(levels[level]) < WIDTH:
                    break
                tile = Tile(level, (size >> (HEIGHT * (level + 1))) - 1)
                whole.append((tile, b"".join(levels[level])))
                carried = root_of(levels[level])
                levels[level] = []
                level += 1
        return Edge(size, tuple(map(tuple, levels))), whole

    @property
    def root(self) -> bytes:
        """The hash over all leaves."""
        reached: list[bytes] = []
        for level in self.levels:
            hashes = [*level, *reached]
            reached = [root_of(hashes)] if hashes else []
        return reached[0] if reached else root_of(())

    def partial(self) -> list[tuple[Tile, bytes]]:
        """Return the partial tiles, lowest first."""
        return [
            (Tile(level, self.size >> (HEIGHT * (level + 1)), len(hashes)), b"".join(hashes))
            for level, hashes in enumerate(self.levels)
            if hashes
        ]

    def hashes(self, tile: Tile) -> Sequence[bytes] | None:
        """Return the hashes of a partial tile of this edge; ``None`` when *tile* is not one."""
        if tile.level is None or tile.level >= len(self.levels):
            return None
        if tile.index != self.size >> (HEIGHT * (tile.level + 1)):
            return None
        return self.levels[tile.level]
