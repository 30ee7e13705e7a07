"""Manifests issued: a wish, the facts, the rules, and a slot reserved."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hayflick_controller import admission, clock, events, narrowing, signing
from hayflick_controller.admission import Denial, over_quota
from hayflick_controller.facts import read_facts, require_contract, return_expired
from hayflick_controller.model import Manifest, Resources
from hayflick_rpc.errors import invalid_field

if TYPE_CHECKING:
    from hayflick_controller.store import Tx


@dataclass(frozen=True, slots=True)
class Wish:
    """A birth that somebody wants."""

    contract_id: str
    parent_id: str
    depth: int | None
    state_snapshot_json: str
    resources: Resources | None
    reason: str


def decide(tx: Tx, wish: Wish, now_us: int) -> Manifest | Denial:
    """Reserve a slot and sign a manifest for *wish*, or refuse; either is recorded.

    Raises:
        HayflickError: CONTRACT_UNKNOWN; INVALID_FIELD when a root has no resources.
    """
    contract = require_contract(tx, wish.contract_id)
    facts = read_facts(tx, contract, wish.parent_id, now_us, issuing=True)
    resources = wish.resources
    if facts.parent is not None:
        own = facts.parent.resources
        resources = own if resources is None else narrowing.inherited(resources, own)
    facts = replace(facts, resources=resources)
    decision = admission.decide_issue(facts, wish.depth)
    if over_quota(decision) and return_expired(tx, contract, now_us):
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
