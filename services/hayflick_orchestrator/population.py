"""Who lives on this node and how they descend from one another: no I/O, no clock."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from hayflick.v1.controller_pb2 import Scope

# Ended workers that are remembered, so that a late caller learns why.
MAX_REMEMBERED = 10_000


class Member(Protocol):
    """What the population must know of a worker, or of one being born."""

    @property
    def worker_id(self) -> str:
        """Its identity."""

    @property
    def contract_id(self) -> str:
        """Its contract."""

    @property
    def parent_id(self) -> str:
        """Its parent, or empty for a root."""


class Living(Member, Protocol):
    """A worker that has a place in the lineage tree."""

    @property
    def cgroup_path(self) -> str:
        """Where its processes are, below every control-group hierarchy."""


L = TypeVar("L", bound=Living)
B = TypeVar("B", bound=Member)
R = TypeVar("R")


class Population(Generic[L, B, R]):
    """The living, the ones being born, and what is remembered of the dead.

    A birth is kept apart from the living because its manifest is not believed
    until the controller registered it: a forged one may name any worker.
    """

    def __init__(self, max_remembered: int = MAX_REMEMBERED) -> None:
        self._living: dict[str, L] = {}
        self._children: dict[str, dict[str, None]] = {}
        self._births: dict[int, B] = {}
        self._ended: OrderedDict[str, R] = OrderedDict()
        self._max_remembered = max_remembered

    def __len__(self) -> int:
        return len(self._living)

    def __iter__(self) -> Iterator[L]:
        return iter(tuple(self._living.values()))

    @property
    def births(self) -> tuple[B, ...]:
        """The launches in progress."""
        return tuple(self._births.values())

    def conceive(self, birth: B) -> None:
        """Note that *birth* is in progress."""
        self._births[id(birth)] = birth

    def settle(self, birth: B) -> None:
        """Note that *birth* is over, either way."""
        self._births.pop(id(birth), None)

    def add(self, worker: L) -> None:
        """Count *worker* among the living.

        Raises:
            ValueError: one with its identity lives already.
        """
        if worker.worker_id in self._living:
            raise ValueError(f"worker {worker.worker_id} lives here already")
        self._living[worker.worker_id] = worker
        if worker.parent_id:
            self._children.setdefault(worker.parent_id, {})[worker.worker_id] = None

    def bury(self, worker: L, record: R) -> None:
        """Take *worker* from the living and remember *record* of it."""
        self._living.pop(worker.worker_id, None)
        siblings = self._children.get(worker.parent_id)
        if siblings is not None:
            siblings.pop(worker.worker_id, None)
            if not siblings:
                del self._children[worker.parent_id]
        self.remember(worker.worker_id, record)

    def remember(self, worker_id: str, record: R) -> None:
        """Remember *record* of a worker that ended, or never came to live."""
        self._ended[worker_id] = record
        self._ended.move_to_end(worker_id)
        while len(self._ended) > self._max_remembered:
            self._ended.popitem(last=False)

    def get(self, worker_id: str) -> L | None:
        """Return the living worker of that identity."""
        return self._living.get(worker_id)

    def remembered(self, worker_id: str) -> R | None:
        """Return what is remembered of a worker that ended."""
        return self._ended.get(worker_id)

    def children(self, worker_id: str) -> tuple[L, ...]:
        """Return the living children of a worker, oldest first."""
        return tuple(self._living[child] for child in self._children.get(worker_id, ()))

    def descendants(self, worker_id: str) -> tuple[L, ...]:
        """Return all living descendants of a worker, parents before children."""
        found: list[L] = []
        level = self.children(worker_id)
        while level:
            found.extend(level)
            level = tuple(child for worker in level for child in self.children(worker.worker_id))
        return tuple(found)

    def ancestors(self, worker_id: str) -> tuple[L, ...]:
        """Return the living ancestors of a worker, parent first."""
        found: list[L] = []
        worker = self._living.get(worker_id)
        while worker is not None and worker.parent_id:
            worker = self._living.get(worker.parent_id)
            if worker is not None:
                found.append(worker)
        return tuple(found)

    def is_descendant(self, worker_id: str, of: str) -> bool:
        """Return whether *worker_id* descends from *of*; nobody descends from itself."""
        return any(ancestor.worker_id == of for ancestor in self.ancestors(worker_id))

    def family(self, worker_id: str) -> tuple[L, ...]:
        """Return a living worker and its descendants; empty when it does not live here."""
        worker = self._living.get(worker_id)
        return () if worker is None else (worker, *self.descendants(worker_id))

    def in_scope(self, scope: Scope, also: Iterable[str] = ()) -> tuple[tuple[L, ...], tuple[B, ...]]:
        """Return the living and the births in *scope*, or below one named in *also*."""
        named = set(also)
        match scope.WhichOneof("scope"):
            case "everything" if scope.everything:
                return tuple(self._living.values()), self.births
            case "contract_id":
                picked = {w.worker_id: w for w in self if w.contract_id == scope.contract_id}
            case "worker_id":
                picked = {}
                named.add(scope.worker_id)
            case _:
                picked = {}
        for worker_id in named:
            picked.update((member.worker_id, member) for member in self.family(worker_id))
        births = tuple(
            birth
            for birth in self.births
            if birth.worker_id in named
            or birth.parent_id in named
            or birth.parent_id in picked
            or (scope.WhichOneof("scope") == "contract_id" and birth.contract_id == scope.contract_id)
        )
        return tuple(picked.values()), births


def tops(workers: Iterable[L]) -> tuple[L, ...]:
    """Return those of *workers* that have no ancestor among them.

    Killing or freezing these takes the rest with them, in one write each.
    """
    everyone = {worker.worker_id: worker for worker in workers}
    return tuple(worker for worker in everyone.values() if worker.parent_id not in everyone)
