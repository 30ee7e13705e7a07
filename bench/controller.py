"""What the controller alone carries: admissions and heartbeats."""

from __future__ import annotations

import asyncio
import os
import secrets
import time

from cluster import Cluster, in_parallel
from report import Report

from hayflick.v1 import controller_pb2

BEATS_SECONDS = 3.0


def measure(report: Report, workers: int) -> None:
    """Admit *workers* workers of a node that this process plays, then beat for them."""
    asyncio.run(_measure(report, workers))


async def _measure(report: Report, workers: int) -> None:
    """Admissions and heartbeats: the controller alone, with this process as its node."""
    async with Cluster.open() as cluster:
        contract = await cluster.contract(100_000)
        node = f"bench-{os.getpid()}"
        stream = cluster.controller.ConnectNode()
        hello = controller_pb2.NodeHello(node_id=node, address="unix:///nowhere", python_version="0.0")
        await stream.write(controller_pb2.ConnectNodeRequest(hello=hello))
        session = (await stream.read()).welcome.session
        registered: list[str] = []

        async def admit() -> None:
            manifest = await cluster.issue(contract)
            request = controller_pb2.RegisterWorkerRequest(
                request_id=secrets.token_hex(8), manifest=manifest, node_id=node, session=session
            )
            answer = await cluster.controller.RegisterWorker(request)
            registered.append(answer.worker.worker_id)

        acknowledged = asyncio.Event()
        seen = 0

        async def listen() -> None:
            nonlocal seen
            while (message := await stream.read()) is not None and message.ByteSize():
                if message.HasField("ack"):
                    seen = message.ack.sequence
                    acknowledged.set()

        listener = asyncio.ensure_future(listen())
        sent = 0

        async def beat() -> None:
            nonlocal sent
            sent += 1
            message = controller_pb2.NodeBeat(sequence=sent)
            message.workers.extend(
                controller_pb2.WorkerBeat(worker_id=one, state="STATE_RUNNING") for one in registered[:1_000]
            )
            await stream.write(controller_pb2.ConnectNodeRequest(beat=message))

        async def stay_alive() -> None:
            while True:
                await beat()
                await asyncio.sleep(1)

        alive = asyncio.ensure_future(stay_alive())
        rate = await in_parallel(workers, 16, admit)
        alive.cancel()
        report.row(
            "admissions a second, 16 at a time",
            f"{rate:.0f} /s",
            "issue and register, both durable in the log",
        )
        began = time.perf_counter()
        first = sent
        while time.perf_counter() - began < BEATS_SECONDS:
            await beat()
            while seen < sent:
                acknowledged.clear()
                await acknowledged.wait()
        beats = (sent - first) * min(len(registered), 1_000)
        report.row(
            "worker heartbeats a second", f"{beats / (time.perf_counter() - began):,.0f} /s", "acknowledged"
        )
        listener.cancel()
        stream.cancel()
