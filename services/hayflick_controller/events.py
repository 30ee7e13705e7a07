"""What the controller writes to the audit log. Pure.

Events hold names, numbers and short words. A state snapshot is named by its
SHA-256 and never enters the log; lists of workers are cut, because each worker
has events of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from hayflick_controller.clock import rfc3339, seconds
from hayflick_controller.model import (
    Contract,
    Event,
    Exit,
    Key,
    Latch,
    Manifest,
    NetworkPolicy,
    Node,
    Silence,
    Worker,
)
from hayflick_controller.terms import Terms
from hayflick_rpc.attestation import key_id
from hayflick_rpc.errors import reason_name
from hayflick_rpc.wire import ID_PATTERN

if TYPE_CHECKING:
    from hayflick_controller.admission import Denial
    from hayflick_controller.store.protocol import Identity

MAX_LISTED = 100

Detail = str | int | float | bool | list[str]


def contract_created(contract: Contract) -> Event:
    """A contract exists from now on."""
    policy = contract.policy
    return Event(
        "audit",
        contract.create_us,
        contract_id=contract.contract_id,
        details={
            "decision": "contract_created",
            "display_name": policy.display_name,
            "max_depth": policy.max_depth,
            "max_replicas": policy.max_replicas,
            "cooldown_seconds": seconds(policy.cooldown_us),
            "expiration_seconds": seconds(policy.expiration_us or 0),
            "stop_conditions": [condition.name for condition in policy.stop_conditions],
            "key_id": contract.key_id,
            **_terms(policy.terms),
        },
    )


def key_rotated(key: Key, before: str, reason: str) -> Event:
    """A contract's new manifests are signed with *key* from now on."""
    details: dict[str, Detail] = {
        "decision": "key_rotated",
        "key_id": key.key_id,
        "previous_key_id": before,
        "reason": reason,
    }
    return Event("audit", key.create_us, contract_id=key.contract_id, details=details)


def key_revoked(key: Key, successor: Key | None, now_us: int, reason: str) -> Event:
    """What *key* signed is refused from now on."""
    details: dict[str, Detail] = {"decision": "key_revoked", "key_id": key.key_id, "reason": reason}
    if successor is not None:
        details["successor_key_id"] = successor.key_id
    return Event("audit", now_us, contract_id=key.contract_id, details=details)


def replication_requested(manifest: Manifest, root_id: str, reason: str) -> Event:
    """A manifest was issued; its slot is reserved."""
    details = _manifest(manifest)
    details["decision"] = "replication_requested"
    details["key_id"] = manifest.key_id
    details["expire_time"] = rfc3339(manifest.expire_us)
    if reason:
        details["reason"] = reason
    return Event(
        "audit",
        manifest.issue_us,
        contract_id=manifest.contract_id,
        worker_id=manifest.worker_id,
        parent_id=manifest.parent_id,
        root_id=root_id,
        details=details,
    )


def denied(
    denial: Denial,
    now_us: int,
    *,
    contract_id: str,
    parent_id: str = "",
    root_id: str = "",
    manifest: Manifest | None = None,
    reason: str = "",
) -> Event:
    """A birth was refused.

    Identifiers from a manifest that may be forged are kept only where they have
    the form of one.
    """
    details: dict[str, Detail] = {
        "decision": denial.decision,
        "denial": reason_name(denial.reason),
        "at": "issue" if manifest is None else "register",
        **denial.metadata,
    }
    if reason:
        details["reason"] = reason
    if manifest is not None:
        details["manifest_id"] = manifest.manifest_id[:64]
    return Event(
        "audit",
        now_us,
        contract_id=_identifier(contract_id),
        worker_id=_identifier(manifest.worker_id) if manifest else "",
        parent_id=_identifier(parent_id),
        root_id=_identifier(root_id),
        details=details,
    )


def worker_registered(worker: Worker) -> Event:
    """A worker holds a slot from now on, and its node may start it."""
    details = _manifest(worker.manifest)
    details["node_id"] = worker.node_id
    if worker.degraded_layers:
        details["degraded_layers"] = list(worker.degraded_layers)
    return _about(worker, "worker_registered", worker.create_us, details)


