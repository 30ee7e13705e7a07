"""The record on disk: append-only files of chained entries, durable when acknowledged.

One thread appends (the recorder's); any may read. An append is one write and
one ``fdatasync``, however many entries it holds. When either fails, the file is
cut back to the last byte that was durable, the entries are refused, and the
next append tries anew: a full disk stops decisions, not the logger.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_logger import entries, segments
from hayflick_logger.directory import sync
from hayflick_logger.segments import Broken, Head, Place
from hayflick_rpc.errors import HayflickError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

GENESIS_HEAD = Head()
# Details hold 64 KiB at most and the rest is small; see hayflick_rpc.events.
MAX_LINE_BYTES = 128 * 1024

log = logging.getLogger(__name__)


class Draft(NamedTuple):
    """An event that has no place in the record yet."""

    source: str
    sequence: int
    event: bytes


@dataclass(frozen=True)
class Witness:
    """What the index remembers of the record: it was written after the entries were durable.

    Attributes:
        first_hash: The hash of entry 0, by which a journal is told from another.
        head: How far the record reached, at least.
    """

    first_hash: bytes
    head: Head


@dataclass(frozen=True)
class _Extent:
    """How far the files are durable; swapped as one, so that readers see one moment."""

    head: Head
    segment: int
    size_bytes: int


@dataclass(frozen=True)
class Verdict:
    """What a check of the whole chain found.

    Attributes:
        head: How far the record is good.
        broken: Why it is not good further on; ``None`` when all of it is.
    """

    head: Head
    broken: Broken | None


class Journal:
    """The files in one directory.

    Args:
        directory: Claimed by this process; see ``directory.py``.
        max_segment_bytes: Size from which on a new segment is begun.
        check_all: Verify every segment now, and not just the last.
        witness: What must still be there.

    Raises:
        HayflickError: JOURNAL_CORRUPT, naming the index, when an entry does not
            follow and it is not merely the torn end of a write that was never
            acknowledged, or when the record ends before its witness says.
        OSError: the files cannot be read or made.
    """

    def __init__(
        self,
        directory: Path,
        *,
        max_segment_bytes: int,
        check_all: bool = True,
        witness: Witness | None = None,
    ) -> None:
        self.directory = directory
        self.healed_bytes = 0
        self._max_segment_bytes = max_segment_bytes
        self._descriptor = -1
        self._dirty = False
        self._extent: _Extent
        firsts = segments.first_indexes(directory)
        head = self._recover(firsts, check_all=check_all, witness=witness)
        self._open_segment(firsts[-1] if firsts else 0, head)

    @property
    def head(self) -> Head:
        """How far the record is durable."""
        return self._extent.head

    def close(self) -> None:
        """Close the file that grows."""
        os.close(self._descriptor)
        self._descriptor = -1

    def append(self, drafts: Sequence[Draft]) -> list[tuple[Place, bytes]]:
        """Make *drafts* durable; return the place and the line of each.

        Raises:
            HayflickError: AUDIT_UNAVAILABLE: none of them is in the record.
        """
        if not drafts:
            return []
        try:
            self._cut_back()
            if self._extent.size_bytes >= self._max_segment_bytes:
                self._open_segment(self.head.next_index, self.head)
            placed, extent = self._compose(drafts)
            self._dirty = True
            _write_all(self._descriptor, b"".join(line for _, line in placed))
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
        self._extent = extent
        return placed

    def read(self, places: Sequence[Place]) -> list[bytes]:
        """Return the lines at *places*, from any thread.

        Raises:
            HayflickError: JOURNAL_CORRUPT when the files no longer hold them.
        """
        try:
            return segments.read(self.directory, places)
        except (OSError, entries.BadEntry) as error:
            raise corrupt(f"the journal cannot be read back: {error}", -1) from error

    def lines(
        self, head: Head = GENESIS_HEAD, after: Place | None = None
    ) -> Iterator[tuple[Place, bytes, Head]]:
        """Yield the entries that follow *head*, checked; *after* is where the last one before lies.

        Stops where the record ended when this was called, so that appending goes on.

        Raises:
            Broken: at the first entry that does not follow.
        """
        goal = self._extent
        reached = head
        for first in segments.first_indexes(self.directory):
            if first > goal.segment or (after is not None and first < after.segment):
                continue
            offset = after.offset + after.length if after is not None and first == after.segment else 0
            limit_bytes = goal.size_bytes if first == goal.segment else None
            for place, line, after_line in segments.walk(
                self.directory, first, reached, offset=offset, limit_bytes=limit_bytes
            ):
                reached = after_line
                yield place, line, reached
        if reached != goal.head:
            raise segments.missing(reached)

    def verify(self) -> Verdict:
        """Recompute the whole chain, from any thread."""
        head = GENESIS_HEAD
        try:
            for _, _, reached in self.lines():
                head = reached
        except Broken as broken:
            return Verdict(head, broken)
        except OSError as error:
            log.error("cannot read the journal back: %s", error)  # noqa: TRY400 -- the errno says it all
            return Verdict(head, segments.missing(head))
        return Verdict(head, None)

    def _recover(self, firsts: list[int], *, check_all: bool, witness: Witness | None) -> Head:
        """Return the head that the files prove, the torn end of the last one removed."""
        head = GENESIS_HEAD
        if not check_all and len(firsts) > 1:
            head = _trusted_head(self.directory, firsts[-2], firsts[-1])
            firsts = firsts[-1:]
        for first in firsts:
            try:
                for _, _, reached in segments.walk(self.directory, first, head):
                    head = reached
                    witness = _compare(witness, head)
            except Broken as broken:
                durable = witness is not None and broken.index < witness.head.next_index
                if durable or first != firsts[-1] or not self._heal(broken):
                    raise corrupt(str(broken), broken.index) from broken
        if witness is not None and witness.head.next_index > head.next_index:
            raise corrupt(
                f"the index knows {witness.head.next_index} entries and the journal holds"
                f" {head.next_index}; if those are lost for good, remove the index",
                head.next_index,
            )
        return head

    def _heal(self, broken: Broken) -> bool:
        """Remove the end of the last file when a write that was never acknowledged left it.

        Such an end has no newline or holds NULs, which no entry does: the file
        had grown and its bytes had not arrived. A whole line that does not
        follow was changed, and stays for all to see.
        """
        path = segments.path_of(self.directory, broken.place.segment)
        if not path.exists():
            return False
        with path.open("r+b") as file:
            file.seek(broken.place.offset)
            rest = file.read()
            if b"\n" in rest and b"\0" not in rest:
                return False
            file.truncate(broken.place.offset)
            os.fsync(file.fileno())
        self.healed_bytes = len(rest)
        log.warning("removed %d bytes of a torn write after entry %d", len(rest), broken.index - 1)
        return True

    def _open_segment(self, first: int, head: Head) -> None:
        """Make *first* the segment that grows; a new name is durable before it is used."""
        path = segments.path_of(self.directory, first)
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
        self._extent = _Extent(head, first, size_bytes)

    def _cut_back(self) -> None:
        """Remove what a failed append left behind the last durable byte."""
        if self._dirty:
            os.ftruncate(self._descriptor, self._extent.size_bytes)
            os.fdatasync(self._descriptor)
            self._dirty = False

    def _compose(self, drafts: Sequence[Draft]) -> tuple[list[tuple[Place, bytes]], _Extent]:
        placed = []
        head, segment, offset = self._extent.head, self._extent.segment, self._extent.size_bytes
        for draft in drafts:
            line, digest = entries.compose(
                head.next_index, draft.source, draft.sequence, draft.event, head.hash
            )
            placed.append((Place(segment, offset, len(line)), line))
            head = Head(head.next_index + 1, digest)
            offset += len(line)
        return placed, _Extent(head, segment, offset)


def corrupt(message: str, index: int) -> HayflickError:
    """Return the error for a record that does not follow, at *index* when it is known (not negative)."""
    return HayflickError(
        ErrorReason.ERROR_REASON_JOURNAL_CORRUPT,
        message,
        metadata={"index": str(index)} if index >= 0 else {},
    )


def _compare(witness: Witness | None, head: Head) -> Witness | None:
    """Return *witness*, or ``None`` when it speaks of another journal; refuse a record it contradicts."""
    if witness is None:
        return None
    if head.next_index == 1 and head.hash != witness.first_hash:
        log.warning("the index is another journal's; it will be built anew")
        return None
    if head.next_index == witness.head.next_index and head.hash != witness.head.hash:
        raise corrupt(f"entry {head.next_index - 1} is not the one that was recorded", head.next_index - 1)
    return witness


def _trusted_head(directory: Path, segment: int, next_segment: int) -> Head:
    """Return the head that the last line of *segment* states."""
    with segments.path_of(directory, segment).open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - MAX_LINE_BYTES))
        _, _, line = file.read().removesuffix(b"\n").rpartition(b"\n")
    try:
        return Head(next_segment, entries.parse(line).hash)
    except entries.BadEntry as error:
        raise corrupt(str(error), next_segment - 1) from error


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
