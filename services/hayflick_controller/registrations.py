"""Workers registered: a manifest presented, the rules asked again, the stop conditions, and a slot taken."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hayflick_controller import admission, conditions, events, lineage, nodes, signing
from hayflick_controller.admission import Denial, Facts, Presented, over_quota
from hayflick_controller.facts import read_facts, require_contract, return_expired, without_own
from hayflick_controller.model import Contract, Manifest, ManifestStatus, Policy, State, StopCondition, Worker

if TYPE_CHECKING:
    from hayflick_controller import predicates
    from hayflick_controller.store import Tx


@dataclass(frozen=True, slots=True)
class Registration:
    """A birth that a node is about to carry out."""

    manifest: Manifest
    node_id: str
    session: str
    degraded_layers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Registered:
    """A worker that holds a slot, and the policy that its node must hold it to."""

    worker: Worker
    policy: Policy


class NeedsVerdicts(Exception):
    """The rules allow a birth and only predicates are left to be asked, outside the transaction."""

    def __init__(
        self, stop_conditions: tuple[StopCondition, ...], context: dict[str, object], version: int
    ) -> None:
        super().__init__(version)
        self.stop_conditions = stop_conditions
        self.context = context
        self.version = version


def decide(
    tx: Tx, registration: Registration, verdicts: predicates.Verdicts | None, now_us: int
) -> Registered | Denial:
    """Commit the birth that a manifest allows, or refuse; either is recorded.

    Raises:
        NeedsVerdicts: Only predicates are left to be asked.
        HayflickError: NODE_SESSION_INVALID; CONTRACT_UNKNOWN.
    """
    manifest = registration.manifest
    nodes.require_session(tx, registration.node_id, registration.session)
    secret = tx.secret(manifest.key_id, manifest.contract_id)
    valid = secret is not None and signing.verify(manifest, secret)
    status = tx.manifest_status(manifest.manifest_id) if valid else None
    key = tx.key(manifest.key_id) if valid else None
    presented = Presented(manifest, valid, status, key is not None and key.revoke_us is not None)
    denial = admission.check_presented(presented)
    if denial is not None:
        return _deny(tx, denial, manifest, now_us)
    contract = require_contract(tx, manifest.contract_id)
    decision, facts = _apply_rules(tx, contract, presented, now_us)
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
    return Registered(worker, contract.policy)


def _apply_rules(
    tx: Tx, contract: Contract, presented: Presented, now_us: int
) -> tuple[admission.Grant | Denial, Facts]:
    manifest = presented.manifest
    own = int(presented.status is ManifestStatus.RESERVED)
    facts = read_facts(tx, contract, manifest.parent_id, now_us, issuing=False, own_reservations=own)
    facts = replace(facts, resources=manifest.resources)
    decision = admission.decide_register(facts, presented)
    if over_quota(decision) and return_expired(tx, contract, now_us):
        presented = replace(presented, status=tx.manifest_status(manifest.manifest_id))
        own = int(presented.status is ManifestStatus.RESERVED)
        contract = require_contract(tx, manifest.contract_id)
        facts = replace(facts, contract=without_own(contract, own))
        decision = admission.decide_register(facts, presented)
    return decision, facts


def _ask_conditions(
    tx: Tx, facts: Facts, manifest: Manifest, verdicts: predicates.Verdicts | None
) -> Denial | None:
    """Ask the stop conditions in their order.

    Raises:
        NeedsVerdicts: A predicate must be asked first, about this population.
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
            raise NeedsVerdicts(contract.policy.stop_conditions, context, contract.population_version)
        if denial is not None:
            return denial
    return None


def _newborn(registration: Registration, facts: Facts) -> Worker:
    manifest, parent = registration.manifest, facts.parent
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
        expire_us=_expiry(facts),
        last_heartbeat_us=facts.now_us,
        manifest=manifest,
        degraded_layers=registration.degraded_layers,
    )


def _expiry(facts: Facts) -> int | None:
    """Return when the worker's life ends: its own, or its family's, whichever is sooner."""
    policy = facts.contract.policy
    ends = []
    if policy.expiration_us is not None:
        ends.append(facts.now_us + policy.expiration_us)
    budget = policy.terms.family_budget
    if budget is not None and budget.wall_time_limit_us:
        begin_us = facts.now_us if facts.family is None else facts.family.root_create_us
        ends.append(begin_us + budget.wall_time_limit_us)
    return min(ends, default=None)


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
