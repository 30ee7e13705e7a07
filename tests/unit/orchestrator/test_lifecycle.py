"""What a worker's life may become, and what is done about it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hayflick.v1.resources_pb2 import EndReason, State
from hayflick_orchestrator.lifecycle import (
    Action,
    Ask,
    Died,
    EndAsked,
    Event,
    Finished,
    Frozen,
    GraceOver,
    Life,
    Ready,
    Thawed,
    step,
)

STOP = Ask(EndReason.END_REASON_COMPLETED, "done")
KILL = Ask(EndReason.END_REASON_KILL_SWITCH)

events = st.sampled_from(
    [
        Ready(),
        Frozen(),
        Thawed(),
        EndAsked(STOP),
        EndAsked(STOP, grace=True),
        EndAsked(KILL),
        GraceOver(),
        Died(),
        Finished(),
    ]
)


def live(*history: Event) -> tuple[Life, list[Action]]:
    """Return the life after *history*, and all that was done about it."""
    life, done = Life(), []
    for event in history:
        life, actions = step(life, event)
        done += actions
    return life, done


def test_a_plain_life() -> None:
    """A worker starts, runs, is told to end, is killed, dies and is gone."""
    life, done = live(Ready(), EndAsked(STOP), Died(), Finished())
    assert (life.state, life.ask, done) == (State.STATE_ENDED, STOP, [Action.KILL, Action.FINISH])


def test_only_a_running_worker_takes_tasks() -> None:
    """No task is started in a worker that is being built, is frozen, or ends."""
    assert [live(*history)[0].accepts_tasks for history in ((), (Ready(),), (Ready(), Frozen()))] == [
        False,
        True,
        False,
    ]
    assert not live(Ready(), EndAsked(STOP, grace=True))[0].accepts_tasks


def test_grace_tells_the_tasks_first() -> None:
    """With a grace, tasks are told to end, and the kill comes when their time is over."""
    life, done = live(Ready(), EndAsked(STOP, grace=True))
    assert (life.state, done) == (State.STATE_STOPPING, [Action.TERMINATE_TASKS])
    assert step(life, GraceOver())[1] == (Action.KILL,)


def test_kill_overtakes_grace() -> None:
    """A kill that comes during a grace is done at once and is what the record says."""
    life, done = live(Ready(), EndAsked(STOP, grace=True), EndAsked(KILL))
    assert (life.ask, done) == (KILL, [Action.TERMINATE_TASKS, Action.KILL])


def test_first_kill_stands() -> None:
    """Once the kill was ordered, no later ask changes why."""
    life, done = live(Ready(), EndAsked(STOP), EndAsked(KILL))
    assert (life.ask, done) == (STOP, [Action.KILL])


def test_nothing_waits_for_who_cannot_hear() -> None:
    """A frozen or half-built worker is killed without grace."""
    for history in ((), (Ready(), Frozen())):
        assert live(*history, EndAsked(STOP, grace=True))[1] == [Action.KILL]


def test_freeze_and_thaw() -> None:
    """A frozen worker goes on where it stood."""
    assert live(Ready(), Frozen(), Thawed())[0].state == State.STATE_RUNNING


def test_unasked_death() -> None:
    """A worker that dies by itself is finished like any other."""
    life, done = live(Ready(), Died())
    assert (life.ask, done) == (None, [Action.FINISH])


@given(st.lists(events, max_size=12))
def test_no_way_back(history: list[Event]) -> None:
    """Whatever happens in whatever order, a worker that ends never runs again and is finished once."""
    life, done, stopping = Life(), [], False
    for event in history:
        life, actions = step(life, event)
        done += actions
        assert not (stopping and not life.ending)
        stopping = life.ending
        assert life.state != State.STATE_ENDED or life.dead
    assert done.count(Action.FINISH) == int(life.dead)
    assert done.count(Action.KILL) <= 1


@given(st.lists(events, max_size=8), st.sampled_from([STOP, KILL]))
def test_an_ask_without_grace_always_ends_in_a_kill(history: list[Event], ask: Ask) -> None:
    """After an ask without grace, the worker is dead or its kill was ordered."""
    life, _ = live(*history)
    life, _ = step(life, EndAsked(ask))
    assert life.killing
