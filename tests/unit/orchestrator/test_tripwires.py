"""What a node does when a tripwire gives way, and what it tells whom; the kernel is tested elsewhere."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from hayflick.v1.controller_pb2 import ContractTerms
from hayflick.v1.errors_pb2 import ErrorReason
from hayflick.v1.resources_pb2 import DenialClass, Tripwire, TripwireScope
from hayflick.v1.resources_pb2 import Worker as WorkerMessage
from hayflick_orchestrator.lifecycle import Ask, Life
from hayflick_orchestrator.population import Population
from hayflick_orchestrator.sandboxes import SandboxError
from hayflick_orchestrator.tripwires import EVENTS_AT_ONCE, Tripwires
from hayflick_rpc.errors import HayflickError
from hayflick_sandbox.denials import Denial

KEYS, CENSUS = DenialClass.DENIAL_CLASS_KEYS, DenialClass.DENIAL_CLASS_CENSUS
UNSHARE = Denial("namespaces", "unshare", {"flags": "CLONE_NEWUSER"}, 1)


@dataclass
class One:
    """A sandbox without a process: what the tripwires see of one."""

    launch_id: str
    cgroup_path: str = "c/w"
    descriptors: dict[str, int] = field(default_factory=dict)


@dataclass
class Member:
    """A worker that runs in it."""

    worker_id: str
    parent_id: str = ""
    terms: ContractTerms = field(default_factory=ContractTerms)
    life: Life = field(default_factory=Life)
    contract_id: str = "c"

    def __post_init__(self) -> None:
        self.sandbox = One(self.worker_id)
        self.cgroup_path = f"c/{self.worker_id}"
        self.record = WorkerMessage(worker_id=self.worker_id)


@dataclass
class Report:
    """What a freeze answers."""

    unconfirmed: tuple[str, ...] = ()


class Node:
    """The parts around the tripwires, which note what they are told."""

    def __init__(self) -> None:
        self.population: Population[Any, Any, Any] = Population()
        self.told: list[tuple[str, str, dict[str, Any]]] = []
        self.frozen: list[str] = []
        self.killed: list[tuple[str, Ask]] = []
        self.reports: list[Any] = []
        self.refusal: HayflickError | None = None
        self.tripwires = Tripwires(self, "n1", listening=False)  # type: ignore[arg-type]
        self.tripwires.serve(self, self.population)  # type: ignore[arg-type]
        self.tripwires.on_report = self.reports.append
        self.tasks: list[asyncio.Task[Any]] = []

    def denial(self, worker: Any, details: dict[str, Any]) -> None:
        self.told.append(("denial", worker.worker_id if worker else "", details))

    def tripwire(self, worker: Any, details: dict[str, Any]) -> None:
        self.told.append(("tripwire", worker.worker_id, details))

    def spawn(self, work: Any, name: str) -> None:
        self.tasks.append(asyncio.create_task(work, name=name))

    async def freeze(self, worker_id: str) -> Report:
        if self.refusal is not None:
            raise self.refusal
        self.frozen.append(worker_id)
        return Report()

    def ask_end(self, worker: Any, ask: Ask) -> None:
        self.killed.append((worker.worker_id, ask))

    def adopt(self, worker_id: str, parent_id: str = "", *wires: Tripwire) -> Any:
        worker = Member(worker_id, parent_id, ContractTerms(tripwires=wires))
        self.population.add(worker)
        self.tripwires.watch(worker.sandbox)  # type: ignore[arg-type]
        self.tripwires.adopt(worker)  # type: ignore[arg-type]
        return worker

    async def settle(self) -> None:
        await asyncio.gather(*self.tasks)


@pytest.fixture
async def node() -> Any:
    """A node with tripwires."""
    made = Node()
    yield made
    made.tripwires.close()


def wire(name: str, count: int = 2, *, family: bool = False, classes: tuple[Any, ...] = ()) -> Tripwire:
    """Return a tripwire over a minute."""
    scope = TripwireScope.TRIPWIRE_SCOPE_FAMILY if family else TripwireScope.TRIPWIRE_SCOPE_WORKER
    return Tripwire(name=name, classes=classes, count=count, window=Duration(seconds=60), scope=scope)


async def test_a_trip_freezes_and_is_reported_until_an_order_comes(node: Node) -> None:
    """A trip freezes once, is an event, and is reported until the controller gives an order about it."""
    worker = node.adopt("w", "", wire("two"))
    for _ in range(5):
        node.tripwires.count(worker, KEYS)
    await node.settle()
    assert node.frozen == ["w"]
    assert [name for name, *_ in node.told] == ["tripwire"]
    assert node.told[0][2]["outcome"] == "frozen"
    assert list(node.tripwires.reports()) == node.reports
    (report,) = node.reports
    assert (report.worker_id, report.frozen_worker_id, report.tripwire) == ("w", "w", "two")
    assert [(one.denial_class, one.count) for one in report.denials] == [(KEYS, 2)]
    node.tripwires.ordered("w")
    assert node.tripwires.reports() == ()
    node.tripwires.count(worker, KEYS)
    node.tripwires.count(worker, KEYS)
    await node.settle()
    assert node.frozen == ["w", "w"]


async def test_the_family_is_frozen_from_its_root(node: Node) -> None:
    """With the family's scope the topmost living ancestor is frozen, once for all who trip below it."""
    node.adopt("root")
    child = node.adopt("child", "root")
    grandchild = node.adopt("grandchild", "child", wire("one", 1, family=True))
    cousin = node.adopt("cousin", "root", wire("one", 1, family=True))
    for one in (grandchild, cousin, grandchild):
        node.tripwires.count(one, KEYS)
    await node.settle()
    assert node.frozen == ["root"]
    assert node.reports[0].worker_id == "grandchild"
    assert not child.life.ending


