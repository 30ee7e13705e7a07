"""Programs that use services which somebody else runs, and what they may not mix."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from replication import (
    Controller,
    InvalidField,
    ReplicationContract,
    ResourceSpec,
    SandboxOrchestrator,
    ServiceUnavailable,
    StopCondition,
    StructuredLogger,
    Worker,
    _embedded,
)
from replication.testing import Services, embedded

CONTRACT = ReplicationContract(max_depth=1, max_replicas=2, cooldown_seconds=0, expiration_seconds=60)
RESOURCES = ResourceSpec(cpu_limit=1.0, memory_limit_mb=64)

PROGRAM = """
from replication import *
contract = ReplicationContract(max_depth=1, max_replicas=2, cooldown_seconds=0, expiration_seconds=60)
logger = StructuredLogger()
controller = Controller(contract, "only-for-tests", logger)
orchestrator = SandboxOrchestrator()
manifest = controller.issue_manifest(None, 0, {}, ResourceSpec(1.0, 64))
root = Worker(manifest, contract, controller, orchestrator)
root.perform_task(lambda worker: print(worker.worker_id))
print(controller.contract_id, len(logger.events) > 0)
"""


@pytest.fixture(scope="module")
def services() -> Iterator[Services]:
    """Run services for all tests here, that no object takes by itself."""
    with embedded() as running, pytest.MonkeyPatch.context() as patch:
        patch.setattr(_embedded, "_overriding", [])
        yield running


def connected(services: Services) -> tuple[Controller, SandboxOrchestrator, StructuredLogger]:
    """Return objects that use *services* by their addresses."""
    logger = StructuredLogger(services.address("logger"))
    controller = Controller.connect(
        services.address("controller"), contract=CONTRACT, secret="only-for-tests", logger=logger
    )
    return controller, SandboxOrchestrator(address=services.address("orchestrator")), logger


def test_a_worker_lives_on_services_given_by_address(services: Services) -> None:
    """Connected, everything works as it does embedded."""
    controller, orchestrator, logger = connected(services)
    manifest = controller.issue_manifest(None, 0, {"a": 1}, RESOURCES)
    with Worker(manifest, CONTRACT, controller, orchestrator, logger) as root:
        assert root.perform_task(lambda worker: worker.manifest.state_snapshot) == {"a": 1}
        assert root.worker_id in orchestrator.containers
    assert {event["contract_id"] for event in logger.events} == {controller.contract_id}


def test_the_environment_names_the_services(services: Services) -> None:
    """A program with the three variables starts none, and its workers outlive it."""
    variables = {variable: services.address(name) for name, variable in _embedded.VARIABLES.items()}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    worker_id, contract_id, saw_events = done.stdout.split()
    assert saw_events == "True"
    orchestrator = SandboxOrchestrator(address=services.address("orchestrator"))
    record = orchestrator.containers[worker_id]
    assert record.manifest.contract_id == contract_id
    assert orchestrator.kill_all("its program has gone") == [worker_id]
    assert not orchestrator.containers
    everything = StructuredLogger(services.address("logger")).events
    last = [event for event in everything if event["event"] == "worker_shutdown"][-1]
    assert (last["worker_id"], last["contract_id"]) == (worker_id, contract_id)


def test_objects_of_different_services_do_not_mix(services: Services) -> None:
    """A controller at an address and an orchestrator of one's own is an error before anything is done."""
    controller, _, _ = connected(services)
    manifest = controller.issue_manifest(None, 0, {}, RESOURCES)
    with embedded():
        own = SandboxOrchestrator()
        with pytest.raises(ValueError, match=r"^orchestrator: "):
            Worker(manifest, CONTRACT, controller, own)
    with pytest.raises(ValueError, match=r"^contract: "):
        Worker(manifest, ReplicationContract(9, 9, 9), controller, own)
    with pytest.raises(ServiceUnavailable, match="the orchestrator at unix://"):
        own.containers  # noqa: B018 -- its services are gone


def test_a_service_that_is_not_there_is_told_by_name_and_address() -> None:
    """The error says which service did not answer, and where it was looked for."""
    with pytest.raises(ServiceUnavailable, match=r"the controller at .*/c\.sock does not answer"):
        Controller.connect("unix:///nowhere/c.sock", contract=CONTRACT, secret="only-for-tests")


def test_what_the_controller_refuses_names_the_field(services: Services) -> None:
    """A rule that only the service can check is a ValueError all the same."""
    contract = ReplicationContract(1, 1, 0, stop_conditions=[StopCondition("x", cel="active_count >=")])
    with pytest.raises(InvalidField) as refused:
        Controller.connect(services.address("controller"), contract=contract, secret="only-for-tests")
    assert isinstance(refused.value, ValueError)
    assert "stop_conditions" in refused.value.details["field"]


def test_a_child_made_by_fork_is_told_that_it_needs_its_own(services: Services) -> None:
    """An object of the parent's raises at once in the child, where a call would hang."""
    program = f"""
import os
from replication import *
controller = Controller.connect("{services.address("controller")}",
    contract=ReplicationContract(1, 1, 0), secret="only-for-tests")
pid = os.fork()
if pid == 0:
    try:
        controller.registry
    except ServiceUnavailable as error:
        os._exit(42 if "forked" in str(error) else 1)
    os._exit(2)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42
assert len(controller.registry) == 0
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
