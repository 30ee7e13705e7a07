"""What a worker that wears the machine down costs its neighbours.

stress-ng forks, allocates and writes inside one worker as hard as its limits
allow. Beside it a neighbour worker beats and keeps time, and so does this
process, which has nothing to do with either: both measure by how much a short
sleep ends late. Read the ratios to the quiet run.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import shutil
import statistics
import time
from collections.abc import Callable, Sequence

from cluster import Cluster
from report import Report

from hayflick.v1 import controller_pb2, orchestrator_pb2, resources_pb2

STRESSORS = {
    "fork": ("--fork", "4"),
    "vm": ("--vm", "2", "--vm-bytes", "96M"),
    "io": ("--hdd", "2", "--hdd-bytes", "48M"),
}
MEASURE_SECONDS = 6.0
TICK_SECONDS = 0.01
POLL_SECONDS = 0.02
_MIB = 1024 * 1024

# The neighbour's own clock: how late each of its sleeps ends, as one line.
LATE = f"""
import time
end, late = time.monotonic() + {MEASURE_SECONDS}, []
while time.monotonic() < end:
    began = time.monotonic()
    time.sleep({TICK_SECONDS})
    late.append(time.monotonic() - began - {TICK_SECONDS})
late.sort()
print(late[len(late) // 2], late[int(len(late) * 0.99)])
"""


def measure(report: Report, workers: int) -> None:
    """Measure where stress-ng is installed; say so where not."""
    del workers
    if shutil.which("stress-ng") is None:
        report.row("neighbours", "not measured", "apt-get install stress-ng")
        return
    asyncio.run(_with_services(report))


async def _with_services(report: Report) -> None:
    async with Cluster.open() as cluster:
        await _measure(report.row, cluster)


async def _measure(row: Callable[[str, str, str], None], cluster: Cluster) -> None:
    """Measure in quiet and beside each stressor.

    Args:
        row: Takes what was measured, the figure, and a note.
        cluster: The services, with stubs.
    """
    contract = await cluster.contract(10)
    neighbour = await _launch(cluster, contract, memory_bytes=64 * _MIB)
    quiet = await _watch(cluster, neighbour)
    row(
        "quiet: lateness of a neighbour worker, p50 / p99",
        _both(quiet["worker"]),
        f"of sleeps of {TICK_SECONDS} s",
    )
    row("quiet: lateness of an unrelated process, p50 / p99", _both(quiet["process"]), "")
    row("quiet: interval of the neighbour's beat", f"{quiet['beat'][0]:.3f} s", "longest")
    for name, options in STRESSORS.items():
        hog = await _launch(cluster, contract, memory_bytes=320 * _MIB)
        stress = ("stress-ng", "--quiet", "--timeout", str(int(MEASURE_SECONDS) + 4), *options)
        hogging = asyncio.create_task(_run(cluster, hog, stress))
        await asyncio.sleep(1.0)  # let it get going
        busy = await _watch(cluster, neighbour)
        code, _, text = await hogging
        note = "" if code == 0 else f"stress-ng ended with {code}: {text[:80]!r}"
        for who in ("worker", "process"):
            ratios = [after / before for after, before in zip(busy[who], quiet[who], strict=True)]
            what = "neighbour worker" if who == "worker" else "unrelated process"
            change = f"{ratios[0]:.2f}x / {ratios[1]:.2f}x"
            row(f"{name}: lateness of {what}, p50 / p99", _both(busy[who]), change)
        ratio = busy["beat"][0] / quiet["beat"][0]
        row(f"{name}: interval of the neighbour's beat", f"{busy['beat'][0]:.3f} s", f"{ratio:.2f}x {note}")


def _both(pair: Sequence[float]) -> str:
    return f"{pair[0] * 1_000:.2f} / {pair[1] * 1_000:.2f} ms"


async def _watch(cluster: Cluster, worker_id: str) -> dict[str, list[float]]:
    """Return p50 and p99 of the worker's and our own lateness, and the longest interval between its beats."""
    (_, printed, _), ours, beat = await asyncio.gather(
        _run(cluster, worker_id, ("python3", "-I", "-c", LATE)),
        asyncio.to_thread(_tick),
        _longest_beat(cluster, worker_id),
    )
    return {"worker": [float(one) for one in printed.split()], "process": ours, "beat": [beat]}


def _tick() -> list[float]:
    end, late = time.monotonic() + MEASURE_SECONDS, []
    while time.monotonic() < end:
        began = time.monotonic()
        time.sleep(TICK_SECONDS)
        late.append(time.monotonic() - began - TICK_SECONDS)
    return [statistics.median(late), sorted(late)[int(len(late) * 0.99)]]


async def _longest_beat(cluster: Cluster, worker_id: str) -> float:
    end = time.monotonic() + MEASURE_SECONDS
    beats: list[float] = []
    while time.monotonic() < end:
        answer = await cluster.orchestrator.ListSandboxes(orchestrator_pb2.ListSandboxesRequest())
        for sandbox in answer.sandboxes:
            if sandbox.worker.worker_id == worker_id:
                at = sandbox.worker.last_heartbeat_time.ToNanoseconds() / 1e9
                if not beats or beats[-1] != at:
                    beats.append(at)
        await asyncio.sleep(POLL_SECONDS)
    return float(max(after - before for before, after in itertools.pairwise(beats)))


async def _launch(cluster: Cluster, contract: str, *, memory_bytes: int) -> str:
    resources = resources_pb2.Resources(
        cpu_millis=1_000, memory_limit_bytes=memory_bytes, pids_limit=64, tmp_limit_bytes=128 * _MIB
    )
    issue = controller_pb2.IssueManifestRequest(
        request_id=secrets.token_hex(8), contract_id=contract, state_snapshot_json="{}", resources=resources
    )
    manifest = (await cluster.controller.IssueManifest(issue)).manifest
    launch = orchestrator_pb2.LaunchWorkerRequest(request_id=secrets.token_hex(8), manifest=manifest)
    return str((await cluster.orchestrator.LaunchWorker(launch)).worker.worker_id)


async def _run(cluster: Cluster, worker_id: str, argv: Sequence[str]) -> tuple[int, str, str]:
    task = orchestrator_pb2.Task(command=orchestrator_pb2.Command(argv=argv))
    request = orchestrator_pb2.RunTaskRequest(worker_id=worker_id, task=task, keep_worker_on_error=True)
    printed = {1: b"", 2: b""}
    code = -1
    async for response in cluster.orchestrator.RunTask(request):
        if response.HasField("output"):
            printed[response.output.stream] += response.output.data
        if response.HasField("result"):
            code = response.result.exit_code or response.result.signal
    return code, printed[1].decode(), printed[2].decode()
