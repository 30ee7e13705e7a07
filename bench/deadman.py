"""How long workers outlive the word of their controller, as a part of their node's lease.

The controller is stopped, and killed: the orchestrator must end its workers by
itself. The orchestrator is stopped: its zygote must. The time is from the signal
to the last worker's death by its pidfd. The last beat that the controller
acknowledged left before the signal, by one beat interval at most, and the lease
runs from there: so all should be dead within one lease of the signal, and none
much sooner.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import time
from collections.abc import Sequence

from cluster import Cluster
from report import Report
from stack import Stack

LEASE_SECONDS = 3.0
BEAT_SECONDS = 0.25
WORKERS = 20
ROUNDS = 3
LIMIT_SECONDS = 10 * LEASE_SECONDS
CASES = (
    ("controller stopped", "controller", signal.SIGSTOP),
    ("controller killed", "controller", signal.SIGKILL),
    ("orchestrator stopped", "orchestrator", signal.SIGSTOP),
)


def measure(report: Report, workers: int) -> None:
    """Take the word away in each way, some times."""
    del workers
    for what, service, number in CASES:
        ratios = [asyncio.run(_outlived(service, number)) / LEASE_SECONDS for _ in range(ROUNDS)]
        report.row(
            f"dead man: {what}",
            f"{max(ratios):.3f} of lease",
            f"longest of {ROUNDS}, shortest {min(ratios):.3f}; {WORKERS} workers, lease {LEASE_SECONDS} s",
        )


async def _outlived(service: str, number: signal.Signals) -> float:
    """Return the seconds from the signal to the last worker's death."""
    settings = {"lease-seconds": str(LEASE_SECONDS), "beat-interval-seconds": str(BEAT_SECONDS)}
    stack = Stack({"controller": settings})
    async with Cluster.of(stack) as cluster:
        contract = await cluster.contract(WORKERS)
        for _ in range(WORKERS):
            await cluster.issue_and_launch(contract)
        pidfds = [os.pidfd_open(pid) for pid in await cluster.pids()]
        try:
            stack.send(service, number)
            return await asyncio.to_thread(_last_death, pidfds, time.monotonic())
        finally:
            for descriptor in pidfds:
                os.close(descriptor)


def _last_death(pidfds: Sequence[int], began: float) -> float:
    """Return when, after *began*, the last of *pidfds* told of a death."""
    poller = select.poll()
    for descriptor in pidfds:
        poller.register(descriptor, select.POLLIN)
    left = len(pidfds)
    while left:
        seconds = began + LIMIT_SECONDS - time.monotonic()
        assert seconds > 0, f"{left} workers still live {LIMIT_SECONDS} s after the signal"
        for descriptor, _ in poller.poll(seconds * 1_000):
            poller.unregister(descriptor)
            left -= 1
    return time.monotonic() - began
