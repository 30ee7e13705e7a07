"""What a birth through the services costs, alone and as the number of live workers grows."""

from __future__ import annotations

import asyncio

from cluster import Cluster, in_parallel
from kills import kill
from report import Report

ROUNDS = 60


def measure(report: Report, workers: int) -> None:
    """Launch one after the other, many at once, and beside *workers* live ones."""
    asyncio.run(_measure(report, workers))


async def _measure(report: Report, workers: int) -> None:
    """The call that users make, and how many of it a second."""
    async with Cluster.open() as cluster:
        contract = await cluster.contract(workers + 500)
        manifests = [await cluster.issue(contract) for _ in range(ROUNDS)]
        report.times("LaunchWorker: call → ready", [await cluster.launch(one) for one in manifests])
        for width in (1, 16):
            rate = await in_parallel(200, width, lambda: cluster.issue_and_launch(contract))
            report.row(
                f"births a second, {width} at a time", f"{rate:.0f} /s", "issue, register, launch, ready"
            )
        await in_parallel(max(0, workers - 60 - 400), 16, lambda: cluster.issue_and_launch(contract))
        manifests = [await cluster.issue(contract) for _ in range(ROUNDS)]
        some = [await cluster.launch(one) for one in manifests]
        report.times(f"LaunchWorker: call → ready, {workers} live", some)
        killed = await kill(cluster, contract)
        report.row(
            f"kill switch, {killed.number} workers: last pidfd",
            f"{killed.last_death * 1_000:.0f} ms",
            f"receipt {killed.receipt * 1_000:.0f} ms",
        )
