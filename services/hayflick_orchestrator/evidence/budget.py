"""What one capture may use: workers, processes, files, bytes and seconds, and what that left out."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

_KIB, _MIB = 1024, 1024 * 1024


@dataclass(frozen=True, slots=True)
class Caps:
    """Bounds of one bundle; what lies beyond is left out, and the bundle says so.

    Attributes:
        workers: Captured in full, the one that was named first, parents before children.
        seconds: For reading, in all.
        processes_per_worker: Looked at.
        descriptors_per_process: Listed.
        maps_bytes_per_process: Of its memory map.
        entries_per_tree: Files, directories and the rest, listed in each of a worker's directories.
        entries: The same, over all workers.
        depth: Directories below the top one.
        file_bytes: Of one file; a larger one is listed and not hashed.
        hashed_bytes_per_worker: Of all its files.
        held_bytes: Of output that waits to be read, over all workers.
    """

    workers: int = 32
    seconds: float = 10.0
    processes_per_worker: int = 64
    descriptors_per_process: int = 256
    maps_bytes_per_process: int = 128 * _KIB
    entries_per_tree: int = 1_000
    entries: int = 20_000
    depth: int = 32
    file_bytes: int = 16 * _MIB
    hashed_bytes_per_worker: int = 64 * _MIB
    held_bytes: int = 8 * _MIB


class Budget:
    """What is left of the caps in one capture.

    Attributes:
        caps: The bounds.
        left_out: How much of what was left out, by kind.
        entries: How many may still be listed.
        held_bytes: How much held output may still be shown.
    """

    def __init__(self, caps: Caps) -> None:
        self.caps = caps
        self.left_out: Counter[str] = Counter()
        self.entries = caps.entries
        self.held_bytes = caps.held_bytes
        self._deadline = time.monotonic() + caps.seconds

    @property
    def timely(self) -> bool:
        """Whether there is time left."""
        return time.monotonic() < self._deadline

    def omit(self, what: str, count: int = 1) -> None:
        """Note that *count* of *what* were left out."""
        self.left_out[what] += count
