"""What a contract has the kernel hold beyond each worker's own limits."""

# ruff: noqa: TRY004 -- users are promised one kind of error for every bad value

from __future__ import annotations

import enum
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from replication import _checks
from replication._resources import MAX_CPUS, MAX_MEMORY_MB, MAX_PIDS, whole_bytes

MAX_SECONDS = 366 * 86_400.0  # a leap year
MAX_SPAWNS = 1_000_000_000
MAX_TRIPWIRE_COUNT = 1_000
MAX_WINDOW_SECONDS = 3_600.0

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)


@dataclass(frozen=True)
class FamilyBudget:
    """What a root and all its descendants may use together, whatever each may use by itself.

    What is ``None`` has no limit but the members' own.

    Attributes:
        memory_limit_mb: Memory of all of them, in MiB; at least 16.
        cpu_limit: CPU bandwidth of all of them in CPUs, from 0.01. Rounded to thousandths.
        pids_limit: Processes and threads of all of them at once, the init of each
            included; at least 2.
        max_spawns: Births in all below the root, over its whole life.
        wall_time_limit_seconds: From the root's birth to the end of the last of them.

    Raises:
        ValueError: A value is out of range; the message begins with the field.
    """

    memory_limit_mb: float | None = None
    cpu_limit: float | None = None
    pids_limit: int | None = None
    max_spawns: int | None = None
    wall_time_limit_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.memory_limit_mb is not None:
            whole_bytes("memory_limit_mb", self.memory_limit_mb, 16, MAX_MEMORY_MB)
        if self.cpu_limit is not None:
            _checks.number("cpu_limit", self.cpu_limit, 0.01, MAX_CPUS)
        if self.pids_limit is not None:
            _checks.integer("pids_limit", self.pids_limit, 2, MAX_PIDS)
        if self.max_spawns is not None:
            _checks.integer("max_spawns", self.max_spawns, 1, MAX_SPAWNS)
        if self.wall_time_limit_seconds is not None:
            _checks.number("wall_time_limit_seconds", self.wall_time_limit_seconds, 0.000001, MAX_SECONDS)


GRADES = ("A", "B", "C")
MAX_FLOORS = 16
MAX_FLOOR_DEPTH = 1_000


def grade_floors(min_grade: str | Mapping[int, str] | None) -> tuple[tuple[int, str], ...]:
    """Return the grades that a contract demands, each with the first generation that it is for.

    Raises:
        ValueError: *min_grade* is not what a contract takes.
    """
    if min_grade is None:
        return ()
    floors = {0: min_grade} if isinstance(min_grade, str) else min_grade
    if not isinstance(floors, Mapping) or len(floors) > MAX_FLOORS:
        raise ValueError(f"min_grade: must be a grade or at most {MAX_FLOORS} grades, not {min_grade!r}")
    for depth, grade in floors.items():
        _checks.integer("min_grade", depth, 0, MAX_FLOOR_DEPTH)
        if grade not in GRADES:
            raise ValueError(f"min_grade: must be one of {', '.join(GRADES)}, not {grade!r}")
    return tuple(sorted(floors.items()))


class DenialClass(enum.Enum):
    """Kinds of attempts that only an attack makes; docs/containment.md says what is in each."""

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


class TripwireScope(enum.Enum):
    """Whom a tripwire freezes; descendants always freeze with their ancestor."""

    WORKER = "worker"
    FAMILY = "family"


@dataclass(frozen=True)
class Tripwire:
    """A rule that quarantines by itself: so many denials within such a time.

    Attributes:
        name: Unique in its contract; 1 to 64 characters of [A-Za-z0-9_.-].
        count: How many denials, 1 to 1,000.
        window_seconds: Within how long, 3,600 at most.
        classes: Which denials count; those of any class when empty.
        scope: Whom it freezes.

    Raises:
        ValueError: A value is out of range; the message begins with the field.
    """

    name: str
    count: int
    window_seconds: float
    classes: Sequence[DenialClass] = ()
    scope: TripwireScope = TripwireScope.WORKER

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ValueError(f"name: must have 1 to 64 characters of [A-Za-z0-9_.-], not {self.name!r}")
        _checks.integer("count", self.count, 1, MAX_TRIPWIRE_COUNT)
        _checks.number("window_seconds", self.window_seconds, 0.000001, MAX_WINDOW_SECONDS)
        if not isinstance(self.classes, Sequence):
            raise ValueError(f"classes: must be a list, not {self.classes!r}")
        for one in self.classes:
            if not isinstance(one, DenialClass):
                raise ValueError(f"classes: must hold DenialClasses, not {one!r}")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("classes: must differ from one another")
        if not isinstance(self.scope, TripwireScope):
            raise ValueError(f"scope: must be a TripwireScope, not {self.scope!r}")
        object.__setattr__(self, "classes", tuple(self.classes))
