"""Isolation grades through the services: measured, signed, on record, and demanded by contracts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format

from hayflick.v1 import controller_pb2, logger_pb2
from hayflick.v1 import orchestrator_pb2 as opb
from hayflick.v1.resources_pb2 import (
    ISOLATION_GRADE_A,
    ISOLATION_GRADE_B,
    Contract,
    GradeFloor,
    Worker,
)
from hayflick_rpc import attestation
from hayflick_rpc.errors import HayflickError
from hayflick_rpc.status import from_rpc_error
from hayflick_sandbox import grades, landlock
from tests.integration.conftest import Stack, refused, request_id, running_stack, until

pytestmark = pytest.mark.root

FLOOR_A = [GradeFloor(min_grade=ISOLATION_GRADE_A)]
FLOOR_B = [GradeFloor(min_grade=ISOLATION_GRADE_B)]


class WithoutLandlock(Stack):
    """A stack whose node is let go without Landlock."""

    def program(self, name: str) -> list[str]:
        """Return what of Python is run for a service."""
        if name == "orchestrator":
            return [str(Path(__file__).with_name("no_landlock.py"))]
        return super().program(name)


@pytest.fixture(scope="module")
def lesser() -> Iterator[Stack]:
    """A stack that can give grade B at best."""
    with running_stack(WithoutLandlock, orchestrator={"allow-degraded": "landlock"}) as running:
        yield running


def recorded(stack: Stack, name: str, **filters: str) -> list[Any]:
    """Return the events of a name, as JSON."""
    filter_ = logger_pb2.EventFilter(events=[name], **filters)
    response = stack.logger.ListEvents(logger_pb2.ListEventsRequest(filter=filter_))
    return [json.loads(json_format.MessageToJson(one.event)) for one in response.events]


def whole(details: dict[str, Any]) -> dict[str, Any]:
    """Return *details* as the journal has them: protobuf's JSON makes every number a float."""
    return {name: int(value) if isinstance(value, float) else value for name, value in details.items()}


def key_of(stack: Stack) -> bytes:
    """Return the node's key, as the controller recorded it when the node connected."""
    (event,) = recorded(stack, "node_connected")
    return bytes.fromhex(event["details"]["attestation_public_key"])


def attested(stack: Stack, worker: Worker) -> Worker:
    """Return a worker once the controller knows what was found of its sandbox."""
    return until(lambda: (found := stack.worker(worker.worker_id)).HasField("attestation") and found)


def test_a_worker_here_is_sealed(stack: Stack) -> None:
    """Every check holds in a worker of this machine, and what says so verifies with the node's key."""
    launched = stack.launch()
    found = attested(stack, launched).attestation
    assert {probe.name for probe in found.probes if not probe.held} == set()
    assert {probe.name for probe in found.probes} == {check.name for check in grades.criteria(landlock.abi())}
    assert found.grade == launched.attestation.grade == ISOLATION_GRADE_A
    assert attestation.verify(found, launched.worker_id, key_of(stack))
    assert not attestation.verify(found, "another", key_of(stack))
    assert not launched.attestation.probes
    stack.stop(launched)


def test_it_is_on_record_before_the_worker_runs(stack: Stack) -> None:
    """The log has every finding, signed, before it has the worker as started; it verifies by itself."""
    worker = stack.launch()
    names = stack.events(worker.worker_id)
    assert names.index("worker_attested") < names.index("worker_started")
    (event,) = recorded(stack, "worker_attested", worker_id=worker.worker_id)
    details = whole(event["details"])
    assert details["grade"] == "A"
    assert details["failed"] == {}
    assert attestation.verify_details(details, worker.worker_id, key_of(stack))
    details["held"]["clone3"] = "EPERM"
    assert not attestation.verify_details(details, worker.worker_id, key_of(stack))
    stack.stop(worker)


def test_a_node_says_what_it_can_give(stack: Stack, lesser: Stack) -> None:
    """A node tells the best grade that its machine can give, and the key that it signs with."""
    for one, grade in ((stack, ISOLATION_GRADE_A), (lesser, ISOLATION_GRADE_B)):
        node = one.orchestrator.GetNode(opb.GetNodeRequest())
        assert node.grade == grade
        assert node.attestation_public_key == key_of(one)


def test_lists_leave_the_checks_out(stack: Stack) -> None:
    """A list of workers tells each one's grade, and not its checks."""
    worker = stack.launch()
    attested(stack, worker)
    request = controller_pb2.ListWorkersRequest(contract_id=worker.contract_id)
    (listed,) = stack.controller.ListWorkers(request).workers
    assert listed.attestation.grade == ISOLATION_GRADE_A
    assert not listed.attestation.probes
    assert not stack.sandboxes()[worker.worker_id].worker.attestation.probes
    stack.stop(worker)


def test_less_than_the_contract_demands_never_runs(lesser: Stack) -> None:
    """A sandbox below the floor is refused by name of the check, its slot comes back, nothing is left."""
    contract_id = lesser.contract(grade_floors=FLOOR_A)
    manifest = lesser.manifest(contract_id)
    request = opb.LaunchWorkerRequest(request_id=request_id(), manifest=manifest)
    with pytest.raises(grpc.RpcError) as caught:
        lesser.orchestrator.LaunchWorker(request)
    refusal = from_rpc_error(caught.value)
    assert isinstance(refusal, HayflickError)
    assert refusal.reason_name == "ISOLATION_INSUFFICIENT"
    assert refusal.metadata == {"grade": "B", "min_grade": "A", "probe": "landlock-files"}
    assert lesser.end_reason(manifest.worker_id) == "LAUNCH_FAILED"
    assert manifest.worker_id not in lesser.sandboxes()
    request_ = controller_pb2.GetContractRequest(contract_id=contract_id)
    contract: Contract = lesser.controller.GetContract(request_).contract
    assert contract.active_count == contract.reserved_count == 0
    names = until(lambda: "isolation_insufficient" in (found := lesser.events(manifest.worker_id)) and found)
    assert "worker_started" not in names
    (event,) = recorded(lesser, "isolation_insufficient", worker_id=manifest.worker_id)
    assert event["details"]["failed"] == {"landlock-files": "EPERM", "landlock-scopes": "allowed"}
    assert event["details"]["min_grade"] == "A"


def test_what_is_demanded_by_generation(lesser: Stack) -> None:
    """A root that is good enough runs with the grade it has; its child, who must have more, does not."""
    floors = [*FLOOR_B, GradeFloor(from_depth=1, min_grade=ISOLATION_GRADE_A)]
    contract_id = lesser.contract(grade_floors=floors)
    root = lesser.launch(contract_id)
    found = attested(lesser, root)
    assert found.attestation.grade == ISOLATION_GRADE_B
    assert list(found.degraded_layers) == ["landlock"]
    assert {probe.name for probe in found.attestation.probes if not probe.held} == {
        "landlock-files",
        "landlock-scopes",
    }
    with refused("ISOLATION_INSUFFICIENT"):
        lesser.launch(contract_id, root.worker_id)
    assert lesser.run(root, opb.Task(command=opb.Command(argv=["/bin/true"]))).outcome == "SUCCEEDED"
    lesser.stop(root)
