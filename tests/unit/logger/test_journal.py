"""The journal's files: what survives, what is healed, what is refused."""

from __future__ import annotations

import errno
import os
import resource
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from hayflick_logger.directory import Claim
from hayflick_logger.journal import TILE_ENTRIES, Draft, Journal
from hayflick_logger.wal import first_indexes, path_of
from hayflick_rpc.errors import HayflickError
from hayflick_tlog.merkle import (
    check_consistency,
    check_inclusion,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
)
from hayflick_tlog.tiles import WIDTH, Tile
from hayflick_tlog.verify import verify_log

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EVENT = b'{"event":"audit","timestamp":"1970-01-01T00:00:01Z"}'


@contextmanager
def opened(directory: Path, **options: bool) -> Iterator[Journal]:
    """Open the journal of *directory* with small files."""
    journal = Journal(directory, max_segment_bytes=1_000, **options)
    try:
        yield journal
    finally:
        journal.close()


def fill(journal: Journal, count: int, at_once: int = 1) -> None:
    """Append *count* entries, *at_once* in each commit."""
    for _ in range(0, count, at_once):
        start = journal.next_index
        journal.append([Draft("s", start + number, EVENT) for number in range(1, at_once + 1)])


def refused(directory: Path, **options: bool) -> dict[str, str]:
    """Return the metadata of the JOURNAL_CORRUPT with which the start is refused."""
    with pytest.raises(HayflickError) as caught, opened(directory, **options):
        pass
    assert caught.value.reason_name == "JOURNAL_CORRUPT"
    return dict(caught.value.metadata)


def replace_once(path: Path, old: bytes, new: bytes) -> None:
    """Change a file in place, once; the old bytes must be there."""
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


@pytest.mark.parametrize("count", [40, 256, 700, 2 * TILE_ENTRIES + 5])
@pytest.mark.parametrize("check_all", [True, False])
def test_entries_survive_in_order(directory: Path, count: int, *, check_all: bool) -> None:
    """What was appended is there after a restart, in order, whether it is in tiles already or not."""
    with opened(directory) as journal:
        fill(journal, count // 10 * 10, 10)
        fill(journal, count % 10)
        edge = journal.edge
    with opened(directory, check_all=check_all) as journal:
        assert journal.edge == edge
        assert [index for index, _ in journal.entries(0)] == list(range(count))
        assert journal.verify().intact
        fill(journal, 3)
        assert journal.verify().checkpoint.size == count + 3


def test_what_is_in_tiles_leaves_the_write_ahead_files(directory: Path) -> None:
    """The files that are appended to are removed once their entries are in tiles."""
    with opened(directory) as journal:
        fill(journal, 1_000, 10)
    assert first_indexes(directory)[0] >= 700


def test_files_are_for_this_user_alone(directory: Path) -> None:
    """Every file has mode 0600, every directory 0700."""
    with opened(directory) as journal:
        fill(journal, 300, 10)
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in directory.rglob("*") if path.is_dir()} == {0o700}


def test_what_is_published_verifies_with_the_public_key_alone(directory: Path) -> None:
    """The files that a closed journal leaves are a log that verifies from the outside."""
    with opened(directory) as journal:
        fill(journal, 700, 10)
        verifier = journal.signer.verifier
    note = (directory / "log" / "checkpoint").read_text()
    found = verify_log(lambda path: (directory / "log" / path).read_bytes(), note, verifier)
    assert (found.intact, found.checkpoint.size) == (True, 700)


