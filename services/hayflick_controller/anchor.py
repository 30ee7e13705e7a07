"""What the controller holds the time to be, kept for as long as its machine runs.

Cooldowns and expiries outlive the process, and the wall clock may be set while
there is none. So the Unix time at which the machine is held to have started is
taken once in a boot, and every later start in that boot goes on from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from hayflick_rpc import keyfile
from hayflick_rpc.clock import boot_seconds

if TYPE_CHECKING:
    from pathlib import Path


def keep(path: Path, name: str, wall: Callable[[], float], boot: Callable[[], float] = boot_seconds) -> float:
    """Return the Unix time at which *boot* was 0, in seconds: as in the file at *path*, or from *wall*.

    The file counts for *name*, the boot that it was written in, alone. *wall* may be a
    call to another machine; how long it takes is an error of half as much.

    Raises:
        OSError: The file cannot be read or written, or holds no anchor.
    """
    try:
        kept = path.read_text("ascii").split()
    except FileNotFoundError:
        kept = []
    if kept:
        try:
            then, text = kept
            anchor_seconds = float(text)
        except ValueError:
            anchor_seconds = math.nan
        if not math.isfinite(anchor_seconds):
            raise OSError(f"{path}: holds no anchor of a clock; remove it to take the wall clock's time")
        if then == name:
            return anchor_seconds
    before = boot()
    anchor_seconds = wall() - (before + boot()) / 2
    keyfile.write(path, f"{name} {anchor_seconds!r}\n".encode("ascii"))
    return anchor_seconds
