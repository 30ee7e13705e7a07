"""What the kernel says of a node's workers, whatever the services say."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from ..integration.conftest import groups


def processes(node_id: str) -> set[int]:
    """Return every process in a control group of a node."""
    found: set[int] = set()
    for top in groups(node_id):
        for directory, _, _ in os.walk(top):
            with contextlib.suppress(OSError):  # removed meanwhile
                found |= {int(pid) for pid in Path(directory, "cgroup.procs").read_text().split()}
    return found


def children(pid: int) -> list[int]:
    """Return the children of a process's first thread."""
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


class Held:
    """Processes that are held by pidfd: whatever happens, a number never means another process."""

    def __init__(self, pids: set[int] | list[int]) -> None:
        self._descriptors: list[int] = []
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                self._descriptors.append(os.pidfd_open(pid))

    def __len__(self) -> int:
        return len(self._descriptors)

    def send(self, number: int) -> None:
        """Signal those that live."""
        for descriptor in self._descriptors:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, number)  # type: ignore[arg-type]

    def all_dead(self, seconds: float) -> float | None:
        """Wait until every one is dead; return the monotonic time of the last death, ``None`` if late."""
        deadline = time.monotonic() + seconds
        waiting = select.poll()
        left = set(self._descriptors)
        for descriptor in left:
            waiting.register(descriptor, select.POLLIN)
        while left:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return None
            for descriptor, _ in waiting.poll(remaining * 1_000):
                waiting.unregister(descriptor)
                left.discard(descriptor)
        return time.monotonic()

    def close(self) -> None:
        """Let go."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()


@contextlib.contextmanager
def holding(pids: set[int] | list[int]) -> Iterator[Held]:
    """Hold processes for a while."""
    held = Held(pids)
    try:
        yield held
    finally:
        held.close()
