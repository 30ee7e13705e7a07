"""Whether the promises were kept, by the record alone. Pure.

Two passes: over the log as it is, for what its order promises; and over the
decisions of each database in their own order, for what they may not do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from hayflick_cli.entries import BadEntry, Entry
from hayflick_cli.history import History
from hayflick_cli.ordering import decisions
from hayflick_cli.promises import PROMISES, Promise
from hayflick_cli.sources import Sources

SEQUENCE = Promise("sequence", "no event of any source lost or doubled", (), lambda _, __: "")
START = Promise("start", "nothing runs before its admission is on record", (), lambda _, __: "")
ALL: tuple[Promise, ...] = (SEQUENCE, START, *PROMISES)
"""Every promise that is judged, in the order in which they are reported."""

_SIGNS_OF_LIFE = frozenset({"worker_started", "heartbeat", "task_started"})
_ASKED: dict[str, list[Promise]] = {}
for _promise in PROMISES:
    for _kind in _promise.kinds:
        _ASKED.setdefault(_kind, []).append(_promise)


@dataclass(frozen=True, order=True, slots=True)
class Violation:
    """An entry that breaks a promise."""

    index: int
    promise: str
    detail: str


@dataclass(slots=True)
class Judgement:
    """What was found.

    Attributes:
        checked: How often each promise was asked after, by its name.
        violations: The entries that break one, the first first.
        histories: What happened, by database.
        entry_count: How many entries were judged.
    """

    checked: Counter[str] = field(default_factory=Counter)
    violations: list[Violation] = field(default_factory=list)
    histories: dict[str, History] = field(default_factory=dict)
    entry_count: int = 0

    @property
    def kept(self) -> bool:
        """Whether every promise was."""
        return not self.violations

    def ask(self, promise: Promise, entry: Entry, fault: str) -> None:
        """Count that *promise* was asked after, and what came of it."""
        self.checked[promise.name] += 1
        if fault:
            self.violations.append(Violation(entry.index, promise.name, fault))


def judge(entries: Iterable[Entry]) -> Judgement:
    """Judge a whole log.

    Args:
        entries: All of it, in its order.
    """
    log = list(entries)
    found = Judgement(entry_count=len(log))
    _judge_sequences(log, found)
    for name, decided in decisions(log).items():
        found.histories[name] = _replay(decided, found)
    _judge_starts(log, found)
    found.violations.sort()
    return found


def _judge_sequences(log: list[Entry], found: Judgement) -> None:
    sources = Sources()
    for entry in log:
        found.ask(SEQUENCE, entry, sources.take(entry))
    for entry, fault in sources.lost():
        found.violations.append(Violation(entry.index, SEQUENCE.name, fault))


def _replay(decided: list[Entry], found: Judgement) -> History:
    history = History()
    for entry in decided:
        try:
            for promise in _ASKED.get(entry.kind, ()):
                found.ask(promise, entry, promise.rule(history, entry))
            history.take(entry)
        except (BadEntry, ValueError) as error:
            # What does not say enough to be judged proves nothing.
            found.violations.append(Violation(entry.index, "record", str(error)))
    return history


def _judge_starts(log: list[Entry], found: Judgement) -> None:
    """Judge that each sign of life comes after the entry that admits it: no proof, no process."""
    lives = {name: life for history in found.histories.values() for name, life in history.lives.items()}
    started: dict[str, int] = {}
    for entry in log:
        if entry.kind not in _SIGNS_OF_LIFE or not entry.source.startswith("orchestrator/"):
            continue
        life = lives.get(entry.worker_id)
        fault = ""
        if life is None:
            fault = f"worker {entry.worker_id} was not admitted"
        elif life.born.index > entry.index:
            fault = f"worker {entry.worker_id} is admitted only by entry {life.born.index}"
        elif life.node_id != entry.text("node_id") and "node_id" in entry.details:
            fault = f"worker {entry.worker_id} was admitted on {life.node_id}"
        elif entry.kind == "worker_started" and entry.worker_id in started:
            fault = f"worker {entry.worker_id} was started by entry {started[entry.worker_id]}"
        if entry.kind == "worker_started":
            started[entry.worker_id] = entry.index
        found.ask(START, entry, fault)
