"""What the parts of a transaction share: the driver, and what is told or written at its end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from hayflick_controller.store.rows import Values

if TYPE_CHECKING:
    from hayflick_controller.model import StopCondition, Worker
    from hayflick_controller.store.prepared import Driver
    from hayflick_controller.store.protocol import Identity, Queued

T = TypeVar("T")

IN_LIMIT = 500
"""How many values go into one IN; every database takes that many."""


@dataclass(slots=True)
class Immutable:
    """What never changes once it is written, kept from one transaction to the next.

    Names are random and never used twice, so that a row whose transaction was
    rolled back after it was read here cannot be taken for another.

    Attributes:
        conditions: Stop conditions by contract; they may hold megabytes.
        secrets: Signing secrets by key and contract.
    """

    conditions: MutableMapping[str, tuple[StopCondition, ...]] = field(default_factory=dict)
    secrets: MutableMapping[tuple[str, str], bytes] = field(default_factory=dict, repr=False)


@dataclass(slots=True)
class Change:
    """By how much a contract's population changes."""

    active: int = 0
    reserved: int = 0
    version: int = 0


class Part:
    """The base of each part of :class:`~hayflick_controller.store.transaction.SqlTx`."""

    def __init__(
        self,
        driver: Driver,
        identity: Identity,
        sequence: int,
        immutable: Immutable,
        is_alive: Callable[[str], bool] = lambda _: False,
        *,
        turn: int = 0,
    ) -> None:
        self._driver = driver
        self._identity = identity
        self._is_alive = is_alive
        self._turn = turn
        self.sequence = sequence
        self._immutable = immutable
        self._events: list[Queued] = []
        self._changed: dict[str, Worker] = {}
        self._heard: dict[str, Worker] = {}
        self._quarantines: list[str] = []
        self._population: defaultdict[str, Change] = defaultdict(Change)


def batches(values: Sequence[T]) -> Iterator[Sequence[T]]:
    """Yield *values* in parts that fit one IN."""
    for start in range(0, len(values), IN_LIMIT):
        yield values[start : start + IN_LIMIT]


def new(values: Values) -> Values:
    """Name *values* as the bound parameters of an UPDATE, which may not be called as its columns."""
    return {f"new_{name}": value for name, value in values.items()}