def worker_shutdown(worker: Worker, exit_: Exit, recorded_us: int, silence: Silence | None = None) -> Event:
    """A worker's processes were seen dead by its node, or, with *silence*, its node's lease has run out.

    ``reason`` is the owner's own word where the owner ended it ("done"), and
    ``end_reason`` always the classification.
    """
    own_words = exit_.detail if exit_.reason.value == "completed" else ""
    details: dict[str, Detail] = {
        "reason": own_words or exit_.reason.value,
        "end_reason": exit_.reason.value,
        "depth": worker.depth,
        "node_id": worker.node_id,
        "cpu_seconds": seconds(worker.usage.cpu_us),
        "memory_peak_bytes": worker.usage.memory_peak_bytes,
    }
    if silence is not None:
        details["silent_seconds"] = seconds(silence.silent_us)
        details["lease_seconds"] = seconds(silence.lease_us)
    if exit_.detail:
        details["detail"] = exit_.detail
    if exit_.signal:
        details["signal"] = exit_.signal
    if exit_.exit_code:
        details["exit_code"] = exit_.exit_code
    return _about(worker, "worker_shutdown", recorded_us, details)


def undone(what: str, manifest: Manifest, now_us: int) -> Event:
    """A decision could not be recorded in time and was taken back."""
    return Event(
        "audit",
        now_us,
        contract_id=manifest.contract_id,
        worker_id=manifest.worker_id,
        parent_id=manifest.parent_id,
        details={
            "decision": f"{what}_undone",
            "reason": "audit_unavailable",
            "manifest_id": manifest.manifest_id,
        },
    )


def reservations_returned(contract_id: str, count: int, now_us: int) -> Event:
    """Manifests were not registered in their time; their slots are free again."""
    return Event(
        "audit",
        now_us,
        contract_id=contract_id,
        details={"decision": "reservations_returned", "count": count},
    )


def latch_changed(
    decision: str, latch: Latch, *, contract_id: str = "", workers: Iterable[Worker] = (), actor: str = ""
) -> Event:
    """A kill switch or a quarantine was engaged or released, by a caller or by *actor*."""
    listed = list(workers)
    by: dict[str, Detail] = {"actor": actor} if actor else {}
    subject = latch.scope.id if latch.scope.kind.value in ("worker", "quarantine") else ""
    return Event(
        "audit",
        latch.change_us,
        contract_id=contract_id,
        worker_id=subject,
        details={
            "decision": decision,
            "scope": latch.scope.key,
            "epoch": latch.epoch,
            "reason": latch.reason,
            "worker_count": len(listed),
            "worker_ids": [worker.worker_id for worker in listed[:MAX_LISTED]],
            **by,
        },
    )


def controller_started(identity: Identity, key_id: str, public_key: bytes, now_us: int) -> Event:
    """The controller decides from now on, and signs its receipts with this key."""
    return Event(
        "controller_started",
        now_us,
        details={
            "controller_id": identity.controller_id,
            "boot": identity.boot,
            "receipt_key_id": key_id,
            "receipt_public_key": public_key.hex(),
        },
    )


def clock_stepped(step_seconds: float, now_us: int) -> Event:
    """Somebody set the wall clock; decisions, and the times of our events, go on by the old one."""
    return Event("clock_stepped", now_us, details={"step_seconds": round(step_seconds, 3)})


def network_narrowed(
    worker: Worker, network: NetworkPolicy, reason: str, now_us: int, *, descendants: int
) -> Event:
    """Network licences were taken from a worker, and from as many of its descendants."""
    held = worker.resources.network
    details: dict[str, Detail] = {
        "decision": "network_narrowed",
        "reason": reason,
        "allow_controller": network.allow_controller,
        "allow_external": network.allow_external,
        "allowed_hosts": list(network.allowed_hosts),
        "egress_limit_bytes": network.egress_limit_bytes,
        "taken": [
            name
            for name in ("allow_controller", "allow_external", "allowed_hosts", "egress_limit_bytes")
            if getattr(network, name) != getattr(held, name)
        ],
        "descendant_count": descendants,
    }
    return _about(worker, "audit", now_us, details)


