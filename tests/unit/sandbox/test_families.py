"""The mark of a task: what lowering two limits can, and cannot, make of it."""

from __future__ import annotations

import resource

from hypothesis import given
from hypothesis import strategies as st

from hayflick_sandbox.families import TOTAL, may_belong

serials = st.integers(1, 1_000_000)


@given(serials, st.integers(0), st.integers(0))
def test_lowering_takes_no_mark_off(serial: int, locks: int, rttime: int) -> None:
    """Whatever a process lowers its limits to, it still counts to its own task."""
    assert may_belong(serial, min(serial, locks), min(TOTAL - serial, rttime))


@given(serials, serials)
def test_an_untouched_mark_is_one_tasks(serial: int, other: int) -> None:
    """A process that lowered nothing counts to its own task alone."""
    assert may_belong(other, serial, TOTAL - serial) == (serial == other)


@given(serials)
def test_the_unmarked_are_nobodys(serial: int) -> None:
    """Init, whose limits were never set, belongs to no task."""
    infinite = resource.RLIM_INFINITY
    assert not may_belong(serial, infinite, infinite)
    assert not may_belong(serial, infinite, 0)
    assert not may_belong(serial, 0, infinite)
