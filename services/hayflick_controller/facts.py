"""The facts of a birth, read in the transaction that decides it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_controller import events, lineage
from hayflick_controller.admission import Facts, FamilyFacts
from hayflick_controller.model import Contract, Latch, Scope, Worker
from hayflick_controller.store import Tx
from hayflick_rpc.errors import HayflickError


def require_contract(tx: Tx, contract_id: str) -> Contract:
    """Return a contract, locked against other changes of its population.

    Raises:
        HayflickError: CONTRACT_UNKNOWN.
    """
    contract = tx.contract(contract_id, lock=True)
    if contract is None:
        raise HayflickError(
            ErrorReason.ERROR_REASON_CONTRACT_UNKNOWN,
            f"contract_id: there is no contract {contract_id}",
            metadata={"contract_id": contract_id, "field": "contract_id"},
        )
    return contract


def without_own(contract: Contract, reservations: int) -> Contract:
    """Return *contract* without a birth's own reservations, which do not count against it."""
    if not reservations:
        return contract
    return replace(contract, reserved_count=contract.reserved_count - reservations)


def read_facts(
    tx: Tx, contract: Contract, parent_id: str, now_us: int, *, issuing: bool, own_reservations: int = 0
) -> Facts:
    """Return what the rules need to know of a birth.

    Args:
        tx: The transaction that decides.
        contract: Locked.
        parent_id: Empty for a root.
        now_us: The time of the decision.
        issuing: Whether reservations count as births of the parent.
        own_reservations: Reserved slots that are the birth's own.
    """
    parent = tx.worker(parent_id) if parent_id else None
    scopes = lineage.scopes_over(contract.contract_id, parent.path if parent else "")
    found: Mapping[Scope, Latch] = tx.latches(scopes)
    last_birth_us = None
    if parent is not None and contract.policy.cooldown_us:
        births = [tx.last_birth_us(parent_id)]
        if issuing:
            births.append(tx.last_reservation_us(parent_id, now_us))
        last_birth_us = max((birth for birth in births if birth is not None), default=None)
    return Facts(
        now_us=now_us,
        family=_family(tx, contract, parent, now_us, issuing=issuing),
        contract=without_own(contract, own_reservations),
        latches=tuple(found[scope] for scope in scopes if scope in found),
        parent_id=parent_id,
        parent=parent,
        last_birth_us=last_birth_us,
    )


def _family(
    tx: Tx, contract: Contract, parent: Worker | None, now_us: int, *, issuing: bool
) -> FamilyFacts | None:
    budget = contract.policy.terms.family_budget
    if budget is None or parent is None or parent.contract_id != contract.contract_id:
        return None
    root = tx.worker(parent.root_id) if parent.parent_id else parent
    if root is None:  # a family without its root has nothing to be counted on
        return None
    spawns = tx.spawn_count(root.worker_id) if budget.max_spawns else 0
    if budget.max_spawns and issuing:
        spawns += tx.promised_spawns(contract.contract_id, root.worker_id, now_us)
    return FamilyFacts(root.worker_id, root.create_us, spawns)


def return_expired(tx: Tx, contract: Contract, now_us: int) -> bool:
    """Give back the slots of manifests whose time is over; return whether there were any."""
    returned = tx.return_expired(now_us, contract.contract_id) if contract.reserved_count else {}
    for contract_id, count in returned.items():
        tx.record(events.reservations_returned(contract_id, count, now_us))
    return bool(returned)
