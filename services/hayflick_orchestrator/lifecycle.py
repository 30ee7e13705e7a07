"""A worker's life as a pure machine: an event in, the next life and what to do about it out.

::

    STARTING ──ready──► RUNNING ◄──thawed/frozen──► QUARANTINED
        │                  │                             │
        └──────────────────┴────────end asked────────────┘
                                    ▼
                      STOPPING (grace, then the kill)
                                    │ died, then finished
                                    ▼
                                  ENDED
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from hayflick.v1.resources_pb2 import EndReason, State


@dataclass(frozen=True, slots=True)
class Ask:
    """That somebody wants a worker to end.

    Attributes:
        reason: Recorded as how the worker ended.
        detail: In the words of whoever asked.
    """

    reason: EndReason.ValueType
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Ready:
    """The sandbox is complete."""


@dataclass(frozen=True, slots=True)
class Frozen:
    """The kernel confirmed that the worker, or an ancestor with it, is frozen."""


@dataclass(frozen=True, slots=True)
class Thawed:
    """Nothing over the worker is frozen any more."""


@dataclass(frozen=True, slots=True)
class EndAsked:
    """The worker shall end; with *grace*, its tasks are told first."""

    ask: Ask
    grace: bool = False


@dataclass(frozen=True, slots=True)
class GraceOver:
    """The tasks had their time."""


@dataclass(frozen=True, slots=True)
class Died:
    """The last process of the worker was seen dead."""


@dataclass(frozen=True, slots=True)
class Finished:
    """Nothing of the worker is left on the node, and its end is recorded."""


Event = Ready | Frozen | Thawed | EndAsked | GraceOver | Died | Finished


class Action(enum.Enum):
    """What the supervisor does about a step."""

    TERMINATE_TASKS = "terminate tasks"
    KILL = "kill"
    FINISH = "finish"


# Looked up once: protobuf finds each by a search in Python, and this is asked of all workers at once.
_ENDING = (State.STATE_STOPPING, State.STATE_ENDED)


@dataclass(frozen=True, slots=True)
class Life:
    """Where a worker is.

    Attributes:
        state: As the wire calls it.
        ask: The end that was asked for and stands; ``None`` while nobody did.
        killing: Whether the kill was ordered, so that no later ask changes why.
        dead: Whether its processes were seen dead.
    """

    state: State.ValueType = State.STATE_STARTING
    ask: Ask | None = None
    killing: bool = False
    dead: bool = False

    @property
    def accepts_tasks(self) -> bool:
        """Whether a task may be started now."""
        return self.state == State.STATE_RUNNING

    @property
    def ending(self) -> bool:
        """Whether the end was asked for or came."""
        return self.state in _ENDING


def step(life: Life, event: Event) -> tuple[Life, tuple[Action, ...]]:  # noqa: PLR0911 -- one rule a line
    """Return the life after *event*, and what must be done, in order."""
    if life.state == State.STATE_ENDED:
        return life, ()
    match event:
        case Ready() if life.state == State.STATE_STARTING:
            return replace(life, state=State.STATE_RUNNING), ()
        case Frozen() if life.state == State.STATE_RUNNING:
            return replace(life, state=State.STATE_QUARANTINED), ()
        case Thawed() if life.state == State.STATE_QUARANTINED:
            return replace(life, state=State.STATE_RUNNING), ()
        case EndAsked(ask, grace):
            return _end(life, ask, grace=grace)
        case GraceOver() if life.state == State.STATE_STOPPING and not life.killing:
            return replace(life, killing=True), (Action.KILL,)
        case Died() if not life.dead:
            return replace(life, state=State.STATE_STOPPING, killing=True, dead=True), (Action.FINISH,)
        case Finished() if life.dead:
            return replace(life, state=State.STATE_ENDED), ()
        case _:
            return life, ()


def _end(life: Life, ask: Ask, *, grace: bool) -> tuple[Life, tuple[Action, ...]]:
    # The first ask stands once it killed. One that still waits out a grace
    # gives way to one that does not wait: what really ends the worker is what
    # the record must say.
    if life.killing:
        return life, ()
    if life.state == State.STATE_STOPPING:
        if grace:
            return life, ()
        return replace(life, ask=ask, killing=True), (Action.KILL,)
    # Only a running worker can hear SIGTERM: a frozen one, or one half built,
    # cannot, and a grace would only delay its end.
    if grace and life.state == State.STATE_RUNNING:
        return replace(life, state=State.STATE_STOPPING, ask=ask), (Action.TERMINATE_TASKS,)
    return replace(life, state=State.STATE_STOPPING, ask=ask, killing=True), (Action.KILL,)
