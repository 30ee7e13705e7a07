"""What a contract has the kernels of its nodes hold, as frozen values.

Lengths of time are whole microseconds (``*_us``), sizes bytes; 0 means that there is no
limit but the members' own.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class IsolationGrade(enum.IntEnum):
    """How well a sandbox was measured to hold; each grade includes those below it."""

    UNSPECIFIED = 0
    C = 1
    B = 2
    A = 3


class DenialClass(enum.StrEnum):
    """Kinds of attempts that only an attack makes."""

    NAMESPACES = "namespaces"
    MOUNTS = "mounts"
    INSPECTION = "inspection"
    KERNEL = "kernel"
    KEYS = "keys"
    SOCKETS = "sockets"
    TERMINAL = "terminal"
    FILE_HANDLES = "file_handles"
    MACHINE = "machine"
    CENSUS = "census"


class TripwireScope(enum.StrEnum):
    """How far a tripwire reaches; descendants always freeze with their ancestor."""

    WORKER = "worker"
    FAMILY = "family"


@dataclass(frozen=True, slots=True)
class FamilyBudget:
    """What a root and all its descendants may use together."""

    memory_limit_bytes: int = 0
    cpu_millis: int = 0
    pids_limit: int = 0
    max_spawns: int = 0
    wall_time_limit_us: int = 0


@dataclass(frozen=True, slots=True)
class GradeFloor:
    """The least isolation grade from the generation ``from_depth`` on."""

    from_depth: int
    min_grade: IsolationGrade


@dataclass(frozen=True, slots=True)
class Tripwire:
    """A rule that quarantines by itself: so many denials in a window; of any class, without ``classes``."""

    name: str
    count: int
    window_us: int
    classes: tuple[DenialClass, ...] = ()
    scope: TripwireScope = TripwireScope.WORKER


@dataclass(frozen=True, slots=True)
class Terms:
    """What a contract says about containment; all of it optional."""

    grade_floors: tuple[GradeFloor, ...] = ()
    family_budget: FamilyBudget | None = None
    tripwires: tuple[Tripwire, ...] = ()

    def min_grade(self, depth: int) -> IsolationGrade:
        """Return the strictest floor that applies to the generation *depth*."""
        floors = (floor.min_grade for floor in self.grade_floors if floor.from_depth <= depth)
        return max(floors, default=IsolationGrade.UNSPECIFIED)


NO_TERMS = Terms()
