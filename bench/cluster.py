"""The three services, afresh, and the calls that sections make to them."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Protocol

from hayflick.v1 import (
    controller_pb2,
    controller_pb2_grpc,
    orchestrator_pb2,
    orchestrator_pb2_grpc,
    resources_pb2,
)
from hayflick_rpc.channel import connect
from replication.testing import Services

MEMORY_BYTES = 64 * 1024 * 1024


class Running(Protocol):
    """Services that run."""

    @property
    def pids(self) -> Mapping[str, int]:
        """The process of each service, by its name."""

    def address(self, name: str) -> str:
        """Return where the service called *name* listens."""

    def close(self) -> None:
        """End them."""


class Cluster:
    """The three services, and stubs to them."""

    def __init__(self, runtime: Running) -> None:
        self.runtime = runtime
        self.channels = [connect(runtime.address(name)) for name in ("controller", "orchestrator")]
        self.controller = controller_pb2_grpc.ControllerServiceStub(self.channels[0])
        self.orchestrator = orchestrator_pb2_grpc.OrchestratorServiceStub(self.channels[1])

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls) -> AsyncIterator[Cluster]:
        """Yield fresh services."""
        async with cls.of(Services()) as cluster:
            yield cluster

    @classmethod
    @contextlib.asynccontextmanager
    async def of(cls, services: Running) -> AsyncIterator[Cluster]:
        """Yield stubs to *services*, and end these afterwards."""
        with contextlib.closing(services) as runtime:
            cluster = cls(runtime)
            try:
                yield cluster
            finally:
                for channel in cluster.channels:
                    await channel.close()

    def cpu_seconds(self) -> float:
        """Return the CPU time that the three services have used, by themselves."""
        return sum(process_cpu_seconds(pid) for pid in self.runtime.pids.values())

    async def contract(self, max_replicas: int) -> str:
        """Create a contract without cooldown; return its id."""
        request = controller_pb2.CreateContractRequest(
            request_id=secrets.token_hex(8),
            contract=resources_pb2.Contract(max_depth=8, max_replicas=max_replicas, cooldown={"seconds": 0}),
        )
        return str((await self.controller.CreateContract(request)).contract.contract_id)

    async def issue(self, contract_id: str) -> resources_pb2.Manifest:
        """Issue a manifest for a root."""
        request = controller_pb2.IssueManifestRequest(
            request_id=secrets.token_hex(8),
            contract_id=contract_id,
            state_snapshot_json="{}",
            resources=resources_pb2.Resources(cpu_millis=1_000, memory_limit_bytes=MEMORY_BYTES),
        )
        return (await self.controller.IssueManifest(request)).manifest

    async def launch(self, manifest: resources_pb2.Manifest) -> float:
        """Launch; return the seconds that the call took."""
        request = orchestrator_pb2.LaunchWorkerRequest(request_id=secrets.token_hex(8), manifest=manifest)
        began = time.perf_counter()
        await self.orchestrator.LaunchWorker(request)
        return time.perf_counter() - began

    async def issue_and_launch(self, contract_id: str) -> None:
        """Go the whole way of one birth."""
        await self.launch(await self.issue(contract_id))

    async def pids(self) -> list[int]:
        """Return the host pid of every live sandbox's init."""
        found: list[int] = []
        token = ""
        while True:
            request = orchestrator_pb2.ListSandboxesRequest(page_size=1_000, page_token=token)
            answer = await self.orchestrator.ListSandboxes(request)
            found += [sandbox.host_pid for sandbox in answer.sandboxes]
            token = answer.next_page_token
            if not token:
                return found


def process_cpu_seconds(pid: int) -> float:
    """Return the CPU time of all threads of *pid*, to the nanosecond."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


async def in_parallel(number: int, width: int, work: Callable[[], Awaitable[object]]) -> float:
    """Do *work* *number* times, *width* at once; return how many a second."""
    todo = iter(range(number))

    async def lane() -> None:
        for _ in todo:
            await work()

    began = time.perf_counter()
    await asyncio.gather(*(lane() for _ in range(width)))
    return number / (time.perf_counter() - began)
