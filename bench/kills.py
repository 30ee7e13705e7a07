"""What a kill costs: until the last worker is dead, and until the receipt says so.

Beside each, in the same run, the kernel's own part: one ``cgroup.kill`` over as
many sandboxes straight from a zygote, until the last pidfd tells of a death.
"""

from __future__ import annotations

import asyncio
import functools
import os
import secrets
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from cluster import Cluster, in_parallel
from nursery import Nursery
from report import Report

from hayflick.v1 import controller_pb2

ROUNDS = ((1, 20), (100, 5), (1_000, 3))
"""How many workers, and how many times."""
TIMEOUT_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Killed:
    """One kill, in seconds from the request.

    Attributes:
        last_death: Until the last pidfd told of a death.
        receipt: Until the answer was here, with its receipt signed and on record.
        node: What the node took from its order to its answer.
        number: How many workers died.
        cpu: CPU time of the three services meanwhile; the kernel's for the dying is not in it.
    """

    last_death: float
    receipt: float
    node: float
    number: int
    cpu: float


def measure(report: Report, workers: int) -> None:
    """Kill one worker, a hundred, and a thousand (*workers* at most), some times each."""
    for number, rounds in ROUNDS:
        if number <= workers:
            asyncio.run(_measure(report, number, rounds))


async def _measure(report: Report, number: int, rounds: int) -> None:
    bare, kills = [], []
    async with Cluster.open() as cluster:
        for _ in range(rounds):
            bare.append(kernel_seconds(number))
            contract = await cluster.contract(number)
            await in_parallel(number, 16, functools.partial(cluster.issue_and_launch, contract))
            kills.append(await kill(cluster, contract))
    lasts, receipts = [one.last_death for one in kills], [one.receipt for one in kills]
    report.times(f"kill of {number}: cgroup.kill alone, last pidfd", bare)
    report.times(f"kill of {number}: switch, last pidfd", lasts, _ratio(lasts, bare))
    report.times(f"kill of {number}: switch, receipt", receipts, _ratio(receipts, bare))
    each = statistics.median(one.cpu for one in kills) / number
    report.row(f"kill of {number}: CPU of the services", f"{each * 1_000:.2f} ms", "for each worker")


def _ratio(ours: Sequence[float], bare: Sequence[float]) -> str:
    return f"{statistics.median(ours) / statistics.median(bare):.2f}x cgroup.kill"


def kernel_seconds(number: int) -> float:
    """Return what one ``cgroup.kill`` over *number* fresh sandboxes takes, to the last pidfd."""
    with Nursery.open() as nursery:
        for _ in range(number):
            nursery.launch()
        return nursery.kill()


async def kill(cluster: Cluster, contract_id: str) -> Killed:
    """Engage the kill switch over a contract, and see its workers die."""
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
        timeout={"seconds": TIMEOUT_SECONDS},
    )
    began, cpu = time.perf_counter(), cluster.cpu_seconds()
    call = asyncio.ensure_future(cluster.controller.EngageKillSwitch(request))
    await dead.wait()
    last = time.perf_counter() - began
    answer = await call
    answered, cpu = time.perf_counter() - began, cluster.cpu_seconds() - cpu
    for descriptor in pidfds:
        os.close(descriptor)
    assert not answer.unconfirmed_worker_ids, answer.unconfirmed_worker_ids
    (node,) = answer.nodes
    return Killed(last, answered, node.elapsed.ToNanoseconds() / 1e9, len(answer.worker_ids), cpu)
