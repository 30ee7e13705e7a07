"""Rows to models and back: one conversion each way, proved by a round trip in the contract suite."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import TYPE_CHECKING, Any

from hayflick_controller.model import (
    Contract,
    EndReason,
    Exit,
    Key,
    Latch,
    Manifest,
    ManifestStatus,
    NetworkPolicy,
    Node,
    Policy,
    Predicate,
    Resources,
    Scope,
    State,
    StopCondition,
    Usage,
    Worker,
)
from hayflick_controller.store import terms

if TYPE_CHECKING:
    from sqlalchemy import Row

Values = dict[str, Any]

USAGE_COLUMNS = ("memory_bytes", "memory_peak_bytes", "cpu_us", "pids")
_RESOURCES = tuple(field.name for field in dataclasses.fields(Resources) if field.name != "network")
_NETWORK = tuple(field.name for field in dataclasses.fields(NetworkPolicy))
_encode = json.JSONEncoder(separators=(",", ":")).encode  # made once: json.dumps makes one for each call
EXIT_COLUMNS = ("end_reason", "end_detail", "exit_code", "signal", "end_us")


def contract_values(contract: Contract) -> Values:
    """Return *contract* as a row, without its conditions."""
    policy = contract.policy
    return {
        "contract_id": contract.contract_id,
        "display_name": policy.display_name,
        "max_depth": policy.max_depth,
        "max_replicas": policy.max_replicas,
        "cooldown_us": policy.cooldown_us,
        "expiration_us": policy.expiration_us,
        "manifest_ttl_us": policy.manifest_ttl_us,
        "key_id": contract.key_id,
        "create_us": contract.create_us,
        "active_count": contract.active_count,
        "reserved_count": contract.reserved_count,
        "population_version": contract.population_version,
        "terms": terms.text_of(policy.terms),
    }


def contract(row: Row[Any], stop_conditions: tuple[StopCondition, ...]) -> Contract:
    """Return the contract in *row*."""
    return Contract(
        contract_id=row.contract_id,
        policy=Policy(
            max_depth=row.max_depth,
            max_replicas=row.max_replicas,
            cooldown_us=row.cooldown_us,
            expiration_us=row.expiration_us,
            manifest_ttl_us=row.manifest_ttl_us,
            display_name=row.display_name,
            stop_conditions=stop_conditions,
            terms=terms.from_text(row.terms),
        ),
        key_id=row.key_id,
        create_us=row.create_us,
        active_count=row.active_count,
        reserved_count=row.reserved_count,
        population_version=row.population_version,
    )


def key_values(key_: Key) -> Values:
    """Return *key_* as a row, but for its secret."""
    return {
        "key_id": key_.key_id,
        "contract_id": key_.contract_id,
        "create_us": key_.create_us,
        "retire_us": key_.retire_us,
        "revoke_us": key_.revoke_us,
    }


def key(row: Row[Any]) -> Key:
    """Return the key in *row*."""
    return Key(row.key_id, row.contract_id, row.create_us, row.retire_us, row.revoke_us)


def condition_values(contract_id: str, position: int, condition: StopCondition) -> Values:
    """Return *condition* as a row."""
    predicate = condition.predicate
    return {
        "contract_id": contract_id,
        "position": position,
        "name": condition.name,
        "description": condition.description,
        "cel": condition.cel,
        "pickled": predicate.pickled if predicate else None,
        "python_version": predicate.python_version if predicate else "",
        "timeout_us": predicate.timeout_us if predicate else 0,
    }


def condition(row: Row[Any]) -> StopCondition:
    """Return the condition in *row*."""
    predicate = None
    if row.pickled is not None:
        predicate = Predicate(row.pickled, row.python_version, row.timeout_us)
    return StopCondition(row.name, row.description, row.cel, predicate)


def latch(row: Row[Any]) -> Latch:
    """Return the latch in *row*."""
    return Latch(Scope.from_key(row.scope), row.engaged, row.epoch, row.reason, row.change_us)


def latch_values(latch_: Latch) -> Values:
    """Return *latch_* as a row."""
    return {
        "scope": latch_.scope.key,
        "engaged": latch_.engaged,
        "epoch": latch_.epoch,
        "reason": latch_.reason,
        "change_us": latch_.change_us,
    }


@functools.lru_cache(maxsize=1_024)  # most births of a contract ask for the same
def resources_text(resources: Resources) -> str:
    """Return *resources* as JSON."""
    fields = {name: getattr(resources, name) for name in _RESOURCES}
    network = resources.network
    fields["network"] = {name: getattr(network, name) for name in _NETWORK}
    return _encode(fields)


@functools.lru_cache(maxsize=256)
def resources(value: str) -> Resources:
    """Return the resources in a JSON text; workers are many, and what they ask for is often the same."""
    fields = json.loads(value)
    network = fields["network"]
    # A list in JSON; absent in what was written before there were any.
    network["allowed_hosts"] = tuple(network.get("allowed_hosts", ()))
    return Resources(**{**fields, "network": NetworkPolicy(**network)})


def network_text(network_: NetworkPolicy | None) -> str:
    """Return what is left of a worker's network as JSON; empty when nothing was taken."""
    return "" if network_ is None else _encode({name: getattr(network_, name) for name in _NETWORK})


