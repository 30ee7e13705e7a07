"""``make bench``: what the promises cost, measured beside a peer in the same run.

Machines are noisy: read the ratios, and the medians before the rest. Each
section starts what it measures afresh and leaves nothing behind.

Usage: python bench [--workers 1000] [--only SECTION ...]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import os
import resource
import secrets
import select
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hayflick_sandbox import messages
from hayflick_sandbox.cgroups import Tree
from hayflick_sandbox.identities import UidRange
from hayflick_sandbox.policy import Limits, Policy
from hayflick_sandbox.probe import probe, require
from hayflick_sandbox.zygote_client import Exited, Started, Zygote

PEER = ("bwrap", "--unshare-all", "--ro-bind", "/", "/", "/bin/true")
ROUNDS = 60
BEATS_SECONDS = 3.0
MEMORY_BYTES = 64 * 1024 * 1024


@dataclass
class Report:
    """Collects rows and prints each as it comes."""

    peer_ms: float | None = None

    def row(self, what: str, figure: str, note: str = "") -> None:
        """Print one figure."""
        print(f"  {what:<46} {figure:>18}   {note}", flush=True)

    def times(self, what: str, seconds: Sequence[float]) -> None:
        """Print a median with its spread, and its ratio to the peer's."""
        ordered = sorted(seconds)
        median = statistics.median(ordered) * 1_000
        spread = f"min {ordered[0] * 1_000:.2f}, p99 {ordered[int(len(ordered) * 0.99)] * 1_000:.2f}"
        ratio = f"{median / self.peer_ms:.2f}x bwrap, " if self.peer_ms else ""
        self.row(what, f"{median:.2f} ms", ratio + spread)


class Nursery:
    """Sandboxes straight from a zygote, without services."""

    def __init__(self, tree: Tree, uids: UidRange, zygote: Zygote) -> None:
        self.tree, self.uids, self.zygote = tree, uids, zygote
        self.live: list[tuple[Started, Any]] = []

    @classmethod
    @contextlib.contextmanager
    def open(cls) -> Iterator[Nursery]:
        """Yield an empty nursery."""
        tree = Tree.create(f"bench-{os.getpid()}")
        try:
            degraded = require(probe(tree), ())
            uids = UidRange.claim()
            zygote = Zygote.start(tree=tree, degraded=degraded)
            try:
                yield cls(tree, uids, zygote)
            finally:
                zygote.close()
                zygote.wait_closed()
                uids.close()
        finally:
            tree.close()

    def launch(self) -> float:
        """Start one sandbox; return the seconds from the request to its ready message."""
        name = secrets.token_hex(8)
        began = time.perf_counter()
        self.tree.add(name, Limits(memory_bytes=MEMORY_BYTES))
        channel = self.zygote.launch(name, Policy(), name, self.uids.lease(), beat_seconds=5.0)
        event = self._event()
        assert isinstance(event, Started), event
        message: object = None
        while not isinstance(message, messages.Ready):
            wait_readable(channel)
            message = messages.parse_from_init(channel.recv(messages.MAX_PACKET_BYTES))
            assert isinstance(message, messages.Probed | messages.Ready), message
        took = time.perf_counter() - began
        self.live.append((event, channel))
        return took

    def kill(self) -> float:
        """Kill all in one write; return the seconds until the last pidfd is readable."""
        poller = select.poll()
        for started, _ in self.live:
            poller.register(started.pidfd, select.POLLIN)
        left = len(self.live)
        began = time.perf_counter()
        self.tree.kill("")
        while left:
            for descriptor, _ in poller.poll():
                poller.unregister(descriptor)
                left -= 1
        took = time.perf_counter() - began
        while self.live:
            if isinstance(self._event(), Exited):
                started, channel = self.live.pop()
                os.close(started.pidfd)
                channel.close()
        return took

    def _event(self) -> object:
        while (event := self.zygote.receive()) is None:
            wait_readable(self.zygote.socket)
        return event


def wait_readable(sock: socket.socket) -> None:
    """Wait until *sock* has something to read; select(2) cannot count beyond 1,023."""
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    poller.poll()


def run_peer() -> float:
    """Run the peer once; return its seconds."""
    began = time.perf_counter()
    subprocess.run(PEER, check=True)
    return time.perf_counter() - began