async def test_what_cannot_be_frozen_is_killed(node: Node) -> None:
    """Where the node cannot freeze, the worker ends instead of running on, and the event says so."""
    node.refusal = HayflickError(ErrorReason.ERROR_REASON_LIMIT_NOT_ENFORCEABLE, "no freezer")
    worker = node.adopt("w", "", wire("one", 1))
    node.tripwires.count(worker, KEYS)
    await node.settle()
    ((worker_id, ask),) = node.killed
    assert worker_id == "w"
    assert ask.detail.startswith("tripwire one")
    assert node.told[0][2]["outcome"] == "killed"


async def test_one_that_ended_meanwhile_is_let_be(node: Node) -> None:
    """A worker that ended before it could be frozen is neither killed nor reported."""
    node.refusal = HayflickError(ErrorReason.ERROR_REASON_WORKER_UNKNOWN, "gone")
    worker = node.adopt("w", "", wire("one", 1))
    node.tripwires.count(worker, KEYS)
    await node.settle()
    assert not node.killed
    assert not node.reports
    node.tripwires.forget(worker.sandbox)
    assert node.tripwires.reports() == ()


async def test_only_the_classes_that_it_names_count(node: Node) -> None:
    """A tripwire of one class is not moved by another; the counts know both."""
    worker = node.adopt("w", "", wire("census", 1, classes=(CENSUS,)))
    node.tripwires.count(worker, KEYS, 3)
    assert not node.tasks
    node.tripwires.count(worker, CENSUS)
    await node.settle()
    assert node.frozen == ["w"]
    counts = {one.denial_class: one.count for one in node.tripwires.counts(worker)}
    assert counts == {KEYS: 3, CENSUS: 1}


async def test_events_are_rare_and_the_gap_is_told(node: Node) -> None:
    """Of a burst the first ten are events, and the rest is counted in the last, at the latest at the end."""
    worker = node.adopt("w")
    for _ in range(EVENTS_AT_ONCE + 90):
        node.tripwires._denied(worker.sandbox, UNSHARE)
    assert len(node.told) == EVENTS_AT_ONCE
    assert node.told[0][2] == {
        "node_id": "n1",
        "class": "namespaces",
        "call": "unshare",
        "arguments": {"flags": "CLONE_NEWUSER"},
        "errno": "EPERM",
    }
    node.tripwires.forget(worker.sandbox)
    assert node.told[-1] == ("denial", "w", {"node_id": "n1", "left_out": {"namespaces": 90}})
    assert len(node.told) == EVENTS_AT_ONCE + 1


async def test_a_sandbox_of_no_worker_has_a_place(node: Node) -> None:
    """A denial in a predicate's sandbox is told under the place where it ran."""
    predicate = One("p", "predicates/1")
    node.tripwires.watch(predicate)  # type: ignore[arg-type]
    node.tripwires._denied(predicate, UNSHARE)  # type: ignore[arg-type]
    assert node.told[0][1] == ""
    assert node.told[0][2]["sandbox"] == "predicates/1"


async def test_a_sandbox_without_its_listener_is_refused() -> None:
    """Where the node has listeners, a sandbox whose init handed none over is not taken."""
    tripwires = Tripwires(None, "n1", listening=True)  # type: ignore[arg-type]
    try:
        with pytest.raises(SandboxError, match="no listener"):
            tripwires.watch(One("w"))  # type: ignore[arg-type]
    finally:
        tripwires.close()
