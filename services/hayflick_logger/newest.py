"""What lies in a record's directory beside the log that its checkpoint covers, looked at from outside.

Those are the newest entries, in write-ahead files, and the partial tiles of
checkpoints before the last. No logger need run, and one that runs is not
disturbed: what it removes meanwhile is in the tiles that took its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hayflick_logger import wal
from hayflick_tlog.tiles import WIDTH, BadTile, Tile, parse_path

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path


@dataclass(frozen=True)
class Newest:
    """What the write-ahead files hold.

    Attributes:
        beyond: How many entries are there that the checkpoint does not cover yet.
        torn: Whether the last write was not finished; it was never acknowledged.
    """

    beyond: int
    torn: bool


def check(directory: Path, size: int, leaves: Mapping[int, bytes]) -> Newest:
    """Compare the write-ahead files in *directory* with their own hashes and with the log.

    Args:
        directory: The logger's data directory.
        size: How many entries the checkpoint covers.
        leaves: The leaf hashes of entries of the log, as far as it was verified.

    Raises:
        wal.Broken: The first entry that is not the one that was recorded, or is missing.
        OSError: A file cannot be read.
    """
    firsts = wal.first_indexes(directory)
    reached, torn = size, False
    for first in firsts:
        if first > reached and not _has_bundles(directory, reached, first):
            raise wal.Broken(f"entry {reached} is missing", reached)
        try:
            for index, _, leaf in wal.walk(directory, first):
                if leaves.get(index, leaf) != leaf:
                    raise wal.Broken(f"entry {index} is not the one that was recorded", index)
                reached = max(reached, index + 1)
        except FileNotFoundError:
            continue  # a running logger moved it to tiles
        except wal.Broken as broken:
            if not broken.torn or broken.index < size or first != firsts[-1]:
                raise
            torn = True
    return Newest(reached - size, torn)


def changed_partials(log: Path) -> Iterator[str]:
    """Yield the paths of partial tiles below *log* that are no beginning of the tile that followed.

    Raises:
        OSError: A file cannot be read.
    """
    for directory in sorted(log.glob("tile/**/*.p")):
        found = sorted((int(path.name), path) for path in directory.iterdir() if path.name.isdecimal())
        # The whole one took their place, or else the widest did.
        for path in (directory.with_suffix(""), *(path for _, path in reversed(found))):
            try:
                best = path.read_bytes()
                break
            except FileNotFoundError:
                continue
        else:
            continue
        for _, path in found:
            name = str(path.relative_to(log))
            try:
                data = path.read_bytes()
                if not data or not best.startswith(data) or parse_path(name).path != name:
                    yield name
            except FileNotFoundError:
                continue  # a running logger dropped it
            except BadTile:
                yield name


def _has_bundles(directory: Path, start: int, end: int) -> bool:
    return all(
        (directory / "log" / Tile(None, index).path).exists()
        for index in range(start // WIDTH, -(-end // WIDTH))
    )
