"""What lies in a record's directory beside the log that its checkpoint covers."""

from __future__ import annotations

from pathlib import Path

import pytest

from hayflick_logger import newest, wal
from hayflick_tlog.merkle import leaf_hash
from hayflick_tlog.tiles import Tile, join_bundle

ENTRIES = [b"entry %d" % number for number in range(20)]
LEAVES = {number: leaf_hash(entry) for number, entry in enumerate(ENTRIES)}


def write(directory: Path, first: int, entries: list[bytes], tail: bytes = b"") -> None:
    """Write a write-ahead file."""
    records = b"".join(wal.compose(entry, leaf_hash(entry)) for entry in entries)
    wal.path_of(directory, first).write_bytes(records + tail)


def test_what_the_checkpoint_does_not_cover_is_counted(tmp_path: Path) -> None:
    """Entries behind the checkpoint count, over several files; those it covers do not."""
    write(tmp_path, 0, ENTRIES[:12])
    write(tmp_path, 12, ENTRIES[12:])
    assert newest.check(tmp_path, 15, LEAVES) == newest.Newest(beyond=5, torn=False)
    assert newest.check(tmp_path, 20, LEAVES) == newest.Newest(beyond=0, torn=False)


def test_an_entry_that_was_changed_with_its_hash_is_named(tmp_path: Path) -> None:
    """A write-ahead record that is whole but not the log's entry is the first bad one."""
    write(tmp_path, 0, [*ENTRIES[:7], b"forged", *ENTRIES[8:]])
    with pytest.raises(wal.Broken) as caught:
        newest.check(tmp_path, 15, LEAVES)
    assert caught.value.index == 7


def test_a_missing_file_is_found(tmp_path: Path) -> None:
    """Entries between the checkpoint and the next file are missing when no bundle has them."""
    write(tmp_path, 17, ENTRIES[17:])
    with pytest.raises(wal.Broken, match="entry 15 is missing"):
        newest.check(tmp_path, 15, LEAVES)
    bundle = tmp_path / "log" / Tile(None, 0).path
    bundle.parent.mkdir(parents=True)
    bundle.write_bytes(join_bundle(ENTRIES))
    assert newest.check(tmp_path, 15, LEAVES).beyond == 5


def test_an_unfinished_last_write_is_told_from_damage(tmp_path: Path) -> None:
    """The torn end of the newest file is no damage; within the checkpoint, or in an older file, it is."""
    write(tmp_path, 0, ENTRIES, tail=b"\0\x05")
    assert newest.check(tmp_path, 20, LEAVES) == newest.Newest(beyond=0, torn=True)
    with pytest.raises(wal.Broken):
        newest.check(tmp_path, 21, LEAVES)
    write(tmp_path, 20, [b"entry 20"])
    with pytest.raises(wal.Broken):
        newest.check(tmp_path, 20, LEAVES)


def test_partial_tiles_of_older_checkpoints_are_compared(tmp_path: Path) -> None:
    """Each must be the beginning of the widest one, or of the whole tile that took their place."""
    for width in (3, 9):
        path = tmp_path / Tile(None, 0, width).path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(join_bundle(ENTRIES[:width]))
    assert list(newest.changed_partials(tmp_path)) == []
    older = tmp_path / Tile(None, 0, 3).path
    older.write_bytes(join_bundle([*ENTRIES[:2], b"forged!"]))
    assert list(newest.changed_partials(tmp_path)) == ["tile/entries/000.p/3"]
