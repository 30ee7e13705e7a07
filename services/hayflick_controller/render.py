"""The model to the wire."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.timestamp_pb2 import Timestamp

from hayflick.v1 import controller_pb2, logger_pb2, resources_pb2
from hayflick_controller.clock import MICROSECONDS
from hayflick_controller.model import (
    Contract,
    EndReason,
    Event,
    Exit,
    Key,
    Latch,
    Manifest,
    NetworkPolicy,
    Policy,
    Predicate,
    Resources,
    Scope,
    ScopeKind,
    State,
    StopCondition,
    Usage,
    Worker,
)
from hayflick_controller.render_terms import family_budget, grade_floor, length, tripwire

if TYPE_CHECKING:
    from hayflick_controller.links import Link

_STATES = {state: resources_pb2.State.Value(f"STATE_{state.name}") for state in State}
_REASONS = {reason: resources_pb2.EndReason.Value(f"END_REASON_{reason.name}") for reason in EndReason}
_FROM_STATE = {number: state for state, number in _STATES.items()}


def state(value: State) -> resources_pb2.State.ValueType:
    """Return *value* for the wire."""
    return _STATES[value]


def state_from_wire(value: resources_pb2.State.ValueType) -> State | None:
    """Return the state that *value* means, or ``None`` when it means none."""
    return _FROM_STATE.get(value)


def end_reason(value: EndReason) -> resources_pb2.EndReason.ValueType:
    """Return *value* for the wire."""
    return _REASONS[value]


def stamp(instant_us: int) -> Timestamp:
    """Return an instant for the wire."""
    whole, rest = divmod(instant_us, MICROSECONDS)
    return Timestamp(seconds=whole, nanos=rest * 1_000)


def network(value: NetworkPolicy) -> resources_pb2.NetworkPolicy:
    """Return *value* for the wire."""
    return resources_pb2.NetworkPolicy(
        allow_controller=value.allow_controller,
        allow_external=value.allow_external,
        allow_loopback=value.allow_loopback,
        allowed_hosts=value.allowed_hosts,
        egress_limit_bytes=value.egress_limit_bytes,
    )


def resources(value: Resources) -> resources_pb2.Resources:
    """Return *value* for the wire."""
    wire = resources_pb2.Resources(
        cpu_millis=value.cpu_millis,
        memory_limit_bytes=value.memory_limit_bytes,
        pids_limit=value.pids_limit,
        open_files_limit=value.open_files_limit,
        file_size_limit_bytes=value.file_size_limit_bytes,
        workspace_limit_bytes=value.workspace_limit_bytes,
        tmp_limit_bytes=value.tmp_limit_bytes,
        network=network(value.network),
        output_limit_bytes=value.output_limit_bytes,
    )
    if value.cpu_time_limit_us is not None:
        wire.cpu_time_limit.CopyFrom(length(value.cpu_time_limit_us))
    return wire


def manifest(value: Manifest, *, with_snapshot: bool = True) -> resources_pb2.Manifest:
    """Return *value* for the wire; lists leave its snapshot out, which may be 1 MiB."""
    return resources_pb2.Manifest(
        manifest_id=value.manifest_id,
        contract_id=value.contract_id,
        worker_id=value.worker_id,
        parent_id=value.parent_id,
        depth=value.depth,
        epoch=value.epoch,
        state_snapshot_json=value.state_snapshot_json if with_snapshot else "",
        resources=resources(value.resources),
        issue_time=stamp(value.issue_us),
        expire_time=stamp(value.expire_us),
        key_id=value.key_id,
        signature=value.signature,
    )


def usage(value: Usage) -> resources_pb2.Usage:
    """Return *value* for the wire."""
    return resources_pb2.Usage(
        memory_bytes=value.memory_bytes,
        memory_peak_bytes=value.memory_peak_bytes,
        cpu_time=length(value.cpu_us),
        pids=value.pids,
    )


def exit_(value: Exit) -> resources_pb2.Exit:
    """Return *value* for the wire."""
    return resources_pb2.Exit(
        reason=_REASONS[value.reason],
        detail=value.detail,
        exit_code=value.exit_code,
        signal=value.signal,
        end_time=stamp(value.end_us),
    )


def worker(value: Worker, *, with_snapshot: bool = False) -> resources_pb2.Worker:
    """Return *value* for the wire."""
    wire = resources_pb2.Worker(
        worker_id=value.worker_id,
        contract_id=value.contract_id,
        parent_id=value.parent_id,
        root_id=value.root_id,
        depth=value.depth,
        node_id=value.node_id,
        state=_STATES[value.state],
        resources=resources(value.resources),
        create_time=stamp(value.create_us),
        last_heartbeat_time=stamp(value.last_heartbeat_us),
        usage=usage(value.usage),
        degraded_layers=value.degraded_layers,
        manifest=manifest(value.manifest, with_snapshot=with_snapshot),
    )
    if value.attestation:
        wire.attestation.ParseFromString(value.attestation)
    if value.expire_us is not None:
        wire.expire_time.CopyFrom(stamp(value.expire_us))
    if value.exit is not None:
        wire.exit.CopyFrom(exit_(value.exit))
    return wire


def predicate(value: Predicate, *, with_pickled: bool = True) -> resources_pb2.PythonPredicate:
    """Return *value* for the wire; lists leave the function itself out."""
    return resources_pb2.PythonPredicate(
        pickled=value.pickled if with_pickled else b"",
        python_version=value.python_version,
        timeout=length(value.timeout_us),
    )


def condition(value: StopCondition, *, with_pickled: bool = True) -> resources_pb2.StopCondition:
    """Return *value* for the wire."""
    wire = resources_pb2.StopCondition(name=value.name, description=value.description)
    if value.predicate is not None:
        wire.python.CopyFrom(predicate(value.predicate, with_pickled=with_pickled))
    else:
        wire.cel = value.cel
    return wire


def latch(value: Latch) -> resources_pb2.KillSwitch:
    """Return a kill switch for the wire."""
    wire = resources_pb2.KillSwitch(engaged=value.engaged, epoch=value.epoch, reason=value.reason)
    if value.change_us:
        wire.change_time.CopyFrom(stamp(value.change_us))
    return wire


def key(value: Key) -> controller_pb2.Key:
    """Return *value* for the wire; it has no secret to leave out."""
    return controller_pb2.Key(
        key_id=value.key_id,
        contract_id=value.contract_id,
        create_time=stamp(value.create_us),
        retire_time=None if value.retire_us is None else stamp(value.retire_us),
        revoke_time=None if value.revoke_us is None else stamp(value.revoke_us),
    )


def contract(value: Contract, kill_switch: Latch, *, with_pickled: bool = True) -> resources_pb2.Contract:
    """Return *value* for the wire, with the kill switch over all of it."""
    policy: Policy = value.policy
    wire = resources_pb2.Contract(
        contract_id=value.contract_id,
        display_name=policy.display_name,
        max_depth=policy.max_depth,
        max_replicas=policy.max_replicas,
        cooldown=length(policy.cooldown_us),
        stop_conditions=[condition(rule, with_pickled=with_pickled) for rule in policy.stop_conditions],
        manifest_ttl=length(policy.manifest_ttl_us),
        key_id=value.key_id,
        kill_switch=latch(kill_switch),
        active_count=value.active_count,
        reserved_count=value.reserved_count,
        create_time=stamp(value.create_us),
        grade_floors=[grade_floor(floor) for floor in policy.terms.grade_floors],
        tripwires=[tripwire(one) for one in policy.terms.tripwires],
    )
    if policy.expiration_us is not None:
        wire.expiration.CopyFrom(length(policy.expiration_us))
    if policy.terms.family_budget is not None:
        wire.family_budget.CopyFrom(family_budget(policy.terms.family_budget))
    return wire


def scope(value: Scope) -> controller_pb2.Scope:
    """Return the scope of a kill order for the wire."""
    match value.kind:
        case ScopeKind.EVERYTHING:
            return controller_pb2.Scope(everything=True)
        case ScopeKind.CONTRACT:
            return controller_pb2.Scope(contract_id=value.id)
        case _:
            return controller_pb2.Scope(worker_id=value.id)


def node(link: Link) -> controller_pb2.Node:
    """Return a connected node for the wire."""
    return controller_pb2.Node(
        node_id=link.node_id,
        address=link.address,
        connect_time=stamp(link.connect_us),
        last_beat_time=stamp(link.last_beat_us),
        worker_count=link.worker_count,
    )


def event(value: Event) -> logger_pb2.Event:
    """Return *value* for the logger."""
    wire = logger_pb2.Event(
        event=value.event,
        timestamp=stamp(value.timestamp_us),
        contract_id=value.contract_id,
        worker_id=value.worker_id,
        parent_id=value.parent_id,
        root_id=value.root_id,
    )
    wire.details.update(value.details)
    return wire
