"""Events that outlive their sender."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING

import pytest

from hayflick.v1 import logger_pb2
from hayflick_rpc import spool
from hayflick_rpc.spool import Spool

if TYPE_CHECKING:
    from pathlib import Path


def event(number: int) -> logger_pb2.Event:
    """Return an event that carries *number*."""
    made = logger_pb2.Event(event="audit", timestamp={"seconds": number})
    made.details["number"] = number
    return made


def kept(directory: Path) -> list[tuple[str, list[int]]]:
    """Return each sender with the sequences that lie in *directory*."""
    found = [spool._parse(path.read_bytes()) for path in sorted(directory.glob("*.events"))]
    return [(source, [sequence for sequence, _ in events]) for source, events in found]


def test_what_was_not_recorded_stays(tmp_path: Path) -> None:
    """A spool that ends with events that nobody acknowledged leaves them, whole, under its sender's name."""
    made = Spool(tmp_path / "outbox", "orchestrator/n/1")
    for number in (1, 2, 3):
        made.append(number, event(number))
    made.acknowledged(2)
    made.close()
    assert kept(tmp_path / "outbox") == [("orchestrator/n/1", [1, 2, 3])]


def test_a_spool_without_a_rest_is_gone(tmp_path: Path) -> None:
    """When all is acknowledged the file is emptied, and removed at the end."""
    made = Spool(tmp_path, "s")
    made.append(1, event(1))
    made.acknowledged(1)
    assert kept(tmp_path) == [("s", [])]
    made.append(2, event(2))
    assert kept(tmp_path) == [("s", [2])]
    made.acknowledged(2)
    made.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_torn_record_ends_the_file(tmp_path: Path, cut: int) -> None:
    """A record that was cut, or whose bytes changed, is left out; those before it are not."""
    made = Spool(tmp_path, "s")
    for number in (1, 2):
        made.append(number, event(number))
    made.close()
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    assert kept(tmp_path) == [("s", [1])]
    path.write_bytes(content[:-cut] + bytes([content[-cut] ^ 1]) + content[len(content) - cut + 1 :])
    assert kept(tmp_path) == [("s", [1])]


def test_an_event_that_cannot_be_kept_is_refused_whole(tmp_path: Path) -> None:
    """A full disk refuses the event and leaves no part of it."""
    made = Spool(tmp_path, "s")
    made.append(1, event(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    (path,) = tmp_path.iterdir()
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
    try:
        with pytest.raises(OSError):
            made.append(2, event(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    made.append(2, event(2))
    made.close()
    assert kept(tmp_path) == [("s", [1, 2])]


def test_files_are_for_this_user_alone(tmp_path: Path) -> None:
    """The directory has mode 0700 and its files 0600."""
    made = Spool(tmp_path / "outbox", "s")
    (path,) = (tmp_path / "outbox").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "outbox").stat().st_mode & 0o777 == 0o700
    made.close()
