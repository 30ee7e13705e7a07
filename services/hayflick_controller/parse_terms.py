"""What a contract has the kernels of its nodes hold, checked."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from hayflick.v1 import resources_pb2
from hayflick_controller.clock import MICROSECONDS
from hayflick_controller.model import MAX_EXACT_INTEGER
from hayflick_controller.parse_resources import (
    MAX_CPU_MILLIS,
    MAX_PIDS,
    MIN_CPU_MILLIS,
    MIN_MEMORY_BYTES,
)
from hayflick_controller.parse_values import length_us, within
from hayflick_controller.terms import (
    DenialClass,
    FamilyBudget,
    GradeFloor,
    IsolationGrade,
    Terms,
    Tripwire,
    TripwireScope,
)
from hayflick_rpc.errors import invalid_field

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_FLOORS = 16
MAX_FLOOR_DEPTH = 1_000
MAX_TRIPWIRES = 16
MAX_TRIPWIRE_COUNT = 1_000
MAX_WINDOW_US = 3_600 * MICROSECONDS
MAX_SPAWNS = 1_000_000_000
MIN_FAMILY_PIDS = 2  # an init and one task

_TRIPWIRE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_CLASSES = {resources_pb2.DenialClass.Value(f"DENIAL_CLASS_{one.name}"): one for one in DenialClass}
_SCOPES = {
    resources_pb2.TRIPWIRE_SCOPE_UNSPECIFIED: TripwireScope.WORKER,
    resources_pb2.TRIPWIRE_SCOPE_WORKER: TripwireScope.WORKER,
    resources_pb2.TRIPWIRE_SCOPE_FAMILY: TripwireScope.FAMILY,
}


def terms(field: str, contract: resources_pb2.Contract) -> Terms:
    """Return what *contract* says about containment.

    Raises:
        HayflickError: INVALID_FIELD, naming the field below *field*.
    """
    budget = None
    if contract.HasField("family_budget"):
        budget = family_budget(f"{field}.family_budget", contract.family_budget)
    return Terms(
        grade_floors=_floors(f"{field}.grade_floors", contract.grade_floors),
        family_budget=budget,
        tripwires=_tripwires(f"{field}.tripwires", contract.tripwires),
    )


def family_budget(field: str, wire: resources_pb2.FamilyBudget) -> FamilyBudget:
    """Return the budget in *wire*.

    Raises:
        HayflickError: INVALID_FIELD, naming the limit below *field*.
    """
    for name, value, minimum, maximum in (
        ("memory_limit_bytes", wire.memory_limit_bytes, MIN_MEMORY_BYTES, MAX_EXACT_INTEGER),
        ("cpu_millis", wire.cpu_millis, MIN_CPU_MILLIS, MAX_CPU_MILLIS),
        ("pids_limit", wire.pids_limit, MIN_FAMILY_PIDS, MAX_PIDS),
        ("max_spawns", wire.max_spawns, 1, MAX_SPAWNS),
    ):
        if value:
            within(f"{field}.{name}", value, minimum, maximum)
    wall_time_us = 0
    if wire.HasField("wall_time_limit"):
        wall_time_us = length_us(f"{field}.wall_time_limit", wire.wall_time_limit, minimum_us=1)
    return FamilyBudget(
        memory_limit_bytes=wire.memory_limit_bytes,
        cpu_millis=wire.cpu_millis,
        pids_limit=wire.pids_limit,
        max_spawns=wire.max_spawns,
        wall_time_limit_us=wall_time_us,
    )


def _floors(field: str, wire: Sequence[resources_pb2.GradeFloor]) -> tuple[GradeFloor, ...]:
    if len(wire) > MAX_FLOORS:
        raise invalid_field(field, f"must be at most {MAX_FLOORS}")
    return tuple(_floor(f"{field}[{index}]", floor) for index, floor in enumerate(wire))


def _floor(field: str, wire: resources_pb2.GradeFloor) -> GradeFloor:
    within(f"{field}.from_depth", wire.from_depth, 0, MAX_FLOOR_DEPTH)
    try:
        grade = IsolationGrade(wire.min_grade)
    except ValueError:
        grade = IsolationGrade.UNSPECIFIED
    if grade is IsolationGrade.UNSPECIFIED:
        raise invalid_field(f"{field}.min_grade", "must be a grade: A, B or C")
    return GradeFloor(wire.from_depth, grade)


def _tripwires(field: str, wire: Sequence[resources_pb2.Tripwire]) -> tuple[Tripwire, ...]:
    if len(wire) > MAX_TRIPWIRES:
        raise invalid_field(field, f"must be at most {MAX_TRIPWIRES}")
    parsed = tuple(_tripwire(f"{field}[{index}]", one) for index, one in enumerate(wire))
    if len({one.name for one in parsed}) < len(parsed):
        raise invalid_field(field, "must have names that differ")
    return parsed


def _tripwire(field: str, wire: resources_pb2.Tripwire) -> Tripwire:
    if not _TRIPWIRE_NAME.fullmatch(wire.name):
        raise invalid_field(f"{field}.name", "must have 1 to 64 characters of [A-Za-z0-9_.-]")
    classes = []
    for index, number in enumerate(wire.classes):
        denial = _CLASSES.get(number)
        if denial is None:
            raise invalid_field(
                f"{field}.classes[{index}]", "must be a class of denials; leave it out for any"
            )
        classes.append(denial)
    if len(set(classes)) < len(classes):
        raise invalid_field(f"{field}.classes", "must differ from one another")
    within(f"{field}.count", wire.count, 1, MAX_TRIPWIRE_COUNT)
    if not wire.HasField("window"):
        raise invalid_field(f"{field}.window", "is required")
    scope = _SCOPES.get(wire.scope)
    if scope is None:
        raise invalid_field(f"{field}.scope", "must be the worker or its family")
    return Tripwire(
        name=wire.name,
        count=wire.count,
        window_us=length_us(f"{field}.window", wire.window, minimum_us=1, maximum_us=MAX_WINDOW_US),
        classes=tuple(classes),
        scope=scope,
    )
