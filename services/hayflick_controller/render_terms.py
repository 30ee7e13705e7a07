"""What a contract says about containment, to the wire."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.duration_pb2 import Duration

from hayflick.v1 import controller_pb2, resources_pb2
from hayflick_controller.clock import MICROSECONDS
from hayflick_controller.terms import (
    DenialClass,
    FamilyBudget,
    GradeFloor,
    IsolationGrade,
    Tripwire,
    TripwireScope,
)

if TYPE_CHECKING:
    from hayflick_controller.model import Policy

_CLASSES = {one: resources_pb2.DenialClass.Value(f"DENIAL_CLASS_{one.name}") for one in DenialClass}
_GRADES = {one: resources_pb2.IsolationGrade.Value(f"ISOLATION_GRADE_{one.name}") for one in IsolationGrade}
_SCOPES = {one: resources_pb2.TripwireScope.Value(f"TRIPWIRE_SCOPE_{one.name}") for one in TripwireScope}


def length(length_us: int) -> Duration:
    """Return a length of time that is not negative for the wire."""
    whole, rest = divmod(length_us, MICROSECONDS)
    return Duration(seconds=whole, nanos=rest * 1_000)


def family_budget(value: FamilyBudget) -> resources_pb2.FamilyBudget:
    """Return *value* for the wire."""
    wire = resources_pb2.FamilyBudget(
        memory_limit_bytes=value.memory_limit_bytes,
        cpu_millis=value.cpu_millis,
        pids_limit=value.pids_limit,
        max_spawns=value.max_spawns,
    )
    if value.wall_time_limit_us:
        wire.wall_time_limit.CopyFrom(length(value.wall_time_limit_us))
    return wire


def grade_floor(value: GradeFloor) -> resources_pb2.GradeFloor:
    """Return *value* for the wire."""
    return resources_pb2.GradeFloor(from_depth=value.from_depth, min_grade=_GRADES[value.min_grade])


def tripwire(value: Tripwire) -> resources_pb2.Tripwire:
    """Return *value* for the wire."""
    return resources_pb2.Tripwire(
        name=value.name,
        classes=[_CLASSES[one] for one in value.classes],
        count=value.count,
        window=length(value.window_us),
        scope=_SCOPES[value.scope],
    )


def contract_terms(policy: Policy, depth: int) -> controller_pb2.ContractTerms:
    """Return what a node must hold a worker of the generation *depth* to."""
    terms = policy.terms
    return controller_pb2.ContractTerms(
        max_replicas=policy.max_replicas,
        max_depth=policy.max_depth,
        min_grade=_GRADES[terms.min_grade(depth)],
        family_budget=None if terms.family_budget is None else family_budget(terms.family_budget),
        tripwires=[tripwire(one) for one in terms.tripwires],
    )
