"""Counting denials: budgets, gaps and tripwires. Pure: no I/O, and the clock is the caller's."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from hayflick.v1.resources_pb2 import DenialClass, DenialCount, TripwireScope
from hayflick_rpc import wire

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hayflick.v1.resources_pb2 import Tripwire

Class: TypeAlias = DenialClass.ValueType


class Budget:
    """So many of something a second, and so many at once."""

    def __init__(self, per_second: float, at_once: int, now: float) -> None:
        self._per_second = per_second
        self._most = float(at_once)
        self._left = self._most
        self._filled_at = now

    def take(self, now: float) -> bool:
        """Use one up; return whether there was one."""
        self._fill(now)
        if self._left < 1:
            return False
        self._left -= 1
        return True

    def give(self) -> None:
        """Take one back that was not used up after all."""
        self._left = min(self._most, self._left + 1)

    def wait_seconds(self, now: float) -> float:
        """Return how long it takes until there is one."""
        self._fill(now)
        return max(0.0, (1 - self._left) / self._per_second)

    def _fill(self, now: float) -> None:
        # A clock read before another may be given after it; time does not go back.
        elapsed = max(0.0, now - self._filled_at)
        self._filled_at = max(now, self._filled_at)
        self._left = min(self._most, self._left + elapsed * self._per_second)


class Gap:
    """What was left out of the record since the last event, so that the next one says it."""

    def __init__(self) -> None:
        self._left_out: Counter[Class] = Counter()

    def __bool__(self) -> bool:
        return bool(self._left_out)

    def add(self, denial_class: Class) -> None:
        """Leave one out."""
        self._left_out[denial_class] += 1

    def close(self) -> dict[str, int]:
        """Return how many were left out of each class, and begin anew."""
        counts, self._left_out = self._left_out, Counter()
        return {class_name(denial_class): count for denial_class, count in sorted(counts.items())}


@dataclass(frozen=True, slots=True)
class Trip:
    """That a tripwire gave way.

    Attributes:
        name: As the contract names it.
        whole_family: Whether everybody from the root on is to be frozen.
        denials: Those that did it, by class.
    """

    name: str
    whole_family: bool
    denials: Mapping[Class, int]

    def counts(self) -> list[DenialCount]:
        """Return the denials for the wire."""
        return to_wire(self.denials)


class Wire:
    """One tripwire, over one worker.

    It gives way when *count* denials of its classes fell within its window, both
    ends included. Then it counts from nothing again.
    """

    def __init__(self, terms: Tripwire) -> None:
        self.name = terms.name
        self._classes = frozenset(terms.classes) - {DenialClass.DENIAL_CLASS_UNSPECIFIED}
        self._count = max(terms.count, 1)
        self._window_seconds = wire.seconds(terms.window)
        self._whole_family = terms.scope == TripwireScope.TRIPWIRE_SCOPE_FAMILY
        self._seen: deque[tuple[float, Class]] = deque(maxlen=self._count)

    def note(self, denial_class: Class, now: float) -> Trip | None:
        """Count one denial; return the trip when it was the last that was lacking."""
        if self._classes and denial_class not in self._classes:
            return None
        self._seen.append((now, denial_class))
        if len(self._seen) < self._count or now - self._seen[0][0] > self._window_seconds:
            return None
        counts = Counter(seen for _, seen in self._seen)
        self._seen.clear()
        return Trip(self.name, self._whole_family, counts)


def class_of(name: str) -> Class:
    """Return the wire's class of the policy's group *name*."""
    return DenialClass.Value(f"DENIAL_CLASS_{name.upper()}")


def class_name(denial_class: Class) -> str:
    """Return the policy's name of a class of the wire."""
    return DenialClass.Name(denial_class).removeprefix("DENIAL_CLASS_").lower()


def to_wire(counts: Mapping[Class, int]) -> list[DenialCount]:
    """Return *counts* for the wire, by class."""
    return [DenialCount(denial_class=one, count=count) for one, count in sorted(counts.items())]