@pytest.mark.parametrize("size", [1, 255, 256, 700, 3_000])
def test_every_entry_is_proved_while_it_waits_for_its_tile_and_after(directory: Path, size: int) -> None:
    """Proofs hold for entries in tiles, in the tail, and at the border, at the newest size and older ones."""
    with opened(directory) as journal:
        fill(journal, size // 5 * 5, 5)
        fill(journal, size % 5)
        for index in {0, size // 3, size // 2, size - 1}:
            leaf = leaf_hash(journal.read([index])[0])
            for tree in {index + 1, (index + 1 + size) // 2, size}:
                proof = inclusion_proof(index, tree, journal.subtree)
                check_inclusion(index, tree, leaf, proof, journal.root(tree))
                older = consistency_proof(index + 1, tree, journal.subtree)
                check_consistency(index + 1, tree, journal.root(index + 1), journal.root(tree), older)


def test_tiles_that_are_not_there_yet_are_not_given(directory: Path) -> None:
    """A tile beyond the record is not there, at any level and width."""
    with opened(directory) as journal:
        fill(journal, 300, 10)
        assert journal.tile(Tile(0, 1, 44)) is not None
        for tile in (Tile(0, 1, 45), Tile(0, 1), Tile(1, 0, 2), Tile(None, 1), Tile(2, 0, 1)):
            assert journal.tile(tile) is None


@pytest.mark.parametrize(
    "torn",
    [b"\0", b"\0\x35\xff\xca" + b'{"event":{"event":"au', b"\0" * 300, b"\0\x35\xff\xca" + b"\0" * 300],
)
def test_the_torn_end_of_a_write_is_removed(directory: Path, torn: bytes) -> None:
    """The end of a write that never finished, or whose bytes never arrived, is removed and measured."""
    with opened(directory) as journal:
        fill(journal, 3)
        edge = journal.edge
    last = path_of(directory, first_indexes(directory)[-1])
    last.write_bytes(last.read_bytes() + torn)
    with opened(directory) as journal:
        assert (journal.edge, journal.healed_bytes) == (edge, len(torn))
        fill(journal, 1)
        assert journal.verify().intact


@pytest.mark.parametrize("victim", [0, 17, 39])
@pytest.mark.parametrize("part", ["entry", "length", "hash"])
def test_a_changed_entry_stops_the_start(directory: Path, victim: int, part: str) -> None:
    """A whole entry that was changed, in whichever part, is refused with its index and left in place."""
    with opened(directory) as journal:
        fill(journal, 40)
        entry = journal.read([victim])[0]
    first = max(one for one in first_indexes(directory) if one <= victim)
    path = path_of(directory, first)
    match part:
        case "entry":
            replace_once(path, entry, entry.replace(b"audit", b"audio"))
        case "length":
            at = path.read_bytes().index(entry)
            changed = bytearray(path.read_bytes())
            changed[at - 4] ^= 0x10
            path.write_bytes(changed)
        case _:
            replace_once(path, entry + leaf_hash(entry), entry + leaf_hash(b""))
    changed_content = path.read_bytes()
    assert refused(directory) == {"index": str(victim)}
    assert path.read_bytes() == changed_content


@pytest.mark.parametrize("victim", [0, 255, 256, 511])
def test_a_changed_entry_in_a_bundle_stops_the_start(directory: Path, victim: int) -> None:
    """An entry that was changed where it lies in a bundle is refused with its index."""
    with opened(directory) as journal:
        fill(journal, 700, 10)
        entry = journal.read([victim])[0]
    path = directory / "log" / Tile(None, victim // WIDTH).path
    replace_once(path, entry, entry.replace(b"audit", b"audio"))
    assert refused(directory) == {"index": str(victim)}


def test_a_missing_file_stops_the_start(directory: Path) -> None:
    """A write-ahead file or a bundle that was removed is noticed."""
    with opened(directory) as journal:
        fill(journal, 40)
    second = first_indexes(directory)[1]
    kept = path_of(directory, second).read_bytes()
    path_of(directory, second).unlink()
    assert refused(directory) == {"index": str(second)}
    path_of(directory, second).write_bytes(kept)
    with opened(directory) as journal:
        fill(journal, 600, 10)
    (directory / "log" / Tile(None, 0).path).unlink()
    assert refused(directory) == {"index": "0"}


def test_a_change_under_a_running_journal_is_found(directory: Path) -> None:
    """Verifying finds the first entry that was changed since the start, in a write-ahead file or a bundle."""
    with opened(directory) as journal:
        fill(journal, 40)
        first = path_of(directory, 0)
        replace_once(first, b'"sequence":3,', b'"sequence":4,')
        finding = journal.verify()
        assert (finding.intact, finding.first_bad_index) == (False, 2)
        replace_once(first, b'"sequence":4,', b'"sequence":3,')
        fill(journal, 600, 10)
        journal.publish()
        assert journal.verify().intact
        replace_once(directory / "log" / Tile(None, 1).path, b'"sequence":300,', b'"sequence":301,')
        finding = journal.verify()
        assert (finding.intact, finding.first_bad_index) == (False, 299)


def test_a_failed_write_leaves_nothing_and_the_next_succeeds(directory: Path) -> None:
    """When the disk refuses half of a batch, none of it is in the record, and the next append succeeds."""
    with opened(directory) as journal:
        fill(journal, 2)
        edge = journal.edge
        before = path_of(directory, 0).read_bytes()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 300, hard))
        try:
            with pytest.raises(HayflickError) as caught:
                journal.append([Draft("s", 3 + number, EVENT) for number in range(3)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert caught.value.reason_name == "AUDIT_UNAVAILABLE"
        assert caught.value.metadata == {"errno": "EFBIG"}
        assert journal.edge == edge
        assert path_of(directory, 0).read_bytes() == before
        fill(journal, 1)
        assert journal.verify().checkpoint.size == 3


def test_tiles_that_cannot_be_written_stop_appending_before_memory_runs_out(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While tiles cannot be written, appending goes on for a while, then refuses, and recovers."""
    monkeypatch.setattr("hayflick_logger.journal.MAX_UNTILED_ENTRIES", TILE_ENTRIES + 100)
    with opened(directory) as journal:
        (directory / "log" / "tile").write_bytes(b"in the way")
        with pytest.raises(HayflickError) as caught:
            fill(journal, 4 * TILE_ENTRIES, 50)
        assert caught.value.reason_name == "AUDIT_UNAVAILABLE"
        assert TILE_ENTRIES <= journal.next_index <= TILE_ENTRIES + 150
        (directory / "log" / "tile").unlink()
        with pytest.raises(HayflickError):
            fill(journal, 50, 50)  # hears of the attempt that failed, and begins another
        journal.publish()
        fill(journal, TILE_ENTRIES, 50)
        assert journal.verify().intact


def test_one_logger_at_a_time(directory: Path) -> None:
    """A directory that one logger holds is refused to a second, and free again when the first ends."""
    claim = Claim(directory)
    with pytest.raises(OSError, match="another logger") as caught:
        Claim(directory)
    assert caught.value.errno == errno.EAGAIN
    claim.close()
    Claim(directory).close()


def test_a_directory_that_others_may_enter_is_refused(directory: Path) -> None:
    """The record is not put where other users could read it."""
    directory.chmod(0o750)
    with pytest.raises(PermissionError, match="mode 0700"):
        Claim(directory)


def test_a_key_that_others_may_read_is_refused(directory: Path) -> None:
    """A signing key that was made readable to others is not signed with."""
    with opened(directory):
        pass
    (directory / "log.key").chmod(0o640)
    with pytest.raises(OSError, match="mode 0600"), opened(directory):
        pass


def test_an_append_returns_after_the_sync(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each append syncs once, when all its bytes are written, and refuses when the sync fails."""
    seen: list[int] = []
    sync = os.fdatasync

    def watched(descriptor: int) -> None:
        seen.append(os.fstat(descriptor).st_size)
        if len(seen) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(descriptor)

    with opened(directory) as journal:
        monkeypatch.setattr(os, "fdatasync", watched)
        journal.append([Draft("s", number, EVENT) for number in (1, 2)])
        durable_bytes = path_of(directory, 0).stat().st_size
        assert seen == [durable_bytes]
        with pytest.raises(HayflickError) as caught:
            fill(journal, 1)
        assert caught.value.metadata == {"errno": "EIO"}
        assert path_of(directory, 0).stat().st_size == durable_bytes
        assert journal.next_index == 2
