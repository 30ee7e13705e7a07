"""The lease never outlives what the controller acknowledged."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hayflick_orchestrator.lease import HEAD_START_SECONDS, MAX_UNACKNOWLEDGED_BEATS, Lease


def test_it_runs_from_when_the_beat_left() -> None:
    """A late acknowledgement renews only from when its beat was sent."""
    lease = Lease(10.0, 0.0)
    lease.sent(1, 4.0)
    lease.acknowledged(1)
    assert lease.remaining_seconds(9.0) == 5.0 - HEAD_START_SECONDS


def test_workers_have_time_to_die_within_it() -> None:
    """The end of workers begins half a second before the lease is over; a tenth of a short one."""
    assert Lease(15.0, 0.0).remaining_seconds(14.4) > 0
    assert Lease(15.0, 0.0).remaining_seconds(14.5) <= 0
    assert Lease(2.0, 0.0).remaining_seconds(1.79) > 0
    assert Lease(2.0, 0.0).remaining_seconds(1.81) <= 0


def test_silence_ends_it() -> None:
    """Without an acknowledgement it lapses, however many beats leave."""
    lease = Lease(3.0, 0.0)
    for second in range(5):
        lease.sent(second + 1, float(second))
    assert lease.remaining_seconds(3.0) <= 0


def test_only_what_was_sent_renews() -> None:
    """An acknowledgement of a beat that was never sent renews nothing."""
    lease = Lease(3.0, 0.0)
    lease.acknowledged(7)
    assert lease.remaining_seconds(3.0) <= 0


def test_a_welcome_begins_anew() -> None:
    """A new stream brings its own length and forgets beats of the old one."""
    lease = Lease(3.0, 0.0)
    lease.sent(1, 1.0)
    lease.welcomed(2.0, 5.0)
    lease.acknowledged(1)
    assert lease.remaining_seconds(2.0) == 5.0 - HEAD_START_SECONDS


def test_unacknowledged_beats_are_bounded() -> None:
    """A controller that never answers costs no more memory with every beat."""
    lease = Lease(3.0, 0.0)
    for number in range(2 * MAX_UNACKNOWLEDGED_BEATS):
        lease.sent(number, float(number))
    assert len(lease._sent_at) == MAX_UNACKNOWLEDGED_BEATS


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 20)), max_size=40))
def test_never_beyond_the_last_acknowledged(history: list[tuple[bool, int]]) -> None:
    """In every order of beats and acknowledgements it ends one length after the newest acknowledged beat."""
    lease, sent, newest = Lease(10.0, 0.0), {}, 0.0
    for now, (sends, number) in enumerate(history, start=1):
        if sends and number > max(sent, default=0):
            sent[number] = float(now)
            lease.sent(number, float(now))
        elif not sends:
            lease.acknowledged(number)
            newest = max(newest, sent.get(number, 0.0))
    assert lease.remaining_seconds(newest) <= 10.0
