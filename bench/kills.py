"""What a kill costs: until the last worker is dead, and until the receipt says so."""

from __future__ import annotations

import asyncio
import functools
import os
import secrets
import time

from cluster import Cluster, in_parallel
from report import Report

from hayflick.v1 import controller_pb2


def measure(report: Report, workers: int) -> None:
    """Kill one worker, and a hundred, some times each."""
    asyncio.run(_measure(report, workers))


async def kill(cluster: Cluster, contract_id: str) -> tuple[float, float, int]:
    """Engage the kill switch; return seconds to the last pidfd, to the answer, and how many died."""
    pidfds = [os.pidfd_open(pid) for pid in await cluster.pids()]
    loop = asyncio.get_running_loop()
    dead = asyncio.Event()
    left = set(pidfds)

    def gone(descriptor: int) -> None:
        loop.remove_reader(descriptor)
        left.discard(descriptor)
        if not left:
            dead.set()

    for descriptor in pidfds:
        loop.add_reader(descriptor, gone, descriptor)
    request = controller_pb2.EngageKillSwitchRequest(
        request_id=secrets.token_hex(8),
        scope={"contract_id": contract_id},
        reason="bench",
        timeout={"seconds": 60},
    )
    began = time.perf_counter()
    call = asyncio.ensure_future(cluster.controller.EngageKillSwitch(request))
    await dead.wait()
    last = time.perf_counter() - began
    answer = await call
    answered = time.perf_counter() - began
    for descriptor in pidfds:
        os.close(descriptor)
    assert not answer.unconfirmed_worker_ids, answer.unconfirmed_worker_ids
    return last, answered, len(answer.worker_ids)


async def _measure(report: Report, workers: int) -> None:
    """The kill switch over one worker and over a hundred, some times each; the receipt is in the answer."""
    del workers
    async with Cluster.open() as cluster:
        for number, rounds in ((1, 20), (100, 5)):
            lasts, answers = [], []
            for _ in range(rounds):
                contract = await cluster.contract(number)
                await in_parallel(number, 16, functools.partial(cluster.issue_and_launch, contract))
                last, answered, _ = await kill(cluster, contract)
                lasts.append(last)
                answers.append(answered)
            report.times(f"kill switch, {number} workers: last pidfd", lasts)
            report.times(f"kill switch, {number} workers: receipt", answers)