def bench_sandbox(report: Report, workers: int) -> None:
    """From the request to ready, interleaved with the peer, as the number of live ones grows."""
    have_peer = shutil.which(PEER[0]) is not None
    with Nursery.open() as nursery:
        nursery.launch()
        ours, theirs = [], []
        for _ in range(ROUNDS):
            if have_peer:
                theirs.append(run_peer())
            ours.append(nursery.launch())
        if have_peer:
            report.peer_ms = statistics.median(theirs) * 1_000
            report.times("peer: " + " ".join(PEER[:2]) + " … /bin/true", theirs)
        else:
            report.row("peer: bwrap", "not installed", "apt-get install bubblewrap")
        report.times("sandbox: request → ready", ours)
        for mark in (100, workers):
            while len(nursery.live) < mark - ROUNDS // 2:
                nursery.launch()
            some = [nursery.launch() for _ in range(ROUNDS // 2)]
            report.times(f"sandbox: request → ready, {mark} live", some)
        report.row(
            "memory of an idle sandbox (PSS)", f"{average_pss(nursery) / 2**20:.2f} MiB", f"{workers} live"
        )
        report.row(
            f"cgroup.kill of {len(nursery.live)} sandboxes", f"{nursery.kill() * 1_000:.0f} ms", "last pidfd"
        )


def average_pss(nursery: Nursery) -> float:
    """Return the mean proportional set size of the live inits, in bytes."""
    return statistics.mean(pss_bytes(started.pid) for started, _ in nursery.live[-200:])


def pss_bytes(pid: int) -> int:
    """Return the proportional set size of *pid*; proc_pid_smaps(5)."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


class Cluster:
    """The three services, and stubs to them."""

    def __init__(self, runtime: Any) -> None:  # noqa: ANN401 -- imported late
        from hayflick.v1 import controller_pb2_grpc, orchestrator_pb2_grpc
        from hayflick_rpc.channel import connect

        self.channels = [connect(runtime.address(name)) for name in ("controller", "orchestrator")]
        self.controller = controller_pb2_grpc.ControllerServiceStub(self.channels[0])
        self.orchestrator = orchestrator_pb2_grpc.OrchestratorServiceStub(self.channels[1])

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls) -> AsyncIterator[Cluster]:
        """Yield fresh services."""
        from replication.testing import Services

        with contextlib.closing(Services()) as runtime:
            cluster = cls(runtime)
            try:
                yield cluster
            finally:
                for channel in cluster.channels:
                    await channel.close()

    async def contract(self, max_replicas: int) -> str:
        """Create a contract without cooldown; return its id."""
        from hayflick.v1 import controller_pb2, resources_pb2

        request = controller_pb2.CreateContractRequest(
            request_id=secrets.token_hex(8),
            contract=resources_pb2.Contract(max_depth=8, max_replicas=max_replicas, cooldown={"seconds": 0}),
        )
        return (await self.controller.CreateContract(request)).contract.contract_id

    async def issue(self, contract_id: str) -> Any:  # noqa: ANN401 -- a Manifest message
        """Issue a manifest for a root."""
        from hayflick.v1 import controller_pb2, resources_pb2

        request = controller_pb2.IssueManifestRequest(
            request_id=secrets.token_hex(8),
            contract_id=contract_id,
            state_snapshot_json="{}",
            resources=resources_pb2.Resources(cpu_millis=1_000, memory_limit_bytes=MEMORY_BYTES),
        )
        return (await self.controller.IssueManifest(request)).manifest

    async def launch(self, manifest: Any) -> float:  # noqa: ANN401
        """Launch; return the seconds that the call took."""
        from hayflick.v1 import orchestrator_pb2

        request = orchestrator_pb2.LaunchWorkerRequest(request_id=secrets.token_hex(8), manifest=manifest)
        began = time.perf_counter()
        await self.orchestrator.LaunchWorker(request)
        return time.perf_counter() - began

    async def issue_and_launch(self, contract_id: str) -> None:
        """Go the whole way of one birth."""
        await self.launch(await self.issue(contract_id))

    async def pids(self) -> list[int]:
        """Return the host pid of every live sandbox's init."""
        from hayflick.v1 import orchestrator_pb2

        found: list[int] = []
        token = ""
        while True:
            request = orchestrator_pb2.ListSandboxesRequest(page_size=1_000, page_token=token)
            answer = await self.orchestrator.ListSandboxes(request)
            found += [sandbox.host_pid for sandbox in answer.sandboxes]
            token = answer.next_page_token
            if not token:
                return found

    async def kill(self, contract_id: str) -> tuple[float, float, int]:
        """Engage the kill switch; return seconds to the last pidfd, to the answer, and how many died."""
        from hayflick.v1 import controller_pb2

        pidfds = [os.pidfd_open(pid) for pid in await self.pids()]
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
        call = asyncio.ensure_future(self.controller.EngageKillSwitch(request))
        await dead.wait()
        last = time.perf_counter() - began
        answer = await call
        answered = time.perf_counter() - began
        for descriptor in pidfds:
            os.close(descriptor)
        assert not answer.unconfirmed_worker_ids, answer.unconfirmed_worker_ids
        return last, answered, len(answer.worker_ids)


async def in_parallel(number: int, width: int, work: Callable[[], Awaitable[object]]) -> float:
    """Do *work* *number* times, *width* at once; return how many a second."""
    todo = iter(range(number))

    async def lane() -> None:
        for _ in todo:
            await work()

    began = time.perf_counter()
    await asyncio.gather(*(lane() for _ in range(width)))
    return number / (time.perf_counter() - began)


async def bench_launch(report: Report, workers: int) -> None:
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
        last, answered, number = await cluster.kill(contract)
        report.row(
            f"kill switch, {number} workers: last pidfd",
            f"{last * 1_000:.0f} ms",
            f"answer {answered * 1_000:.0f} ms",
        )


async def bench_kill(report: Report, workers: int) -> None:
    """The kill switch over one worker and over a hundred, some times each; the receipt is in the answer."""
    del workers
    async with Cluster.open() as cluster:
        for number, rounds in ((1, 20), (100, 5)):
            lasts, answers = [], []
            for _ in range(rounds):
                contract = await cluster.contract(number)
                await in_parallel(number, 16, functools.partial(cluster.issue_and_launch, contract))
                last, answered, _ = await cluster.kill(contract)
                lasts.append(last)
                answers.append(answered)
            report.times(f"kill switch, {number} workers: last pidfd", lasts)
            report.times(f"kill switch, {number} workers: receipt", answers)


async def bench_controller(report: Report, workers: int) -> None:
    """Admissions and heartbeats: the controller alone, with this process as its node."""
    from hayflick.v1 import controller_pb2

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


async def bench_neighbours(report: Report, workers: int) -> None:
    """What a worker that wears the machine down costs others."""
    import neighbours

    del workers
    if shutil.which("stress-ng") is None:
        report.row("neighbours", "not measured", "apt-get install stress-ng")
        return
    async with Cluster.open() as cluster:
        await neighbours.measure(report.row, cluster)


def bench_record(report: Report, workers: int) -> None:
    """The logger alone."""
    import record

    del workers
    with tempfile.TemporaryDirectory(prefix="hayflick-bench-", dir="/var/tmp") as directory:
        data, address = Path(directory, "data"), f"unix://{directory}/logger.sock"
        command = [sys.executable, "-m", "hayflick_logger", "--listen", address, "--data-dir", str(data)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            try:
                assert process.stdout is not None
                process.stdout.readline()
                asyncio.run(record.measure(report.row, address, data))
            finally:
                process.terminate()


SECTIONS: dict[str, Callable[[Report, int], object]] = {
    "sandbox": bench_sandbox,
    "launch": lambda report, workers: asyncio.run(bench_launch(report, workers)),
    "kill": lambda report, workers: asyncio.run(bench_kill(report, workers)),
    "controller": lambda report, workers: asyncio.run(bench_controller(report, workers)),
    "record": bench_record,
    "neighbours": lambda report, workers: asyncio.run(bench_neighbours(report, workers)),
}


def main() -> int:
    """Run the sections asked for; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=1_000, help="how many live workers to grow to")
    parser.add_argument("--only", nargs="+", choices=tuple(SECTIONS), default=tuple(SECTIONS))
    arguments = parser.parse_args()
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    report = Report()
    for name in arguments.only:
        print(f"\n{name}")
        SECTIONS[name](report, arguments.workers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
