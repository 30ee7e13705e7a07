"""The authority: who may be born, who lives, who must end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from hayflick.v1 import controller_pb2, controller_pb2_grpc, resources_pb2
from replication import _checks, _embedded, _rpc, _wire
from replication._callables import MAX_PREDICATE_BYTES, PYTHON_VERSION, pickle_callable
from replication._contract import MAX_SECONDS, StopCondition
from replication._manifest import MAX_SNAPSHOT_BYTES, MAX_UINT32
from replication._records import Lineage, RegistryEntry, Stage
from replication.contract import Manifest, NetworkPolicy, ReplicationContract, ResourceSpec
from replication.errors import ReplicationDenied
from replication.observability import StructuredLogger
from replication.signer import check_secret

if TYPE_CHECKING:
    from replication.orchestrator import SandboxOrchestrator

__all__ = ["Controller", "KillSwitchResult", "Lineage", "RegistryEntry", "ReplicationDenied"]

MAX_KILL_SECONDS = 60.0
MAX_REASON_CHARS = 256
PAGE_SIZE = 1_000

_LIVE_STATES = [
    resources_pb2.STATE_STARTING,
    resources_pb2.STATE_RUNNING,
    resources_pb2.STATE_QUARANTINED,
    resources_pb2.STATE_STOPPING,
]


@dataclass(frozen=True)
class KillSwitchResult:
    """What the kill switch did.

    Attributes:
        worker_ids: The workers seen dead.
        unconfirmed_worker_ids: Those not seen dead in time; they stay under pursuit.
        seconds: From the durable latch to the last confirmation.
    """

    worker_ids: tuple[str, ...]
    unconfirmed_worker_ids: tuple[str, ...]
    seconds: float

    @property
    def count(self) -> int:
        """How many workers were seen dead."""
        return len(self.worker_ids)


class Controller:
    """A contract and its authority.

    Making one creates the contract in the controller service, with a signing key
    from *secret*. Without an address the services are started for this program,
    once; the variables ``HAYFLICK_CONTROLLER``, ``HAYFLICK_ORCHESTRATOR`` and
    ``HAYFLICK_LOGGER`` name others.

    Args:
        contract: The policy. It cannot be changed afterwards.
        secret: Signs manifests; 8 to 1,024 characters. Kept by the service alone.
        logger: Will show this contract's events and metrics.

    Raises:
        ValueError: The secret or a stop condition is not valid.
        NotPicklable, TooLarge: A predicate cannot travel.
        ServiceUnavailable: The service is not there, or did not start.
    """

    def __init__(
        self,
        contract: ReplicationContract,
        secret: str,
        logger: StructuredLogger | None = None,
    ) -> None:
        self._create(contract, secret, logger, None)

    @classmethod
    def connect(
        cls,
        address: str,
        *,
        contract: ReplicationContract,
        secret: str,
        logger: StructuredLogger | None = None,
    ) -> Self:
        """Return a controller for a new contract in the service at *address*, ``unix:///…``.

        Raises:
            ValueError: *address* is not a Unix socket; else as the constructor.
        """
        _embedded.require_address("address", address)
        controller = cls.__new__(cls)
        controller._create(contract, secret, logger, address)  # noqa: SLF001 -- our own
        return controller

    def _create(
        self,
        contract: ReplicationContract,
        secret: str,
        logger: StructuredLogger | None,
        address: str | None,
    ) -> None:
        if not isinstance(contract, ReplicationContract):
            raise ValueError(f"contract: must be a ReplicationContract, not {contract!r}")  # noqa: TRY004 -- as all bad values
        check_secret(secret)
        wire = _rpc.from_json(_wire.contract_to_json(contract), resources_pb2.Contract())
        wire.stop_conditions.extend(_stop_condition(condition) for condition in contract.stop_conditions)
        self._endpoint = _embedded.resolve("controller", address)
        self._connection = _rpc.connect(self._endpoint)
        self._stub = controller_pb2_grpc.ControllerServiceStub(self._connection.channel)
        request = controller_pb2.CreateContractRequest(
            request_id=_rpc.request_id(), contract=wire, secret=secret
        )
        created = self._connection.call(self._stub.CreateContract, request).contract
        self.contract = contract
        self.contract_id = created.contract_id
        self.logger = logger if logger is not None else StructuredLogger()
        self.logger.follow(self.contract_id)

    def __repr__(self) -> str:
        return f"<Controller contract_id={self.contract_id} at {self._endpoint.address}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Controller stays outside; a task replicates by the worker it is given")

    def shares_services_with(self, orchestrator: SandboxOrchestrator) -> bool:
        """Return whether *orchestrator* is not known to belong to other services."""
        return self._endpoint.runtime is orchestrator.endpoint.runtime

    # Births.

    def issue_manifest(
        self,
        parent_id: str | None,
        depth: int,
        state_snapshot: Mapping[str, Any],
        resources: ResourceSpec | None = None,
        *,
        reason: str = "",
    ) -> Manifest:
        """Ask for one birth; when allowed, its slot is reserved and the manifest signed.

        Args:
            parent_id: The parent; ``None`` for a root.
            depth: 0 for a root. Of a child it is the parent's plus one, whatever
                is given here.
            state_snapshot: What the worker starts from: JSON values, 1 MiB at most.
            resources: What it may use; a child's default is its parent's.
            reason: Why, for the audit log; 256 characters.

        Raises:
            ReplicationDenied: Policy says no; ``reason`` says which rule.
            ValueError: An argument is not valid.
            ServiceUnavailable: The service is not there, or cannot record.
        """
        request = controller_pb2.IssueManifestRequest(
            request_id=_rpc.request_id(),
            contract_id=self.contract_id,
            parent_id="" if parent_id is None else _checks.text("parent_id", parent_id, 128),
            depth=_checks.integer("depth", depth, 0, MAX_UINT32),
            state_snapshot_json=_checks.json_object("state_snapshot", state_snapshot, MAX_SNAPSHOT_BYTES),
            reason=_checks.text("reason", reason, MAX_REASON_CHARS),
        )
        if resources is None and not request.parent_id:
            raise ValueError("resources: a root needs them; only a child inherits its parent's")
        if resources is not None:
            if not isinstance(resources, ResourceSpec):
                raise ValueError(f"resources: must be a ResourceSpec, not {resources!r}")
            _rpc.from_json(_wire.resources_to_json(resources), request.resources)
        answer = self._connection.call(self._stub.IssueManifest, request)
        return _wire.manifest_from_json(_rpc.to_json(answer.manifest))

    # Who lives.

    @property
    def registry(self) -> Mapping[str, RegistryEntry]:
        """The workers of the contract that live now, by id, oldest first."""
        entries: dict[str, RegistryEntry] = {}
        token = ""
        while True:
            request = controller_pb2.ListWorkersRequest(
                contract_id=self.contract_id, states=_LIVE_STATES, page_size=PAGE_SIZE, page_token=token
            )
            answer = self._connection.call(self._stub.ListWorkers, request)
            for worker in answer.workers:
                entries[worker.worker_id] = _entry(worker)
            token = answer.next_page_token
            if not token:
                return MappingProxyType(entries)

    def worker(self, worker_id: str) -> RegistryEntry:
        """Return the record of one worker, living or ended.

        Raises:
            NotFound: There is none.
        """
        request = controller_pb2.GetWorkerRequest(worker_id=_worker_id(worker_id))
        return _entry(self._connection.call(self._stub.GetWorker, request).worker)

    def lineage(self, worker_id: str) -> Lineage:
        """Return a worker's family, the dead included.

        Raises:
            NotFound: There is no such worker.
        """
        request = controller_pb2.GetLineageRequest(worker_id=_worker_id(worker_id))
        answer = self._connection.call(self._stub.GetLineage, request)
        return Lineage(
            ancestors=tuple(_entry(worker) for worker in answer.ancestors),
            worker=_entry(answer.worker),
            descendants=tuple(_entry(worker) for worker in answer.descendants),
        )

    # Who must end.

    @property
    def kill_switch_engaged(self) -> bool:
        """Whether the switch over the whole contract is engaged now."""
        request = controller_pb2.GetContractRequest(contract_id=self.contract_id)
        return self._connection.call(self._stub.GetContract, request).contract.kill_switch.engaged

    def kill_switch(
        self,
        orchestrator: SandboxOrchestrator | None = None,
        *,
        reason: str = "kill_switch",
        subtree_of: str | None = None,
        timeout_seconds: float = 10.0,
    ) -> KillSwitchResult:
        """Forbid births, durably, and end every worker; return when all are seen dead.

        Args:
            orchestrator: Not needed: every node that runs a worker of the contract
                is told.
            reason: Why, for the audit log; 256 characters.
            subtree_of: Only this worker and its descendants; ``None``: the contract.
            timeout_seconds: How long to wait for confirmations; 60 at most.

        Raises:
            NotFound: There is no such worker.
            ServiceUnavailable: The service is not there, or cannot record.
        """
        del orchestrator
        _checks.number("timeout_seconds", timeout_seconds, 0.001, MAX_KILL_SECONDS)
        request = controller_pb2.EngageKillSwitchRequest(
            request_id=_rpc.request_id(), scope=self._scope(subtree_of), reason=_reason(reason)
        )
        request.timeout.FromMicroseconds(round(timeout_seconds * 1_000_000))
        answer = self._connection.call(
            self._stub.EngageKillSwitch, request, timeout_seconds + _rpc.CALL_SECONDS
        )
        return KillSwitchResult(
            worker_ids=tuple(answer.worker_ids),
            unconfirmed_worker_ids=tuple(answer.unconfirmed_worker_ids),
            seconds=answer.elapsed.ToNanoseconds() / 1_000_000_000,
        )

    def release_kill_switch(self, reason: str, *, subtree_of: str | None = None) -> None:
        """Allow births again. Manifests issued before stay void.

        Args:
            reason: Why, for the audit log; 256 characters.
            subtree_of: As it was engaged.

        Raises:
            NotFound: There is no such worker.
            ServiceUnavailable: The service is not there, or cannot record.
        """
        request = controller_pb2.ReleaseKillSwitchRequest(
            request_id=_rpc.request_id(), scope=self._scope(subtree_of), reason=_reason(reason)
        )
        self._connection.call(self._stub.ReleaseKillSwitch, request)

    def reap_stale_workers(
        self, timeout: timedelta | float, orchestrator: SandboxOrchestrator | None = None
    ) -> list[str]:
        """End the contract's workers that were not heard of for longer than *timeout*.

        Args:
            timeout: A timedelta, or seconds.
            orchestrator: Not needed: each worker's own node is told.

        Returns:
            The ids of those that were ended, as ``heartbeat_timeout``.

        Raises:
            ServiceUnavailable: The service is not there, or cannot record.
        """
        del orchestrator
        length = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
        _checks.number("timeout", length, 0, MAX_SECONDS)
        request = controller_pb2.ReapStaleWorkersRequest(
            request_id=_rpc.request_id(), contract_id=self.contract_id
        )
        request.timeout.FromMicroseconds(round(length * 1_000_000))
        return list(self._connection.call(self._stub.ReapStaleWorkers, request).worker_ids)

    # Quarantine.

    def mark_quarantined(self, worker_id: str, reason: str = "quarantined by its owner") -> list[str]:
        """Freeze a worker and all its descendants, and forbid them births.

        Returns:
            The ids of the workers confirmed frozen.

        Raises:
            NotFound: There is no such worker.
            ServiceUnavailable: The service is not there, or cannot record.
        """
        request = controller_pb2.QuarantineWorkerRequest(
            request_id=_rpc.request_id(), worker_id=_worker_id(worker_id), reason=_reason(reason)
        )
        return list(self._connection.call(self._stub.QuarantineWorker, request).worker_ids)

    def clear_quarantine(self, worker_id: str, reason: str = "released by its owner") -> list[str]:
        """Thaw a worker and its descendants where they stood.

        Returns:
            The ids of the workers confirmed thawed.

        Raises:
            NotFound: There is no such worker.
            ServiceUnavailable: The service is not there, or cannot record.
        """
        request = controller_pb2.ReleaseQuarantineRequest(
            request_id=_rpc.request_id(), worker_id=_worker_id(worker_id), reason=_reason(reason)
        )
        return list(self._connection.call(self._stub.ReleaseQuarantine, request).worker_ids)

    def is_quarantined(self, worker_id: str) -> bool:
        """Return whether a worker is frozen now.

        Raises:
            NotFound: There is no such worker.
        """
        return self.worker(worker_id).stage is Stage.QUARANTINED

    def narrow_network(
        self, worker_id: str, network: NetworkPolicy, reason: str = "narrowed by its owner"
    ) -> None:
        """Leave a living worker no more than *network*, and its descendants no more than that.

        Returns once that is in force: connections that are no longer allowed
        are cut. Nothing that was taken can be given back.

        Raises:
            NotFound: There is no such worker.
            NotAllowed: *network* is wider in some field than what it has.
            LimitNotEnforceable: Its own loopback were to be taken, which lasts as long as it lives.
            ServiceUnavailable: A node did not confirm; it is told again until it does.
        """
        request = controller_pb2.NarrowNetworkRequest(
            request_id=_rpc.request_id(), worker_id=_worker_id(worker_id), reason=_reason(reason)
        )
        # Set even when it is empty: an empty policy leaves nothing.
        request.network.SetInParent()
        _rpc.from_json(_wire.network_to_json(network), request.network)
        self._connection.call(self._stub.NarrowNetwork, request)

    def _scope(self, subtree_of: str | None) -> controller_pb2.Scope:
        if subtree_of is None:
            return controller_pb2.Scope(contract_id=self.contract_id)
        return controller_pb2.Scope(worker_id=_worker_id(subtree_of, "subtree_of"))


def _stop_condition(condition: StopCondition) -> resources_pb2.StopCondition:
    wire = resources_pb2.StopCondition(name=condition.name, description=condition.description)
    if condition.cel is not None:
        wire.cel = condition.cel
        return wire
    field = f"stop_conditions[{condition.name!r}].predicate"
    wire.python.pickled = pickle_callable(condition.predicate, field, MAX_PREDICATE_BYTES)
    wire.python.python_version = PYTHON_VERSION
    if condition.timeout_seconds is not None:
        wire.python.timeout.FromMicroseconds(round(condition.timeout_seconds * 1_000_000))
    return wire


def _entry(worker: resources_pb2.Worker) -> RegistryEntry:
    return _wire.worker_from_json(_rpc.to_json(worker))


def _worker_id(value: str, field: str = "worker_id") -> str:
    return _checks.text(field, value, 64, min_chars=1)


def _reason(value: str) -> str:
    return _checks.text("reason", value, MAX_REASON_CHARS, min_chars=1)
