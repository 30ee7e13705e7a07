"""When a sender lets its batch fill, and when it does not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hayflick_rpc.pace import CROWD_SECONDS, SPACING_SECONDS, Pace

moments = st.floats(0, 1, allow_subnormal=False)


@given(st.lists(st.tuples(moments, moments, moments), max_size=20))
def test_who_waits_for_each_event_is_never_held_up(rounds: list[tuple[float, float, float]]) -> None:
    """However fast one event follows the answer to the one before, it is sent at once."""
    pace, now = Pace(), 0.0
    for before, waiting, answering in rounds:
        now += before
        pace.submitted(now)
        now += waiting
        assert pace.wait_seconds(now) == 0
        pace.sent(now)
        now += answering
        pace.answered()


def test_a_crowd_is_sent_at_a_distance() -> None:
    """Once an event came while another was under way, the next batch fills until the distance is kept."""
    pace = Pace()
    pace.sent(10.0)
    pace.submitted(10.001)
    pace.answered()
    assert pace.wait_seconds(10.002) == pytest.approx(SPACING_SECONDS - 0.002)
    assert pace.wait_seconds(10.0 + SPACING_SECONDS) == 0


def test_a_crowd_that_left_is_forgotten() -> None:
    """When events have come one by one for a while, they are sent at once again."""
    pace = Pace()
    pace.sent(10.0)
    pace.submitted(10.0)
    pace.answered()
    pace.sent(10.0 + CROWD_SECONDS)
    pace.answered()
    assert pace.wait_seconds(10.0 + CROWD_SECONDS) == 0


@given(st.lists(st.tuples(moments, st.sampled_from(["submitted", "sent", "answered"]))))
def test_no_batch_waits_longer_than_the_distance(notes: list[tuple[float, str]]) -> None:
    """Whatever happens, a batch waits for company no longer than the distance between two."""
    pace, now = Pace(), 0.0
    for elapsed, note in notes:
        now += elapsed
        if note == "answered":
            pace.answered()
        else:
            getattr(pace, note)(now)
        # The clock's own grain, at this distance from its zero.
        assert 0 <= pace.wait_seconds(now) <= SPACING_SECONDS + 1e-9
