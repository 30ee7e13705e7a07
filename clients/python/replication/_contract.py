"""The policy under which workers may be born."""

# ruff: noqa: TRY004 -- users are promised one kind of error for every bad value

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from replication import _checks
from replication._manifest import Manifest
from replication._terms import FamilyBudget, Tripwire, grade_floors

MAX_DEPTH = 1_000
MAX_REPLICAS = 1_000_000
MAX_SECONDS = 366 * 86_400.0  # a leap year
MAX_MANIFEST_TTL_SECONDS = 3_600.0
MAX_STOP_CONDITIONS = 64
MAX_TRIPWIRES = 16
MAX_CEL_BYTES = 4_096
MAX_PREDICATE_SECONDS = 30.0


@dataclass(frozen=True)
class ParentFacts:
    """The parent of a worker that wants to be born.

    Attributes:
        worker_id: Its identity.
        depth: Its generation.
        age_seconds: How long it has lived.
        live_child_count: How many children of it live.
    """

    worker_id: str
    depth: int
    age_seconds: float
    live_child_count: int


@dataclass(frozen=True)
class LineageFacts:
    """The family tree of a worker that wants to be born.

    Attributes:
        root_id: Its root; the new worker itself for a root.
        depth: The generation the new worker would have.
        live_count: How many workers of the tree live.
    """

    root_id: str
    depth: int
    live_count: int


@dataclass(frozen=True)
class ReplicationContext:
    """What a stop condition is asked about: one birth, and the population it would join.

    Attributes:
        manifest: The manifest of the worker that wants to be born.
        active_count: Workers of the contract that live now, the new one left out.
        contract: The contract, without its stop conditions.
        parent: Its parent; ``None`` for a root.
        lineage: Its family tree; ``None`` where you made the context yourself
            and left it out.
    """

    manifest: Manifest
    active_count: int
    contract: ReplicationContract
    parent: ParentFacts | None = None
    lineage: LineageFacts | None = None


Predicate: TypeAlias = Callable[[ReplicationContext], bool]
"""A rule over a birth; ``True`` denies it."""


@dataclass(frozen=True)
class StopCondition:
    """A further rule of a contract, asked whenever a worker registers.

    A condition that raises, runs out of time or gives anything but a bool denies
    the birth. Give one of the two forms:

    Attributes:
        name: Unique in its contract; denials name it. 1 to 128 characters.
        description: What it is for, for people.
        predicate: A Python function. It travels by value and runs in a sandbox
            of its own, never in the controller.
        cel: An expression of the `Common Expression Language <https://cel.dev>`_
            over ``manifest``, ``active_count``, ``contract``, ``parent`` and
            ``lineage``, such as ``active_count >= 5``; at most 4 KiB. Faster, and
            for clients in every language.
        timeout_seconds: How long a predicate may run, 30 at most; ``None`` is 2.

    Raises:
        ValueError: A field is not valid; the message begins with it.
    """

    name: str
    description: str = ""
    predicate: Predicate | None = None
    cel: str | None = None
    timeout_seconds: float | None = None

    def __post_init__(self) -> None:
        _checks.text("name", self.name, 128, min_chars=1)
        _checks.text("description", self.description, 1_024)
        if (self.predicate is None) == (self.cel is None):
            raise ValueError(f"predicate: {self.name!r} needs either a predicate or cel, and not both")
        if self.predicate is not None and not callable(self.predicate):
            raise ValueError(f"predicate: must be a function, not {self.predicate!r}")
        if self.cel is not None:
            _checks.text("cel", self.cel, MAX_CEL_BYTES, min_chars=1)
            if len(self.cel.encode()) > MAX_CEL_BYTES:
                raise ValueError(f"cel: must be at most {MAX_CEL_BYTES:,} bytes in UTF-8")
        if self.timeout_seconds is not None:
            _checks.number("timeout_seconds", self.timeout_seconds, 0.01, MAX_PREDICATE_SECONDS)

    def is_triggered(self, context: ReplicationContext) -> bool:
        """Ask the predicate here, in this process: for the unit tests of your own rules.

        Raises:
            ValueError: The condition is CEL, which only the controller evaluates.
            TypeError: The predicate gave no bool; a controller would deny.
            Exception: Whatever the predicate raises; a controller would deny.
        """
        if self.predicate is None:
            raise ValueError(f"cel: {self.name!r} is evaluated by the controller, not in this process")
        triggered = self.predicate(context)
        if not isinstance(triggered, bool):
            raise TypeError(f"{self.name!r} gave {triggered!r} where a bool is due")
        return triggered


