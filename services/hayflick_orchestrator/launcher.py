"""The way of one birth on this node: check, register, build, record, answer.

Whatever fails gives the slot back and leaves nothing: no process, no control
group, no host user id, no channel. An order that arrives meanwhile wins.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from hayflick.v1.errors_pb2 import ErrorReason
from hayflick.v1.resources_pb2 import Attestation, EndReason, Exit, Manifest
from hayflick.v1.resources_pb2 import Worker as WorkerMessage
from hayflick_orchestrator.attestation import LEAST_GRADE, require
from hayflick_orchestrator.controller_client import Registration
from hayflick_orchestrator.lifecycle import Ask
from hayflick_orchestrator.narrowing import widening
from hayflick_orchestrator.requests import bounds_of, check_manifest, policy_of
from hayflick_orchestrator.workers import Birth, Worker, quarantined
from hayflick_rpc import wire
from hayflick_rpc.attestation import grade_name
from hayflick_rpc.errors import HayflickError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hayflick.v1.controller_pb2 import ContractTerms
    from hayflick_orchestrator.attestation import Attestor
    from hayflick_orchestrator.controller_client import ControllerClient
    from hayflick_orchestrator.host import Host
    from hayflick_orchestrator.records import Records
    from hayflick_orchestrator.sandboxes import Sandbox
    from hayflick_orchestrator.supervisor import Everyone, Supervisor
    from hayflick_orchestrator.ways_out import WaysOut
    from hayflick_sandbox.messages import Finding
    from hayflick_sandbox.policy import Policy

# How long an answer that says no waits for the slot to be given back; giving
# it back goes on afterwards until the controller took it.
GIVE_BACK_SECONDS = 5.0

# What this node refuses although the controller allowed it, as the audit log names it.
_CONTAINED = {
    ErrorReason.ERROR_REASON_HELD_BY_KERNEL: "deny_held_by_kernel",
    ErrorReason.ERROR_REASON_EXCEEDS_PARENT: "deny_exceeds_parent",
}

log = logging.getLogger(__name__)


class Launcher:
    """Turns manifests into workers."""

    def __init__(
        self,
        host: Host,
        population: Everyone,
        supervisor: Supervisor,
        controller: ControllerClient,
        records: Records,
        *,
        attestor: Attestor,
        degraded: Sequence[str],
        ready_timeout_seconds: float,
        open_doors: Callable[[Worker], None],
        ways_out: WaysOut,
    ) -> None:
        self._open_doors = open_doors
        self._ways_out = ways_out
        self._host = host
        self._population = population
        self._supervisor = supervisor
        self._controller = controller
        self._records = records
        self._attestor = attestor
        self._degraded = tuple(degraded)
        self._ready_timeout_seconds = ready_timeout_seconds
        self._closed = False

    def close(self) -> None:
        """Begin no more births."""
        self._closed = True

    def require_open(self) -> None:
        """Return when this node may begin a birth.

        Raises:
            HayflickError: SHUTTING_DOWN; LIMIT_NOT_ENFORCEABLE, naming the first
                layer that is missing and that nobody let go by name.
        """
        if self._closed or not self._host.alive:
            raise HayflickError(ErrorReason.ERROR_REASON_SHUTTING_DOWN, "the node is shutting down")
        self._host.require_enforceable()

    async def launch(self, manifest: Manifest) -> Worker:
        """Return the worker that *manifest* allows, running and on record.

        Raises:
            HayflickError: the controller's denial; PARENT_UNKNOWN when the
                parent does not live on this node; INVALID_FIELD,
                LIMIT_NOT_ENFORCEABLE, NODE_FULL, SANDBOX_FAILED,
                ISOLATION_INSUFFICIENT, AUDIT_UNAVAILABLE, SHUTTING_DOWN; KILL_SWITCH_ENGAGED,
                QUARANTINED or WORKER_NOT_RUNNING when an order came meanwhile.
        """
        self.require_open()
        check_manifest(manifest)
        policy = policy_of(manifest.resources, manifest.worker_id)
        if policy.external:
            self._ways_out.require()  # said before a slot is taken
        birth = Birth(manifest)
        self._population.conceive(birth)
        try:
            worker = await self._bear(birth, manifest, policy)
        finally:
            self._population.settle(birth)
            if not birth.settled.done():
                birth.settled.set_result(None)
        try:
            await self._records.worker_started(
                worker.record,
                worker.attestation,
                host_pid=worker.sandbox.pid or 0,
                host_uid=worker.sandbox.uid,
                build_seconds=worker.sandbox.build_seconds,
            )
        except HayflickError as refusal:
            await self._supervisor.end(
                worker, Ask(EndReason.END_REASON_LAUNCH_FAILED, f"not recorded: {refusal.reason_name}")
            )
            raise
        worker.require_running()  # an order may have come while the record was made
        return worker

    async def _bear(self, birth: Birth, manifest: Manifest, policy: Policy) -> Worker:
        registration = Registration(manifest, self._degraded)
        try:
            record = await self._controller.register(registration)
        except HayflickError as refusal:
            if refusal.reason == ErrorReason.ERROR_REASON_SERVICE_UNAVAILABLE:
                self._find_out(birth, registration, "the controller's answer was lost")
            raise
        except asyncio.CancelledError:
            self._find_out(birth, registration, "the node is shutting down")
            raise
        birth.registered = True
        try:
            return await self._build(birth, record, registration.terms, policy)
        except BaseException as error:
            await self._give_back(birth, error)
            raise

    def _find_out(self, birth: Birth, registration: Registration, detail: str) -> None:
        """See that a slot which may have been committed comes back, and no other."""

        async def give_back() -> None:
            record = await self._controller.settle(registration)
            if record is not None:
                await self._deregister(birth, detail)

        if registration.sent:
            self._supervisor.spawn(give_back(), f"give back {birth.worker_id}")

    async def _build(
        self, birth: Birth, record: WorkerMessage, terms: ContractTerms, policy: Policy
    ) -> Worker:
        birth.check()
        birth.cgroup_path = self._place(record)
        attestation = Attestation()

        def approve(findings: tuple[Finding, ...]) -> None:
            attestation.CopyFrom(self._attest(record, terms, findings, policy))

        try:
            sandbox = await self._host.launch(
                birth.cgroup_path,
                policy,
                bounds=bounds_of(terms),
                ready_timeout_seconds=self._ready_timeout_seconds,
                still_wanted=birth.check,
                approve=approve,
                way_out=self._ways_out if policy.external else None,
            )
        except HayflickError as refusal:
            self._host.forget_contract(record.contract_id)
            self._note_contained(record, refusal)
            birth.check()  # killed on order: say so, rather than that building failed
            raise
        # From here on nothing is awaited until the worker is adopted, so no
        # order can fall between the birth and the life.
        if birth.ask is not None or birth.frozen or self._closed:
            await self._host.undo(sandbox)
            self._host.forget_contract(record.contract_id)
            birth.check()
            self.require_open()
        try:
            self._require_narrower(record, sandbox, policy)
        except HayflickError as refusal:
            await self._host.undo(sandbox)
            self._host.forget_contract(record.contract_id)
            self._note_contained(record, refusal)
            raise
        record.manifest.CopyFrom(birth.manifest)
        worker = Worker.of(record, terms, attestation, sandbox)
        worker.expire_from(birth.begin_boot)
        if birth.network is not None:
            worker.record.resources.network.CopyFrom(birth.network)
        self._open_doors(worker)
        self._supervisor.adopt(worker)
        return worker

    def _attest(
        self, record: WorkerMessage, terms: ContractTerms, findings: tuple[Finding, ...], policy: Policy
    ) -> Attestation:
        """Return what was found, signed, when it is enough for *terms*; else put it on record.

        Raises:
            HayflickError: ISOLATION_INSUFFICIENT.
        """
        attested = self._attestor.attest(record.worker_id, findings, datetime.now(UTC), inet=policy.inet)
        floor = grade_name(terms.min_grade)
        try:
            require(attested.verdict, floor)
        except HayflickError:
            self._records.isolation_insufficient(record, attested.message, floor or LEAST_GRADE)
            raise
        return attested.message

    def _require_narrower(self, record: WorkerMessage, sandbox: Sandbox, policy: Policy) -> None:
        """Return when the kernel holds the worker to no more than its parent; a root has none.

        Raises:
            HayflickError: EXCEEDS_PARENT; PARENT_UNKNOWN when the parent died meanwhile;
                SANDBOX_FAILED when the worker did.
        """
        if not record.parent_id:
            return
        parent = self._require_parent(record)
        try:
            above = self._host.kernel_facts(
                parent.sandbox, policy_of(parent.record.resources, parent.worker_id)
            )
        except OSError as error:
            raise _parent_unknown(record.parent_id) from error
        try:
            own = self._host.kernel_facts(sandbox, policy)
        except OSError as error:
            raise HayflickError(
                ErrorReason.ERROR_REASON_SANDBOX_FAILED,
                f"the sandbox died before it could be compared with its parent's: {error}",
                metadata={"step": "compare", "errno": errno.errorcode.get(error.errno or 0, "0")},
            ) from error
        found = widening(own, above)
        if found is not None:
            raise HayflickError(
                ErrorReason.ERROR_REASON_EXCEEDS_PARENT,
                f"{found.field}: the child would hold more than its parent, which has {found.limit}",
                metadata={"field": found.field, "limit": found.limit},
            )

    def _note_contained(self, record: WorkerMessage, refusal: HayflickError) -> None:
        if refusal.reason in _CONTAINED:
            self._records.birth_refused(record, _CONTAINED[refusal.reason], refusal.metadata)

    def _place(self, record: WorkerMessage) -> str:
        """Return where in the lineage tree the worker belongs.

        Raises:
            HayflickError: PARENT_UNKNOWN, QUARANTINED.
        """
        if not record.parent_id:
            return f"{record.contract_id}/{record.worker_id}"
        parent = self._require_parent(record)
        if parent.held:  # since the controller was asked
            raise quarantined(record.parent_id)
        return f"{parent.cgroup_path}/{record.worker_id}"

    def _require_parent(self, record: WorkerMessage) -> Worker:
        parent = self._population.get(record.parent_id)
        if parent is None or parent.life.ending or parent.contract_id != record.contract_id:
            raise _parent_unknown(record.parent_id)
        return parent

    async def _give_back(self, birth: Birth, error: BaseException) -> None:
        work = self._supervisor.spawn(
            self._deregister(birth, str(error) or type(error).__name__), f"give back {birth.worker_id}"
        )
        await asyncio.wait({work}, timeout=GIVE_BACK_SECONDS)

    async def _deregister(self, birth: Birth, detail: str) -> None:
        ask = birth.ask or Ask(EndReason.END_REASON_LAUNCH_FAILED, detail[:256])
        exit_ = Exit(reason=ask.reason, detail=ask.detail, end_time=wire.timestamp(datetime.now(UTC)))
        await self._controller.deregister(birth.worker_id, exit_, None)


def _parent_unknown(parent_id: str) -> HayflickError:
    return HayflickError(
        ErrorReason.ERROR_REASON_PARENT_UNKNOWN,
        f"parent {parent_id} does not live on this node; a child runs where its parent does",
        metadata={"parent_id": parent_id},
    )
