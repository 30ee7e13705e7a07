"""The census on a real node: strays and escapes that are made from outside, as only the host's root can."""

from __future__ import annotations

import contextlib
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hayflick.v1 import logger_pb2
from hayflick.v1.resources_pb2 import DenialClass, State, Tripwire

from .conftest import Stack, command, duration, groups, running_stack, shell, until
from .test_evidence import bundle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hayflick.v1.resources_pb2 import Worker

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def counted() -> Iterator[Stack]:
    """A stack whose census is taken all the time."""
    with running_stack(orchestrator={"census-seconds": "0.1"}) as stack:
        yield stack


@pytest.fixture
def stranger() -> Iterator[int]:
    """A process that no worker started."""
    with subprocess.Popen(["/bin/sleep", "1000"]) as process:
        yield process.pid
        process.kill()


def drifts(stack: Stack) -> list[dict[str, Any]]:
    """Return all drifts on record."""
    request = logger_pb2.ListEventsRequest(
        filter=logger_pb2.EventFilter(events=["census_drift"]), page_size=1_000
    )
    return [
        {"worker_id": one.event.worker_id, **dict(one.event.details)}
        for one in stack.logger.ListEvents(request).events
    ]


def told(stack: Stack, **wanted: Any) -> dict[str, Any]:
    """Return the drift that has all of *wanted*, once it is on record."""

    def find() -> dict[str, Any] | None:
        return next((one for one in drifts(stack) if wanted.items() <= one.items()), None)

    found: dict[str, Any] = until(find)
    return found


def unified(stack: Stack) -> Path:
    """Return the node's control group in the version 2 hierarchy."""
    return next(path for path in groups(stack.node_id) if (path / "cgroup.kill").exists())


def outside(own: Path) -> Path:
    """Return where a process is written to leave all groups of a node whose own is given."""
    return own.parents[1] / "cgroup.procs"


def group(stack: Stack, worker: Worker) -> Path:
    """Return a worker's own control group."""
    return unified(stack) / stack.sandboxes()[worker.worker_id].cgroup_path / "self"


def test_a_stray_process(counted: Stack, stranger: int) -> None:
    """A process of the host that is moved into a worker's group is told of, as that worker's, and once."""
    worker = counted.launch()
    (group(counted, worker) / "cgroup.procs").write_text(str(stranger))
    found = told(counted, worker_id=worker.worker_id, kind="stray_process")
    assert found["host_pid"] == stranger
    assert found["cgroup_path"].endswith("/self")
    assert found["node_id"] == counted.node_id
    # Moved out again: nothing is wrong any more, and its return is told anew.
    outside(unified(counted)).write_text(str(stranger))
    assert [one["kind"] for one in drifts(counted) if one["worker_id"] == worker.worker_id].count(
        "stray_process"
    ) == 1
    counted.stop(worker)


def test_a_stray_group(counted: Stack) -> None:
    """A control group that belongs to nobody is told of, wherever in the node's tree it is."""
    worker = counted.launch()
    for directory in (unified(counted) / "nobody", group(counted, worker).parent / "nobody"):
        directory.mkdir()
        path = str(directory.relative_to(unified(counted)))
        found = told(counted, kind="stray_group", cgroup_path=path)
        assert found["worker_id"] == (worker.worker_id if "/" in path else "")
        directory.rmdir()
    counted.stop(worker)


def test_a_process_that_left_its_group(counted: Stack) -> None:
    """A process of a worker outside the worker's group is told of; init's absence as well."""
    worker = counted.launch()
    stream = counted.begin(worker, shell("echo x; sleep 1000"))
    own = group(counted, worker)
    init = counted.sandboxes()[worker.worker_id].host_pid
    task = next(pid for pid in map(int, (own / "cgroup.procs").read_text().split()) if pid != init)
    for pid, kind in ((task, "escaped_process"), (init, "missing_init")):
        outside(unified(counted)).write_text(str(pid))
        try:
            assert told(counted, worker_id=worker.worker_id, kind=kind)["host_pid"] == pid
        finally:
            (own / "cgroup.procs").write_text(str(pid))
    counted.stop(worker)
    list(stream)


def test_a_process_without_its_limits(counted: Stack) -> None:
    """Where limits have hierarchies of their own, a process that left one of them is told of."""
    legacy = [path for path in groups(counted.node_id) if not (path / "cgroup.kill").exists()]
    if not legacy:
        pytest.skip("limits and groups are one hierarchy here")
    worker = counted.launch()
    init = counted.sandboxes()[worker.worker_id].host_pid
    outside(legacy[0]).write_text(str(init))
    assert told(counted, worker_id=worker.worker_id, kind="unlimited_process")["host_pid"] == init
    counted.stop(worker)


def test_no_drift_while_workers_come_and_go(counted: Stack) -> None:
    """While a hundred workers are launched, work and end, no count sees anything amiss that lasts."""
    before = len(drifts(counted))
    contract = counted.contract(max_replicas=40)

    def live(_: int) -> None:
        worker = counted.launch(contract)
        child = counted.launch(contract, worker.worker_id)
        assert counted.run(child, command("true")).outcome == "SUCCEEDED"
        counted.stop(worker)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(live, range(50)))
    assert drifts(counted)[before:] == []


def test_a_count_leaves_nothing(counted: Stack) -> None:
    """Counting holds no descriptor from one time to the next."""
    pid = counted.processes["orchestrator"].pid

    def descriptors() -> int:
        return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())

    worker = counted.launch()
    first = descriptors()
    for _ in range(20):
        assert counted.run(worker, command("true")).outcome == "SUCCEEDED"
    with contextlib.suppress(AssertionError):
        until(lambda: descriptors() <= first + 2, seconds=2)
    assert descriptors() <= first + 2
    counted.stop(worker)


def test_a_stray_process_trips_quarantine(counted: Stack, stranger: int) -> None:
    """Where the contract says so, a worker in whose group a stranger is found is frozen with it."""
    wire = Tripwire(name="census", classes=[DenialClass.DENIAL_CLASS_CENSUS], count=1, window=duration(60))
    worker = counted.launch(counted.contract(tripwires=[wire]))
    (group(counted, worker) / "cgroup.procs").write_text(str(stranger))
    until(lambda: counted.worker(worker.worker_id).state == State.STATE_QUARANTINED)
    _, documents = bundle(counted, worker.worker_id)
    processes = documents[f"workers/{worker.worker_id}/processes.json"]["processes"]
    assert stranger in {one["pid"] for one in processes}
    # The end of the worker is the end of whoever is in its group.
    counted.kill(worker_id=worker.worker_id)
    until(lambda: Path(f"/proc/{stranger}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