@dataclass(frozen=True)
class ReplicationContract:
    """The policy that governs one population of workers, whole and at every instant.

    Attributes:
        max_depth: The deepest generation allowed, 0 to 1,000; a root is generation 0.
        max_replicas: How many workers may live at once, 1 to 1,000,000.
        cooldown_seconds: The least time between two births by one parent; may be 0.
        stop_conditions: Further rules, 64 at most, with different names.
        expiration_seconds: How long each worker lives; ``None``: until it is stopped.
        manifest_ttl_seconds: How long a manifest, and the slot it reserves, stays
            good, 3,600 at most; ``None`` is the controller's default of 60.
        display_name: For people.
        family_budget: What each root and all its descendants may use together.
        tripwires: Rules that quarantine by themselves, 16 at most, with different names.
        min_grade: The least isolation grade that a worker must be measured to have
            before it runs: "A", "B" or "C", or such grades by the first generation
            they are for, as ``{0: "B", 2: "A"}``; the strictest that applies counts.

    Raises:
        ValueError: A field is not valid; the message begins with it.
    """

    max_depth: int
    max_replicas: int
    cooldown_seconds: float
    stop_conditions: Sequence[StopCondition] = ()
    expiration_seconds: float | None = None
    manifest_ttl_seconds: float | None = None
    display_name: str = ""
    family_budget: FamilyBudget | None = None
    tripwires: Sequence[Tripwire] = ()
    min_grade: str | Mapping[int, str] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        _checks.integer("max_depth", self.max_depth, 0, MAX_DEPTH)
        _checks.integer("max_replicas", self.max_replicas, 1, MAX_REPLICAS)
        _checks.number("cooldown_seconds", self.cooldown_seconds, 0, MAX_SECONDS)
        if self.expiration_seconds is not None:
            _checks.number("expiration_seconds", self.expiration_seconds, 0.001, MAX_SECONDS)
        if self.manifest_ttl_seconds is not None:
            _checks.number("manifest_ttl_seconds", self.manifest_ttl_seconds, 0.001, MAX_MANIFEST_TTL_SECONDS)
        _checks.text("display_name", self.display_name, 128)
        if not isinstance(self.stop_conditions, Sequence):
            raise ValueError(f"stop_conditions: must be a list, not {self.stop_conditions!r}")
        if len(self.stop_conditions) > MAX_STOP_CONDITIONS:
            raise ValueError(f"stop_conditions: at most {MAX_STOP_CONDITIONS} are allowed")
        names: set[str] = set()
        for condition in self.stop_conditions:
            if not isinstance(condition, StopCondition):
                raise ValueError(f"stop_conditions: must hold StopConditions, not {condition!r}")
            if condition.name in names:
                raise ValueError(f"stop_conditions: two are named {condition.name!r}")
            names.add(condition.name)
        # A list that its maker goes on changing would promise what the controller does not hold.
        object.__setattr__(self, "stop_conditions", tuple(self.stop_conditions))
        if self.family_budget is not None and not isinstance(self.family_budget, FamilyBudget):
            raise ValueError(f"family_budget: must be a FamilyBudget, not {self.family_budget!r}")
        self._check_tripwires()
        floors = dict(grade_floors(self.min_grade))
        object.__setattr__(self, "min_grade", floors.get(0) if set(floors) == {0} else floors or None)

    def _check_tripwires(self) -> None:
        if not isinstance(self.tripwires, Sequence):
            raise ValueError(f"tripwires: must be a list, not {self.tripwires!r}")
        if len(self.tripwires) > MAX_TRIPWIRES:
            raise ValueError(f"tripwires: at most {MAX_TRIPWIRES} are allowed")
        for tripwire in self.tripwires:
            if not isinstance(tripwire, Tripwire):
                raise ValueError(f"tripwires: must hold Tripwires, not {tripwire!r}")
        if len({tripwire.name for tripwire in self.tripwires}) < len(self.tripwires):
            raise ValueError("tripwires: two have the same name")
        object.__setattr__(self, "tripwires", tuple(self.tripwires))

    def evaluate(self, context: ReplicationContext) -> StopCondition | None:
        """Return the first stop condition that *context* triggers, asked in this process.

        For the unit tests of your own rules; the controller asks for itself.

        Raises:
            ValueError: A condition is CEL, which only the controller evaluates.
            TypeError: A predicate gave no bool.
        """
        return next(
            (condition for condition in self.stop_conditions if condition.is_triggered(context)), None
        )
