"""The clock that decides: it only ever passes, and is the same for every start in a boot."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from hayflick_controller import anchor
from hayflick_rpc.clock import SteadyClock, boot_name, boot_seconds


class Hands:
    """A wall clock and a boot clock that a test moves."""

    def __init__(self, wall: float, boot: float) -> None:
        self.wall_seconds, self.boot_seconds = wall, boot

    def wall(self) -> float:
        """Return Unix time."""
        return self.wall_seconds

    def boot(self) -> float:
        """Return the seconds since the boot."""
        return self.boot_seconds

    def passes(self, seconds: float) -> None:
        """Let time pass on both."""
        self.wall_seconds += seconds
        self.boot_seconds += seconds


def test_a_wall_clock_that_is_set_moves_nothing() -> None:
    """Setting the wall clock, either way, does not move the time; by how much it was set is told."""
    hands = Hands(wall=1_000_000.0, boot=50.0)
    clock = SteadyClock(hands.wall, hands.boot)
    assert (clock(), clock.step_seconds) == (1_000_000_000_000, 0.0)
    hands.passes(10)
    assert (clock(), clock.step_seconds) == (1_000_010_000_000, 0.0)
    hands.wall_seconds += 3_600
    assert (clock(), clock.step_seconds) == (1_000_010_000_000, 3_600.0)
    hands.passes(5)
    hands.wall_seconds -= 7_200
    assert (clock(), clock.step_seconds) == (1_000_015_000_000, -3_600.0)


def test_it_begins_at_the_wall_clock_and_keeps_its_pace() -> None:
    """Without more, the time is Unix time, and no two readings are out of order."""
    clock = SteadyClock()
    readings = [clock() for _ in range(100)]
    assert readings == sorted(readings)
    assert readings[-1] == pytest.approx(time.time() * 1_000_000, abs=1_000_000)
    assert abs(clock.step_seconds) < 1


def test_every_start_in_a_boot_goes_on_from_the_first(tmp_path: Path) -> None:
    """A wall clock set between two starts in one boot moves nothing, and the later start tells of it."""
    path, hands = tmp_path / "clock", Hands(wall=1_000_000.0, boot=50.0)
    first = anchor.keep(path, "this", hands.wall, hands.boot)
    assert first == 999_950.0
    assert path.stat().st_mode & 0o777 == 0o600
    hands.passes(100)
    hands.wall_seconds += 3_600
    assert anchor.keep(path, "this", hands.wall, hands.boot) == first
    clock = SteadyClock(hands.wall, hands.boot, first)
    assert (clock(), clock.step_seconds) == (1_000_100_000_000, 3_600.0)


def test_another_boot_begins_anew(tmp_path: Path) -> None:
    """A machine that was started again takes the wall clock as it is then, and keeps that."""
    path, hands = tmp_path / "clock", Hands(wall=1_000_000.0, boot=50.0)
    anchor.keep(path, "this", hands.wall, hands.boot)
    hands.wall_seconds, hands.boot_seconds = 2_000_000.0, 3.0
    assert anchor.keep(path, "next", hands.wall, hands.boot) == 1_999_997.0
    hands.wall_seconds += 60
    assert anchor.keep(path, "next", hands.wall, hands.boot) == 1_999_997.0
    assert [path.name for path in tmp_path.iterdir()] == ["clock"]


def test_a_clock_far_away_counts_from_the_middle(tmp_path: Path) -> None:
    """A wall clock that takes a while to answer is taken to have answered in the middle of it."""
    hands = Hands(wall=1_000_000.0, boot=50.0)

    def slow() -> float:
        hands.passes(1)
        told = hands.wall()
        hands.passes(1)
        return told

    assert anchor.keep(tmp_path / "clock", "this", slow, hands.boot) == 999_950.0


@pytest.mark.parametrize("text", ["this", "this nan", "this inf", "this 1 2", "this x"])
def test_what_is_no_anchor_is_refused(tmp_path: Path, text: str) -> None:
    """A file that holds no anchor is named and left: nobody knows what cooldowns were counted by."""
    path = tmp_path / "clock"
    path.write_text(text)
    with pytest.raises(OSError, match="holds no anchor"):
        anchor.keep(path, "this", time.time)
    assert path.read_text() == text


def test_a_boot_has_one_name() -> None:
    """The name of a boot is one word that stays, and says from where its seconds are counted."""
    name = boot_name()
    assert name == boot_name()
    assert len(name.split()) == 1
    assert name.startswith(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    assert boot_seconds() <= boot_seconds()