def network(value: str) -> NetworkPolicy | None:
    """Return the network in a JSON text, if any."""
    if not value:
        return None
    fields = json.loads(value)
    return NetworkPolicy(**{**fields, "allowed_hosts": tuple(fields["allowed_hosts"])})


def manifest_values(manifest_: Manifest) -> Values:
    """Return *manifest_* as a row that reserves a slot."""
    return {
        "manifest_id": manifest_.manifest_id,
        "contract_id": manifest_.contract_id,
        "worker_id": manifest_.worker_id,
        "parent_id": manifest_.parent_id,
        "status": ManifestStatus.RESERVED.value,
        "depth": manifest_.depth,
        "epoch": manifest_.epoch,
        "snapshot": manifest_.state_snapshot_json,
        "resources": resources_text(manifest_.resources),
        "issue_us": manifest_.issue_us,
        "expire_us": manifest_.expire_us,
        "key_id": manifest_.key_id,
        "signature": manifest_.signature,
    }


def manifest(row: Row[Any], snapshot: str) -> Manifest:
    """Return the manifest in *row*, which may be a worker's row joined with it."""
    return Manifest(
        manifest_id=row.manifest_id,
        contract_id=row.contract_id,
        worker_id=row.worker_id,
        parent_id=row.parent_id,
        depth=row.depth,
        epoch=row.epoch,
        state_snapshot_json=snapshot,
        resources=resources(row.resources),
        issue_us=row.issue_us,
        expire_us=row.manifest_expire_us,
        key_id=row.key_id,
        signature=row.signature,
    )


def worker_values(worker_: Worker) -> Values:
    """Return *worker_* as a row."""
    exit_ = worker_.exit
    return {
        "worker_id": worker_.worker_id,
        "manifest_id": worker_.manifest.manifest_id,
        "contract_id": worker_.contract_id,
        "parent_id": worker_.parent_id,
        "root_id": worker_.root_id,
        "path": worker_.path,
        "depth": worker_.depth,
        "node_id": worker_.node_id,
        "state": worker_.state.value,
        "create_us": worker_.create_us,
        "expire_us": worker_.expire_us,
        "last_heartbeat_us": worker_.last_heartbeat_us,
        **usage_values(worker_.usage),
        "degraded_layers": _encode(worker_.degraded_layers),
        "stop_reason": worker_.stop_reason.value if worker_.stop_reason else None,
        "stop_detail": worker_.stop_detail,
        **exit_values(exit_),
        "attestation": worker_.attestation or None,
        "spawn_count": 0,
        "network": network_text(worker_.network),
    }


def usage_values(usage: Usage) -> Values:
    """Return *usage* as columns of a worker's row."""
    return {
        "memory_bytes": usage.memory_bytes,
        "memory_peak_bytes": usage.memory_peak_bytes,
        "cpu_us": usage.cpu_us,
        "pids": usage.pids,
    }


def exit_values(exit_: Exit | None) -> Values:
    """Return *exit_* as columns of a worker's row."""
    return {
        "end_reason": exit_.reason.value if exit_ else None,
        "end_detail": exit_.detail if exit_ else "",
        "exit_code": exit_.exit_code if exit_ else 0,
        "signal": exit_.signal if exit_ else 0,
        "end_us": exit_.end_us if exit_ else None,
    }


def worker(row: Row[Any], snapshot: str = "") -> Worker:
    """Return the worker in *row*, which is joined with its manifest's."""
    exit_ = None
    if row.end_reason is not None:
        exit_ = Exit(EndReason(row.end_reason), row.end_us, row.end_detail, row.exit_code, row.signal)
    return Worker(
        worker_id=row.worker_id,
        contract_id=row.contract_id,
        parent_id=row.parent_id,
        root_id=row.root_id,
        path=row.path,
        depth=row.depth,
        node_id=row.node_id,
        state=State(row.state),
        create_us=row.create_us,
        expire_us=row.expire_us,
        last_heartbeat_us=row.last_heartbeat_us,
        manifest=manifest(row, snapshot),
        usage=Usage(row.memory_bytes, row.memory_peak_bytes, row.cpu_us, row.pids),
        degraded_layers=tuple(json.loads(row.degraded_layers)),
        stop_reason=EndReason(row.stop_reason) if row.stop_reason else None,
        stop_detail=row.stop_detail,
        exit=exit_,
        attestation=bytes(row.attestation or b""),
        network=network(row.network),
    )


def node_values(node_: Node) -> Values:
    """Return *node_* as a row."""
    return dataclasses.asdict(node_)


def node(row: Row[Any]) -> Node:
    """Return the node in *row*."""
    return Node(
        node_id=row.node_id,
        session_digest=row.session_digest,
        address=row.address,
        python_version=row.python_version,
        connect_us=row.connect_us,
        last_ack_us=row.last_ack_us,
        connected=row.connected,
        controller_id=row.controller_id,
    )
