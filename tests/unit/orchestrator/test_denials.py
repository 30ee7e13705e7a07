"""Counting denials: budgets never give more than they have, gaps are told, tripwires trip when they must."""

from __future__ import annotations

from collections import Counter

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st

from hayflick.v1.resources_pb2 import DenialClass, Tripwire, TripwireScope
from hayflick_orchestrator.denials import Budget, Gap, Wire, class_name, class_of, to_wire

CLASSES = st.integers(1, 10)
MOMENTS = st.lists(st.tuples(st.integers(0, 5_000), CLASSES), max_size=60)


def timeline(steps: list[tuple[int, int]]) -> list[tuple[float, int]]:
    """Return moments in order, from the milliseconds between them."""
    now, moments = 0, []
    for step, kind in steps:
        now += step
        moments.append((now / 1_000, kind))
    return moments


@given(st.floats(0.1, 1_000), st.integers(1, 50), st.lists(st.floats(0, 3), max_size=200))
def test_a_budget_is_kept(per_second: float, at_once: int, steps: list[float]) -> None:
    """However it is asked, a budget gives no more than what it began with and what came in since."""
    budget, now, taken = Budget(per_second, at_once, 0.0), 0.0, 0
    for step in steps:
        now += step
        taken += budget.take(now)
        assert taken <= at_once + now * per_second + 1e-6


@given(st.floats(0.1, 1_000), st.integers(1, 50), st.floats(0, 100))
def test_a_budget_says_when_to_come_back(per_second: float, at_once: int, start: float) -> None:
    """An empty budget says how long it takes to give again, and then gives."""
    budget = Budget(per_second, at_once, start)
    while budget.take(start):
        pass
    wait = budget.wait_seconds(start)
    assert 0 < wait <= 1 / per_second + 1e-9
    assert budget.take(start + wait + 1e-6)


def test_a_clock_that_goes_back_gives_nothing() -> None:
    """A budget asked about an earlier moment neither fills nor breaks."""
    budget = Budget(1.0, 1, 100.0)
    assert budget.take(100.0)
    assert not budget.take(50.0)
    assert not budget.take(100.5)
    assert budget.take(101.0)


@given(st.lists(CLASSES))
def test_a_gap_loses_nothing(left_out: list[int]) -> None:
    """A gap tells exactly what was left out, once."""
    gap = Gap()
    for one in left_out:
        gap.add(one)
    assert bool(gap) is bool(left_out)
    assert gap.close() == {class_name(one): count for one, count in Counter(left_out).items()}
    assert not gap
    assert gap.close() == {}


@given(MOMENTS, st.integers(1, 8), st.integers(1, 20_000), st.sets(st.integers(1, 10)), st.booleans())
def test_a_tripwire_trips_exactly_when_it_must(
    steps: list[tuple[int, int]], count: int, window_ms: int, classes: set[int], family: bool
) -> None:
    """It trips at the first moment at which the last *count* denials of its classes lie in its window."""
    scope = TripwireScope.TRIPWIRE_SCOPE_FAMILY if family else TripwireScope.TRIPWIRE_SCOPE_UNSPECIFIED
    window = Duration()
    window.FromMilliseconds(window_ms)
    terms = Tripwire(name="w", classes=sorted(classes), count=count, window=window, scope=scope)  # type: ignore[arg-type]
    wire = Wire(terms)
    counted: list[tuple[float, int]] = []
    for now, kind in timeline(steps):
        trip = wire.note(kind, now)
        if not classes or kind in classes:
            counted.append((now, kind))
        last = counted[-count:]
        within = len(last) == count and round((now - last[0][0]) * 1_000) <= window_ms
        if not within or (classes and kind not in classes):
            assert trip is None
            continue
        assert trip is not None
        assert trip.whole_family is family
        assert dict(trip.denials) == dict(Counter(one for _, one in last))
        assert sum(one.count for one in trip.counts()) == count
        counted.clear()  # it counts from nothing again


@pytest.mark.parametrize("denial_class", DenialClass.values()[1:])
def test_classes_have_one_name(denial_class: int) -> None:
    """A class of the wire and its name in the policy are each other's."""
    assert class_of(class_name(denial_class)) == denial_class  # type: ignore[arg-type]


def test_counts_travel_by_class() -> None:
    """Counts are listed by class, each once."""
    counts = to_wire(Counter([5, 2, 5]))
    assert [(one.denial_class, one.count) for one in counts] == [(2, 1), (5, 2)]
