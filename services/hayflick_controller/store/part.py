"""What the parts of a transaction share: the driver, and what is told or written at its end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from hayflick_controller.store.rows import Values

if TYPE_CHECKING:
    from hayflick_controller.model import Contract, Worker
    from hayflick_controller.store.driver import Driver
    from hayflick_controller.store.known import Known
    from hayflick_controller.store.protocol import Identity, Queued

T = TypeVar("T")

IN_LIMIT = 500
"""How many values go into one IN; every database takes that many."""


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
        known: Known,
        is_alive: Callable[[str], bool] = lambda _: False,
        *,
        turn: int = 0,
    ) -> None:
        self._driver = driver
        self._identity = identity
        self._is_alive = is_alive
        self._turn = turn
        self.sequence = sequence
        self._known = known
        self._events: list[Queued] = []
        self._changed: dict[str, Worker] = {}
        self._heard: dict[str, Worker] = {}
        self._quarantines: list[str] = []
        self._ended: dict[str, Contract] = {}
        self._population: defaultdict[str, Change] = defaultdict(Change)


def batches(values: Sequence[T]) -> Iterator[Sequence[T]]:
    """Yield *values* in parts that fit one IN."""
    for start in range(0, len(values), IN_LIMIT):
        yield values[start : start + IN_LIMIT]


def new(values: Values) -> Values:
    """Name *values* as the bound parameters of an UPDATE, which may not be called as its columns."""
    return {f"new_{name}": value for name, value in values.items()}
