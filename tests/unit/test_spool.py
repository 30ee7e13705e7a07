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


def test_a_busy_spool_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is acknowledged goes also while there always is more; what is not stays, and is read in order."""
    monkeypatch.setattr(spool, "RID_BYTES", 4_096)
    made = Spool(tmp_path, "s", max_bytes=20_000)
    (path,) = tmp_path.iterdir()
    for number in range(1, 5_001):
        made.append(number, event(number))
        if number > 100:
            made.acknowledged(number - 100)
        assert path.stat().st_size < 40_000
    assert made.fullness < 1
    assert [sequence for sequence, _ in made.read(4_900, 30)] == list(range(4_901, 4_931))
    ((source, left),) = kept(tmp_path)
    assert (source, left[-100:]) == ("s", list(range(4_901, 5_001)))
    assert [sequence for sequence, _ in made.read(4_930, 1_000)] == list(range(4_931, 5_001))
    made.acknowledged(5_000)
    made.close()


def test_a_death_while_it_gets_rid_of_some_leaves_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the smaller file has the name, the larger one is whole; and a failure costs nothing but room."""
    monkeypatch.setattr(spool, "RID_BYTES", 1_000)
    made = Spool(tmp_path, "s")
    for number in range(1, 201):
        made.append(number, event(number))

    def refuse(*_: object) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr("pathlib.Path.rename", refuse)
    made.acknowledged(150)
    assert kept(tmp_path) == [("s", list(range(1, 201)))]
    monkeypatch.undo()
    monkeypatch.setattr(spool, "RID_BYTES", 1_000)
    made.acknowledged(160)
    assert kept(tmp_path) == [("s", list(range(129, 201)))]
    made.append(201, event(201))
    assert [sequence for sequence, _ in made.read(160, 100)] == list(range(161, 202))
    made.acknowledged(201)
    made.close()
    assert list(tmp_path.iterdir()) == []


def test_a_full_spool_refuses(tmp_path: Path) -> None:
    """An event beyond what may wait is refused, and there is room again when some were acknowledged."""
    made = Spool(tmp_path, "s", max_bytes=2_000)
    large = event(0)
    large.details["text"] = "x" * 200
    number = 0
    while made.fullness < 0.95:
        number += 1
        made.append(number, event(number))
    with pytest.raises(OSError, match="wait already"):
        made.append(number + 1, large)
    assert number > 10
    assert kept(tmp_path) == [("s", list(range(1, number + 1)))]
    made.acknowledged(number)
    made.append(number + 2, event(number + 2))
    assert kept(tmp_path) == [("s", [number + 2])]


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
