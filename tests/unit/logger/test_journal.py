"""The journal's files: what survives, what is healed, what is refused."""

from __future__ import annotations

import errno
import os
import resource
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from hayflick_logger.directory import Claim
from hayflick_logger.journal import Draft, Journal
from hayflick_logger.segments import Head, first_indexes, path_of
from hayflick_rpc.errors import HayflickError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EVENT = b'{"event":"audit","timestamp":"1970-01-01T00:00:01Z"}'


@contextmanager
def opened(directory: Path, **options: bool) -> Iterator[Journal]:
    """Open the journal of *directory* with small segments."""
    journal = Journal(directory, max_segment_bytes=1_000, **options)
    try:
        yield journal
    finally:
        journal.close()


def fill(journal: Journal, count: int) -> None:
    """Append *count* entries, one commit each."""
    for _ in range(count):
        journal.append([Draft("s", journal.head.next_index + 1, EVENT)])


def test_entries_survive_in_order(directory: Path) -> None:
    """What was appended is there after a restart, in order, in files of bounded size."""
    with opened(directory) as journal:
        fill(journal, 40)
        head = journal.head
    assert len(first_indexes(directory)) > 5
    with opened(directory) as journal:
        assert journal.head == head
        assert [reached.next_index for _, _, reached in journal.lines()] == list(range(1, 41))
        assert journal.verify().broken is None


def test_files_are_for_this_user_alone(directory: Path) -> None:
    """Segments have mode 0600."""
    with opened(directory):
        pass
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}


def test_a_torn_last_line_is_removed(directory: Path) -> None:
    """The end of a write that never finished is removed, and the journal says how much that was."""
    with opened(directory) as journal:
        fill(journal, 3)
        head = journal.head
    last = path_of(directory, first_indexes(directory)[-1])
    last.write_bytes(last.read_bytes() + b'{"event":{"event":"au')
    with opened(directory) as journal:
        assert journal.head == head
        assert journal.healed_bytes == len(b'{"event":{"event":"au')
        fill(journal, 1)
        assert journal.verify().broken is None


def test_a_hole_that_a_power_cut_left_is_removed(directory: Path) -> None:
    """A file that had grown before its bytes arrived ends in NULs; they are removed."""
    with opened(directory) as journal:
        fill(journal, 3)
        head = journal.head
    last = path_of(directory, first_indexes(directory)[-1])
    os.truncate(last, last.stat().st_size + 300)
    with opened(directory) as journal:
        assert (journal.head, journal.healed_bytes) == (head, 300)


@pytest.mark.parametrize("victim", [0, 17, 39])
def test_a_changed_entry_stops_the_start(directory: Path, victim: int) -> None:
    """A whole entry that was changed, first, middle or last, is refused with its index and left in place."""
    with opened(directory) as journal:
        fill(journal, 40)
        place, line = next(
            (place, line) for place, line, head in journal.lines() if head.next_index == victim + 1
        )
    path = path_of(directory, place.segment)
    content = path.read_bytes()
    changed = (
        content[: place.offset] + line.replace(b"audit", b"audio") + content[place.offset + place.length :]
    )
    path.write_bytes(changed)
    with pytest.raises(HayflickError) as caught, opened(directory):
        pass
    assert (caught.value.reason_name, caught.value.metadata) == ("JOURNAL_CORRUPT", {"index": str(victim)})
    assert path.read_bytes() == changed


def test_a_missing_segment_stops_the_start(directory: Path) -> None:
    """A file that was removed from the middle is noticed."""
    with opened(directory) as journal:
        fill(journal, 40)
    second = first_indexes(directory)[1]
    path_of(directory, second).unlink()
    with pytest.raises(HayflickError) as caught, opened(directory):
        pass
    assert caught.value.metadata == {"index": str(second)}


def test_a_change_under_a_running_journal_is_found(directory: Path) -> None:
    """Verifying finds the first entry that was changed since the start."""
    with opened(directory) as journal:
        fill(journal, 40)
        first = path_of(directory, 0)
        first.write_bytes(first.read_bytes().replace(b'"sequence":3,', b'"sequence":4,'))
        verdict = journal.verify()
        assert verdict.broken is not None
        assert (verdict.broken.index, verdict.head.next_index) == (2, 2)


def test_an_end_that_was_cut_off_under_a_running_journal_is_found(directory: Path) -> None:
    """Verifying finds entries that are no longer there."""
    with opened(directory) as journal:
        fill(journal, 3)
        first = path_of(directory, 0)
        first.write_bytes(b"".join(first.read_bytes().splitlines(keepends=True)[:2]))
        verdict = journal.verify()
        assert verdict.broken is not None
        assert verdict.broken.index == 2


def test_the_quick_check_still_links_the_last_segment(directory: Path) -> None:
    """Without the full check, the last file must still follow from the one before it."""
    with opened(directory) as journal:
        fill(journal, 40)
        head = journal.head
    with opened(directory, check_all=False) as journal:
        assert journal.head == head
    *_, before, last = first_indexes(directory)
    path_of(directory, before).write_bytes(
        path_of(directory, before).read_bytes().replace(b'"hash":"', b'"hash":"0', 1)
    )
    content = path_of(directory, last).read_bytes()
    path_of(directory, last).write_bytes(content.replace(b"audit", b"audio", 1))
    with pytest.raises(HayflickError) as caught, opened(directory, check_all=False):
        pass
    assert caught.value.metadata == {"index": str(last)}


def test_a_failed_write_leaves_nothing_and_the_next_succeeds(directory: Path) -> None:
    """When the disk refuses half of a batch, none of it is in the record, and the next append succeeds."""
    with opened(directory) as journal:
        fill(journal, 2)
        head = journal.head
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
        assert journal.head == head
        assert path_of(directory, 0).read_bytes() == before
        fill(journal, 1)
        assert journal.verify().head == Head(3, journal.head.hash)


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
        placed = journal.append([Draft("s", number, EVENT) for number in (1, 2)])
        durable_bytes = sum(place.length for place, _ in placed)
        assert seen == [durable_bytes]
        with pytest.raises(HayflickError) as caught:
            fill(journal, 1)
        assert caught.value.metadata == {"errno": "EIO"}
        assert path_of(directory, 0).stat().st_size == durable_bytes
        assert journal.head.next_index == 2
