"""A node cut off in every way, and how long its workers outlive its lease: by the kernel's word."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from hayflick.v1 import controller_pb2 as pb
from hayflick.v1 import orchestrator_pb2 as opb
from hayflick.v1.resources_pb2 import Contract, Resources

from ..integration.conftest import duration, request_id, shell
from .kernel import holding, processes

if TYPE_CHECKING:
    from .faults import Heal
    from .fleet import Fleet
    from .run import Report

MARGIN_SECONDS = 1.0
"""How much longer than the lease the controller waits before it gives a lost worker's slot away."""
WORKERS = 4
MIB = 1024 * 1024
TASKS = (
    "trap '' TERM INT HUP QUIT; echo x; while :; do sleep 1; done",
    "trap '' TERM; (while :; do setsid sleep 100 & sleep 0.05; done) & echo x; wait",
    "echo x; exec sleep 1000",
)


def _hold(fleet: Fleet) -> Heal:
    fleet.relays["orchestrator-0"].hold()
    return fleet.relays["orchestrator-0"].heal


def _cut(fleet: Fleet) -> Heal:
    fleet.relays["orchestrator-0"].cut()
    return fleet.relays["orchestrator-0"].heal


def _stop(name: str) -> Callable[[Fleet], Heal]:
    def begin(fleet: Fleet) -> Heal:
        process = fleet.processes[name]
        process.send_signal(signal.SIGSTOP)
        return lambda: process.send_signal(signal.SIGCONT)

    return begin


def _kill_controller(fleet: Fleet) -> Heal:
    fleet.processes["controller-0"].kill()
    fleet.processes["controller-0"].wait(30)
    return fleet.mend


WAYS: dict[str, Callable[[Fleet], Heal]] = {
    "partition, bytes held": _hold,
    "partition, connections cut": _cut,
    "controller stopped": _stop("controller-0"),
    "controller killed": _kill_controller,
    "orchestrator stopped": _stop("orchestrator-0"),
}


def cut_off_again_and_again(fleet: Fleet, report: Report, seconds: float) -> None:
    """Cut the node off, see its workers die, let it come back; each way at least once."""
    chance = random.Random(report.seed)
    deadline = time.monotonic() + seconds
    fleet.wait_ready()
    request = pb.CreateContractRequest(
        request_id=request_id(), contract=Contract(max_depth=2, max_replicas=WORKERS, cooldown=duration(0))
    )
    contract_id = fleet.stubs[0].CreateContract(request, timeout=20).contract.contract_id
    report.ledger.created(contract_id)
    lived: dict[str, list[float]] = {way: [] for way in WAYS}
    ways = list(WAYS)
    while ways or time.monotonic() < deadline:
        way = ways.pop() if ways else chance.choice(list(WAYS))
        report.faults[way] += 1
        lived[way].append(_cut_off(fleet, report, contract_id, way))
    lease_seconds = fleet.size.lease_seconds
    for way, times in lived.items():
        within = sum(seconds <= lease_seconds for seconds in times)
        report.notes.append(
            f"{way}: the last worker died {max(times):.3f} s after it at most;"
            f" {within} of {len(times)} times within the lease of {lease_seconds} s"
        )


def _cut_off(fleet: Fleet, report: Report, contract_id: str, way: str) -> float:
    """Cut the node off; return how many seconds later its last worker was dead."""
    node_id = fleet.node_id("orchestrator-0")
    streams = [_launch(fleet, report, contract_id, TASKS[number % len(TASKS)]) for number in range(WORKERS)]
    lease_seconds = fleet.size.lease_seconds
    with holding(processes(node_id)) as held:
        # No beat that leaves later is acknowledged: the lease ends by then and so long.
        cut_at = time.monotonic()
        heal = WAYS[way](fleet)
        try:
            died_at = held.all_dead(lease_seconds + 20)
            # Whoever was forked since is in the same control groups.
            after = processes(node_id)
        finally:
            heal()
    for stream in streams:
        stream.cancel()
    lived = float("inf") if died_at is None else died_at - cut_at
    if lived > lease_seconds + MARGIN_SECONDS:
        report.wrong.append(f"{way}: a worker lived for {lived:.3f} s with a lease of {lease_seconds} s")
    if after:
        report.wrong.append(f"{way}: {len(after)} processes were left in the control groups")
    fleet.mend()
    fleet.wait_ready()
    _wait_free(fleet, contract_id)
    return lived


def _launch(fleet: Fleet, report: Report, contract_id: str, script: str) -> object:
    resources = Resources(cpu_millis=500, memory_limit_bytes=64 * MIB)
    issue = pb.IssueManifestRequest(
        request_id=request_id(), contract_id=contract_id, state_snapshot_json="{}", resources=resources
    )
    manifest = fleet.stubs[0].IssueManifest(issue, timeout=20).manifest
    node = fleet.nodes["orchestrator-0"]
    launch = opb.LaunchWorkerRequest(request_id=request_id(), manifest=manifest)
    worker = node.LaunchWorker(launch, timeout=20).worker
    report.ledger.born(worker.worker_id)
    stream = node.RunTask(opb.RunTaskRequest(worker_id=worker.worker_id, task=shell(script)))
    assert next(stream).HasField("started")
    assert next(stream).HasField("output")
    return stream


def _wait_free(fleet: Fleet, contract_id: str) -> None:
    """Return once the record has nobody alive."""
    deadline, pause = time.monotonic() + 30, threading.Event()
    request = pb.GetContractRequest(contract_id=contract_id)
    while fleet.stubs[0].GetContract(request, timeout=20).contract.active_count:
        assert time.monotonic() < deadline
        pause.wait(0.05)
