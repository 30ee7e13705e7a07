"""Clocks that nobody can set.

The wall clock jumps when somebody, or NTP, corrects it; CLOCK_MONOTONIC stands
still while the machine is suspended. CLOCK_BOOTTIME does neither
(clock_gettime(2)), so leases and lives are measured by it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

_MICROSECONDS = 1_000_000

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_OFFSETS = Path("/proc/self/timens_offsets")


def boot_seconds() -> float:
    """Return the seconds since the machine started, suspension included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def boot_name() -> str:
    """Return a name for what :func:`boot_seconds` counts from: no other start of a machine has it.

    A time namespace may count from elsewhere (time_namespaces(7)), so its offset is a part.

    Raises:
        OSError: The kernel does not say.
    """
    name = _BOOT_ID.read_text("ascii").strip()
    if not _OFFSETS.exists():  # a kernel without time namespaces
        return name
    offsets = dict(line.split(maxsplit=1) for line in _OFFSETS.read_text("ascii").splitlines())
    return "/".join([name, *offsets["boottime"].split()])


class SteadyClock:
    """The wall clock as it once was, carried on by CLOCK_BOOTTIME.

    Setting the wall clock later changes nothing that is decided by this one.

    Args:
        wall: Returns Unix time in seconds.
        boot: Returns seconds that only ever pass.
        anchor_seconds: What Unix time is held to have been when *boot* was 0;
            ``None`` for what *wall* says now.
    """

    def __init__(
        self,
        wall: Callable[[], float] = time.time,
        boot: Callable[[], float] = boot_seconds,
        anchor_seconds: float | None = None,
    ) -> None:
        self._wall = wall
        self._boot = boot
        self._anchor = wall() - boot() if anchor_seconds is None else anchor_seconds

    def __call__(self) -> int:
        """Return the time, in microseconds since the Unix epoch."""
        return round((self._anchor + self._boot()) * _MICROSECONDS)

    @property
    def step_seconds(self) -> float:
        """By how much the wall clock is ahead of this one now: what it was set forward by, or back."""
        return self._wall() - self._boot() - self._anchor