def killed(
    latch: Latch,
    contract_id: str,
    *,
    dead: int,
    unconfirmed_ids: Sequence[str],
    now_us: int,
    elapsed_us: int,
    receipt_sha256: str,
) -> Event:
    """What a kill switch had done when it answered."""
    scope = latch.scope
    return Event(
        "audit",
        now_us,
        contract_id=contract_id,
        worker_id=scope.id if scope.kind.value == "worker" else "",
        details={
            "decision": "kill_switch_confirmed",
            "scope": scope.key,
            "epoch": latch.epoch,
            "dead_count": dead,
            "unconfirmed_count": len(unconfirmed_ids),
            "unconfirmed_worker_ids": list(unconfirmed_ids[:MAX_LISTED]),
            "elapsed_seconds": seconds(elapsed_us),
            "receipt_sha256": receipt_sha256,
        },
    )


def reaped(worker: Worker, silent_us: int, now_us: int) -> Event:
    """A worker was silent too long and is being ended."""
    return _about(
        worker, "audit", now_us, {"decision": "reap_stale", "silent_seconds": seconds(max(0, silent_us))}
    )


def isolation_refused(worker: Worker, cause: str, min_grade: str, now_us: int) -> Event:
    """A worker runs in a sandbox that is not attested to hold enough, and is being ended."""
    details: dict[str, Detail] = {
        "decision": "isolation_refused",
        "cause": cause,
        "min_grade": min_grade,
        "node_id": worker.node_id,
    }
    return _about(worker, "audit", now_us, details)


def node_connected(node: Node, worker_count: int, public_key: bytes) -> Event:
    """A node may launch workers from now on."""
    return Event(
        "node_connected",
        node.connect_us,
        details={
            "node_id": node.node_id,
            "address": node.address,
            "python_version": node.python_version,
            "worker_count": worker_count,
            # What this node signs until it starts again is verified with it.
            "attestation_public_key": public_key.hex(),
            "attestation_key_id": key_id(public_key) if public_key else "",
        },
    )


def node_disconnected(node_id: str, now_us: int, reason: str) -> Event:
    """A node's stream ended; its lease runs."""
    return Event("node_disconnected", now_us, details={"node_id": node_id, "reason": reason})


def _terms(terms: Terms) -> dict[str, Detail]:
    """Return what a contract says about containment, where it says anything."""
    details: dict[str, Detail] = {}
    if terms.grade_floors:
        details["grade_floors"] = [
            f"{floor.min_grade.name} from depth {floor.from_depth}" for floor in terms.grade_floors
        ]
    if terms.tripwires:
        details["tripwires"] = [tripwire.name for tripwire in terms.tripwires]
    budget = terms.family_budget
    if budget is not None:
        details["family_memory_limit_bytes"] = budget.memory_limit_bytes
        details["family_cpu_millis"] = budget.cpu_millis
        details["family_pids_limit"] = budget.pids_limit
        details["family_max_spawns"] = budget.max_spawns
        details["family_wall_time_limit_seconds"] = seconds(budget.wall_time_limit_us)
    return details


def _manifest(manifest: Manifest) -> dict[str, Detail]:
    return {
        "manifest_id": manifest.manifest_id,
        "depth": manifest.depth,
        "epoch": manifest.epoch,
        "cpu_millis": manifest.resources.cpu_millis,
        "memory_limit_bytes": manifest.resources.memory_limit_bytes,
        "state_snapshot_sha256": hashlib.sha256(manifest.state_snapshot_json.encode()).hexdigest(),
    }


def _about(worker: Worker, event: str, timestamp_us: int, details: dict[str, Detail]) -> Event:
    return Event(
        event,
        timestamp_us,
        contract_id=worker.contract_id,
        worker_id=worker.worker_id,
        parent_id=worker.parent_id,
        root_id=worker.root_id,
        details=details,
    )


def _identifier(value: str) -> str:
    return value if ID_PATTERN.fullmatch(value) else ""
