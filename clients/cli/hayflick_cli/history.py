"""What happened, rebuilt from the record alone: contracts, manifests, lives, latches, nodes. Pure.

A history takes the decisions of one database in their order and judges none of
them; :mod:`~hayflick_cli.promises` looks at each before it is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from hayflick_cli.entries import Entry

QUARANTINE = "quarantine/"
EVERYTHING = "everything"


@dataclass(slots=True)
class Contract:
    """A contract's limits, and how many live under it."""

    created: Entry
    max_depth: int
    max_replicas: int
    cooldown_us: int
    population: int = 0
    undone: bool = False


@dataclass(slots=True)
class Manifest:
    """A permission for one birth, and how many stand that it was used for."""

    issued: Entry
    births: int = 0
    undone: bool = False


@dataclass(slots=True)
class Life:
    """A worker, from its registration to its end."""

    born: Entry
    depth: int
    node_id: str
    parent: Life | None
    children: list[Life] = field(default_factory=list)
    end: Entry | None = None

    @property
    def worker_id(self) -> str:
        """Its name."""
        return self.born.worker_id

    @property
    def end_reason(self) -> str:
        """Why it ended; "" while it lives."""
        return "" if self.end is None else self.end.text("end_reason")

    @property
    def seen_dead(self) -> bool:
        """Whether its node said that it ended, rather than its node's lease."""
        return self.end is not None and "silent_seconds" not in self.end.details

    def line(self) -> Iterator[Life]:
        """Yield itself and its ancestors."""
        life: Life | None = self
        while life is not None:
            yield life
            life = life.parent

    def family(self) -> Iterator[Life]:
        """Yield itself and its descendants."""
        waiting = [self]
        while waiting:
            life = waiting.pop()
            yield life
            waiting += life.children


@dataclass(slots=True)
class Latch:
    """A kill switch or a quarantine as it stands, and each time it was engaged."""

    epoch: int = 0
    engaged: bool = False
    targets: dict[int, list[Life]] = field(default_factory=dict)
    """Who lived in its scope when it was engaged, by the epoch that this began."""


@dataclass(slots=True)
class History:
    """See the module.

    Attributes:
        contracts: By id.
        manifests: By id.
        lives: By worker; a registration that was undone is none.
        latches: By scope.
        nodes: The last ``node_connected`` of each.
        revoked: Keys that are refused.
    """

    contracts: dict[str, Contract] = field(default_factory=dict)
    manifests: dict[str, Manifest] = field(default_factory=dict)
    lives: dict[str, Life] = field(default_factory=dict)
    latches: dict[str, Latch] = field(default_factory=dict)
    nodes: dict[str, Entry] = field(default_factory=dict)
    revoked: set[str] = field(default_factory=set)

    def take(self, entry: Entry) -> None:
        """Go on by one decision.

        Raises:
            BadEntry: It lacks a number that its kind has.
        """
        act = _ACTS.get(entry.kind)
        if act is not None:
            act(self, entry)

    def living(self, scope: str = EVERYTHING) -> list[Life]:
        """Return who lives in the scope of a latch."""
        kind, _, name = scope.partition("/")
        if kind == EVERYTHING:
            lives: Iterator[Life] = iter(self.lives.values())
        elif kind == "contract":
            lives = (life for life in self.lives.values() if life.born.contract_id == name)
        else:
            top = self.lives.get(name)
            lives = iter(()) if top is None else top.family()
        return [life for life in lives if life.end is None]

    def latches_over(self, contract_id: str, parent: Life | None) -> Iterator[tuple[str, Latch]]:
        """Yield the latches over a birth below *parent*, with their scopes."""
        scopes = [EVERYTHING, f"contract/{contract_id}"]
        for life in parent.line() if parent is not None else ():
            scopes += [f"worker/{life.worker_id}", f"{QUARANTINE}{life.worker_id}"]
        for scope in scopes:
            if (latch := self.latches.get(scope)) is not None:
                yield scope, latch


def _contract(history: History, entry: Entry) -> None:
    history.contracts[entry.contract_id] = Contract(
        entry,
        max_depth=round(entry.number("max_depth")),
        max_replicas=round(entry.number("max_replicas")),
        cooldown_us=round(entry.number("cooldown_seconds") * 1_000_000),
    )


def _contract_undone(history: History, entry: Entry) -> None:
    if (contract := history.contracts.get(entry.contract_id)) is not None:
        contract.undone = True
    _engage(history, entry)


def _manifest(history: History, entry: Entry) -> None:
    history.manifests[entry.text("manifest_id")] = Manifest(entry)


def _manifest_undone(history: History, entry: Entry) -> None:
    if (manifest := history.manifests.get(entry.text("manifest_id"))) is not None:
        manifest.undone = True


def _birth(history: History, entry: Entry) -> None:
    if entry.worker_id in history.lives:
        return  # and nothing that was told of the first is forgotten
    parent = history.lives.get(entry.parent_id) if entry.parent_id else None
    life = Life(entry, round(entry.number("depth")), entry.text("node_id"), parent)
    history.lives[entry.worker_id] = life
    if parent is not None:
        parent.children.append(life)
    if (manifest := history.manifests.get(entry.text("manifest_id"))) is not None:
        manifest.births += 1
    if (contract := history.contracts.get(entry.contract_id)) is not None:
        contract.population += 1


def _birth_undone(history: History, entry: Entry) -> None:
    life = history.lives.get(entry.worker_id)
    if life is None or life.end is not None:
        return
    del history.lives[entry.worker_id]
    if life.parent is not None:
        life.parent.children.remove(life)
    if (manifest := history.manifests.get(entry.text("manifest_id"))) is not None:
        manifest.births -= 1
    if (contract := history.contracts.get(life.born.contract_id)) is not None:
        contract.population -= 1


def _end(history: History, entry: Entry) -> None:
    life = history.lives.get(entry.worker_id)
    if life is None or life.end is not None:
        return
    life.end = entry
    if (contract := history.contracts.get(life.born.contract_id)) is not None:
        contract.population -= 1


def _engage(history: History, entry: Entry) -> None:
    scope = entry.text("scope")
    latch = history.latches.setdefault(scope, Latch())
    latch.epoch, latch.engaged = round(entry.number("epoch")), True
    latch.targets[latch.epoch] = history.living(scope)


def _release(history: History, entry: Entry) -> None:
    latch = history.latches.setdefault(entry.text("scope"), Latch())
    latch.epoch, latch.engaged = round(entry.number("epoch")), False


def _connected(history: History, entry: Entry) -> None:
    history.nodes[entry.text("node_id")] = entry


def _revoked(history: History, entry: Entry) -> None:
    history.revoked.add(entry.text("key_id"))


_ACTS: dict[str, Callable[[History, Entry], None]] = {
    "contract_created": _contract,
    "contract_undone": _contract_undone,
    "replication_requested": _manifest,
    "replication_undone": _manifest_undone,
    "worker_registered": _birth,
    "registration_undone": _birth_undone,
    "worker_shutdown": _end,
    "kill_switch_engaged": _engage,
    "kill_switch_released": _release,
    "quarantined": _engage,
    "quarantine_released": _release,
    "node_connected": _connected,
    "key_revoked": _revoked,
}
