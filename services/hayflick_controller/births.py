"""Births: manifests issued, workers registered. Reads the facts, asks the rules, writes the outcome."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hayflick.v1 import controller_pb2
from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_controller import (
    admission,
    clock,
    conditions,
    events,
    lineage,
    nodes,
    predicates,
    render,
    signing,
)
from hayflick_controller.admission import Denial, Facts, Presented
from hayflick_controller.decisions import Decisions, Form, Request
from hayflick_controller.facts import read_facts, require_contract, without_own
from hayflick_controller.model import (
    Contract,
    Manifest,
    ManifestStatus,
    Resources,
    State,
    StopCondition,
    Worker,
)
from hayflick_rpc.errors import HayflickError, invalid_field

if TYPE_CHECKING:
    from hayflick_controller.store import Tx

MAX_EVALUATIONS = 5
"""How often predicates are asked anew because the population changed meanwhile."""


@dataclass(frozen=True, slots=True)
class Wish:
    """A birth that somebody wants."""

    contract_id: str
    parent_id: str
    depth: int | None
    state_snapshot_json: str
    resources: Resources | None
    reason: str


@dataclass(frozen=True, slots=True)
class Registration:
    """A birth that a node is about to carry out."""

    manifest: Manifest
    node_id: str
    session: str
    degraded_layers: tuple[str, ...]


class _NeedsVerdicts(Exception):
    """The rules allow a birth and only predicates are left to be asked, outside the transaction."""

    def __init__(
        self, stop_conditions: tuple[StopCondition, ...], context: dict[str, object], version: int
    ) -> None:
        super().__init__(version)
        self.stop_conditions = stop_conditions
        self.context = context
        self.version = version


class Births:
    """See the module.

    Args:
        decisions: Takes them.
        nodes_: Evaluate predicates.
        clock_: The time.
    """

    def __init__(self, decisions: Decisions, nodes_: nodes.Nodes, clock_: clock.Clock) -> None:
        self._decisions = decisions
        self._nodes = nodes_
        self._clock = clock_
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def issue(self, request: Request, wish: Wish) -> controller_pb2.IssueManifestResponse:
        """Reserve a slot and sign a manifest for it.

        Raises:
            HayflickError: The denial; CONTRACT_UNKNOWN; INVALID_FIELD when a
                root has no resources.
        """

        def restore(
            tx: Tx, kept: controller_pb2.IssueManifestResponse
        ) -> controller_pb2.IssueManifestResponse:
            if found := tx.manifest(kept.manifest.manifest_id, with_snapshot=True):
                kept.manifest.state_snapshot_json = found[0].state_snapshot_json
            return kept

        form = Form[Manifest, controller_pb2.IssueManifestResponse](
            controller_pb2.IssueManifestResponse,
            lambda manifest: controller_pb2.IssueManifestResponse(manifest=render.manifest(manifest)),
            keep=lambda manifest: controller_pb2.IssueManifestResponse(
                manifest=render.manifest(manifest, with_snapshot=False)
            ),
            restore=restore,
        )
        return await self._decisions.take(
            request, lambda tx: self._issue(tx, wish), form, undo=self._take_back_manifest
        )

    async def register(
        self, request: Request, registration: Registration
    ) -> controller_pb2.RegisterWorkerResponse:
        """Commit the birth that a manifest allows.

        Raises:
            HayflickError: The denial; NODE_SESSION_INVALID.
        """
        try:
            return await self._register(request, registration, None)
        except _NeedsVerdicts:
            # One after the other per contract: each sees the population that
            # the one before left, and the verdicts seldom go stale.
            async with self._locks[registration.manifest.contract_id]:
                return await self._register_with_verdicts(request, registration)

    async def _register_with_verdicts(
        self, request: Request, registration: Registration
    ) -> controller_pb2.RegisterWorkerResponse:
        verdicts: predicates.Verdicts | None = None
        for _ in range(MAX_EVALUATIONS + 1):
            try:
                return await self._register(request, registration, verdicts)
            except _NeedsVerdicts as needed:
                verdicts = await predicates.ask(
                    self._nodes.connected(),
                    registration.node_id,
                    needed.stop_conditions,
                    needed.context,
                    needed.version,
                )
        raise HayflickError(
            ErrorReason.ERROR_REASON_STOP_CONDITION_TRIGGERED,
            "the population changed faster than its stop conditions could be evaluated",
            metadata={"condition": "", "cause": "timeout"},
            retry_after_seconds=1.0,
        )

    async def _register(
        self, request: Request, registration: Registration, verdicts: predicates.Verdicts | None
    ) -> controller_pb2.RegisterWorkerResponse:
        def restore(
            tx: Tx, kept: controller_pb2.RegisterWorkerResponse
        ) -> controller_pb2.RegisterWorkerResponse:
            manifest = kept.worker.manifest
            if found := tx.manifest(manifest.manifest_id, with_snapshot=True):
                manifest.state_snapshot_json = found[0].state_snapshot_json
            return kept

        form = Form[Worker, controller_pb2.RegisterWorkerResponse](
            controller_pb2.RegisterWorkerResponse,
            lambda worker: controller_pb2.RegisterWorkerResponse(
                worker=render.worker(worker, with_snapshot=True)
            ),
            keep=lambda worker: controller_pb2.RegisterWorkerResponse(worker=render.worker(worker)),
            restore=restore,
        )
        return await self._decisions.take(
            request,
            lambda tx: self._decide_register(tx, registration, verdicts),
            form,
            undo=self._take_back_worker,
        )

    def _issue(self, tx: Tx, wish: Wish) -> Manifest | Denial:
        now_us = self._clock()
        contract = require_contract(tx, wish.contract_id)
        facts = read_facts(tx, contract, wish.parent_id, now_us, issuing=True)
        decision = admission.decide_issue(facts, wish.depth)
        if _quota(decision) and _return_expired(tx, contract, now_us):
            facts = replace(facts, contract=require_contract(tx, wish.contract_id))
            decision = admission.decide_issue(facts, wish.depth)
        root_id = facts.parent.root_id if facts.parent else ""
        if isinstance(decision, Denial):
            tx.record(
                events.denied(
                    decision,
                    now_us,
                    contract_id=contract.contract_id,
                    parent_id=wish.parent_id,
                    root_id=root_id,
                    reason=wish.reason,
                )
            )
            return decision
        resources = wish.resources or (facts.parent.manifest.resources if facts.parent else None)
        if resources is None:
            raise invalid_field("resources", "is required for a root")
        manifest = Manifest(
            manifest_id=clock.new_manifest_id(),
            contract_id=contract.contract_id,
            worker_id=clock.new_worker_id(),
            parent_id=wish.parent_id,
            depth=decision.depth,
            epoch=decision.epoch,
            state_snapshot_json=wish.state_snapshot_json,
            resources=resources,
            issue_us=now_us,
            expire_us=now_us + contract.policy.manifest_ttl_us,
            key_id=contract.key_id,
        )
        secret = tx.secret(contract.key_id, contract.contract_id)
        assert secret is not None, "a contract is created with its key"
        manifest = signing.sign(manifest, secret)
        tx.add_manifest(manifest)
        tx.record(events.replication_requested(manifest, root_id or manifest.worker_id, wish.reason))
        return manifest

    def _decide_register(
        self, tx: Tx, registration: Registration, verdicts: predicates.Verdicts | None
    ) -> Worker | Denial:
        now_us = self._clock()
        manifest = registration.manifest
        nodes.require_session(tx, registration.node_id, registration.session)
        secret = tx.secret(manifest.key_id, manifest.contract_id)
        valid = secret is not None and signing.verify(manifest, secret)
        status = tx.manifest_status(manifest.manifest_id) if valid else None
        presented = Presented(manifest, valid, status)
        denial = admission.check_presented(presented)
        if denial is not None:
            return _deny(tx, denial, manifest, now_us)
        contract = require_contract(tx, manifest.contract_id)
        decision, facts = self._apply_rules(tx, contract, presented, now_us)
        denial = decision if isinstance(decision, Denial) else None
        if denial is None and contract.policy.stop_conditions:
            denial = _ask_conditions(tx, facts, manifest, verdicts)
        if denial is not None:
            root_id = facts.parent.root_id if facts.parent else ""
            return _deny(tx, denial, manifest, now_us, root_id)
        worker = _newborn(registration, facts)
        tx.settle(manifest.manifest_id, ManifestStatus.REGISTERED)
        tx.add_worker(worker)
        tx.record(events.worker_registered(worker))
        return worker

    @staticmethod
    def _apply_rules(
        tx: Tx, contract: Contract, presented: Presented, now_us: int
    ) -> tuple[admission.Grant | Denial, Facts]:
        manifest = presented.manifest
        own = int(presented.status is ManifestStatus.RESERVED)
        facts = read_facts(tx, contract, manifest.parent_id, now_us, issuing=False, own_reservations=own)
        decision = admission.decide_register(facts, presented)
        if _quota(decision) and _return_expired(tx, contract, now_us):
            presented = replace(presented, status=tx.manifest_status(manifest.manifest_id))
            own = int(presented.status is ManifestStatus.RESERVED)
            contract = require_contract(tx, manifest.contract_id)
            facts = replace(facts, contract=without_own(contract, own))
            decision = admission.decide_register(facts, presented)
        return decision, facts

    def _take_back_manifest(self, tx: Tx, manifest: Manifest) -> None:
        tx.settle(manifest.manifest_id, ManifestStatus.RETURNED)
        tx.record(events.undone("replication", manifest, self._clock()))

    def _take_back_worker(self, tx: Tx, worker: Worker) -> None:
        found = tx.worker(worker.worker_id)
        if found is None or found.state is not State.STARTING:
            return  # something else is ending it already, and records that
        tx.remove_worker(worker)
        # The manifest is good again: nothing was born of it.
        tx.settle(worker.manifest.manifest_id, ManifestStatus.RESERVED)
        tx.record(events.undone("registration", worker.manifest, self._clock()))


def _ask_conditions(
    tx: Tx, facts: Facts, manifest: Manifest, verdicts: predicates.Verdicts | None
) -> Denial | None:
    """Ask the stop conditions in their order.

    Raises:
        _NeedsVerdicts: A predicate must be asked first, about this population.
    """
    contract = facts.contract
    root_id = facts.parent.root_id if facts.parent else manifest.worker_id
    seen = conditions.variables(facts, manifest, tx.family(root_id, manifest.parent_id))
    fresh = verdicts is not None and verdicts.population_version == contract.population_version
    for condition in contract.policy.stop_conditions:
        if condition.predicate is None:
            denial = conditions.ask_cel(condition, seen)
        elif verdicts is not None and fresh:
            denial = verdicts.by_name[condition.name]
        else:
            context = {**seen, "manifest": {**seen["manifest"]}}
            context["manifest"]["state_snapshot_json"] = manifest.state_snapshot_json
            raise _NeedsVerdicts(contract.policy.stop_conditions, context, contract.population_version)
        if denial is not None:
            return denial
    return None


def _newborn(registration: Registration, facts: Facts) -> Worker:
    manifest, parent = registration.manifest, facts.parent
    expiration_us = facts.contract.policy.expiration_us
    return Worker(
        worker_id=manifest.worker_id,
        contract_id=manifest.contract_id,
        parent_id=manifest.parent_id,
        root_id=parent.root_id if parent else manifest.worker_id,
        path=lineage.path_of(parent.path if parent else "", manifest.worker_id),
        depth=manifest.depth,
        node_id=registration.node_id,
        state=State.STARTING,
        create_us=facts.now_us,
        expire_us=None if expiration_us is None else facts.now_us + expiration_us,
        last_heartbeat_us=facts.now_us,
        manifest=manifest,
        degraded_layers=registration.degraded_layers,
    )


def _deny(tx: Tx, denial: Denial, manifest: Manifest, now_us: int, root_id: str = "") -> Denial:
    tx.record(
        events.denied(
            denial,
            now_us,
            contract_id=manifest.contract_id,
            parent_id=manifest.parent_id,
            root_id=root_id,
            manifest=manifest,
        )
    )
    return denial


def _quota(decision: admission.Grant | Denial) -> bool:
    return isinstance(decision, Denial) and decision.reason == ErrorReason.ERROR_REASON_REPLICA_QUOTA_EXCEEDED


def _return_expired(tx: Tx, contract: Contract, now_us: int) -> bool:
    """Give back the slots of manifests whose time is over; return whether there were any."""
    returned = tx.return_expired(now_us, contract.contract_id) if contract.reserved_count else {}
    for contract_id, count in returned.items():
        tx.record(events.reservations_returned(contract_id, count, now_us))
    return bool(returned)
