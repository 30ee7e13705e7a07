"""Clocks that nobody can set.

The wall clock jumps when somebody, or NTP, corrects it; CLOCK_MONOTONIC stands
still while the machine is suspended. CLOCK_BOOTTIME does neither
(clock_gettime(2)), so leases and lives are measured by it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

_MICROSECONDS = 1_000_000


def boot_seconds() -> float:
    """Return the seconds since the machine started, suspension included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class SteadyClock:
    """The wall clock as it was when this process started, carried on by CLOCK_BOOTTIME.

    Setting the wall clock later changes nothing that is decided by this one,
    until the process is started again.

    Args:
        wall: Returns Unix time in seconds.
        boot: Returns seconds that only ever pass.
    """

    def __init__(
        self, wall: Callable[[], float] = time.time, boot: Callable[[], float] = boot_seconds
    ) -> None:
        self._wall = wall
        self._boot = boot
        self._anchor = wall() - boot()

    def __call__(self) -> int:
        """Return the time, in microseconds since the Unix epoch."""
        return round((self._anchor + self._boot()) * _MICROSECONDS)

    @property
    def step_seconds(self) -> float:
        """By how much the wall clock was set forward, or back, since this process started."""
        return self._wall() - self._boot() - self._anchor
