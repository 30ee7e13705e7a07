"""What the driver was told, and whether the log has it: nothing acknowledged is lost."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator

    from hayflick.v1.controller_pb2 import EngageKillSwitchResponse
    from hayflick_cli.entries import Entry
    from hayflick_cli.history import Life
    from hayflick_cli.judgement import Judgement


@dataclass
class Ledger:
    """Acknowledged answers, from whichever thread heard them.

    Attributes:
        contracts: Those that were created.
        births: Each worker that somebody was given, and how often.
        ends: Each worker that somebody was told had ended.
        kills: The receipts of kills, by the SHA-256 of their documents, and whom each calls dead.
        turns: Latches turned: scope and epoch.
        refusals: How often what was refused, by reason.
        unknown: Requests that were given up without an answer.
    """

    contracts: set[str] = field(default_factory=set)
    births: Counter[str] = field(default_factory=Counter)
    ends: set[str] = field(default_factory=set)
    kills: dict[str, list[str]] = field(default_factory=dict)
    turns: set[tuple[str, int]] = field(default_factory=set)
    refusals: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def created(self, contract_id: str) -> None:
        """Note a contract."""
        with self._guard:
            self.contracts.add(contract_id)

    def born(self, worker_id: str) -> None:
        """Note a birth."""
        with self._guard:
            self.births[worker_id] += 1

    def ended(self, worker_id: str) -> None:
        """Note an end."""
        with self._guard:
            self.ends.add(worker_id)

    def killed(self, scope: str, answer: EngageKillSwitchResponse) -> None:
        """Note a kill, with its receipt."""
        digest = hashlib.sha256(answer.receipt.document_json.encode()).hexdigest()
        with self._guard:
            self.kills[digest] = list(answer.worker_ids)
            self.turns.add((scope, answer.kill_switch.epoch))

    def turned(self, scope: str, epoch: int) -> None:
        """Note that a latch was turned."""
        with self._guard:
            self.turns.add((scope, epoch))

    def refused(self, what: str, reason: str) -> None:
        """Note that a request was refused."""
        with self._guard:
            self.refusals[f"{what}: {reason}"] += 1

    def gave_up(self, what: str) -> None:
        """Note that a request was given up: it may have been carried out, or not."""
        with self._guard:
            self.unknown[what] += 1

    def missing(self, log: list[Entry], judgement: Judgement) -> Iterator[str]:
        """Yield what was acknowledged and is not in the log, once."""
        lives: dict[str, Life] = {}
        for history in judgement.histories.values():
            lives.update(history.lives)
        yield from self._missing_lives(lives)
        yield from _not_once("contract", self.contracts, _count(log, ("contract_created",), _contract))
        yield from _not_once("receipt", self.kills, _count(log, ("kill_switch_confirmed",), _receipt))
        turns = _count(log, ("kill_switch_engaged", "kill_switch_released"), _turn)
        yield from _not_once("turn", self.turns, turns)

    def _missing_lives(self, lives: dict[str, Life]) -> Iterator[str]:
        for worker_id, times in self.births.items():
            if times != 1:
                yield f"worker {worker_id} was given to {times} callers"
            if worker_id not in lives:
                yield f"the birth of {worker_id} is not on record"
        for worker_id in self.ends:
            if worker_id not in lives or lives[worker_id].end is None:
                yield f"the end of {worker_id} is not on record"
        for worker_id in {worker_id for dead in self.kills.values() for worker_id in dead}:
            if worker_id not in lives or not lives[worker_id].seen_dead:
                yield f"worker {worker_id} is dead by a receipt, and the record does not say so"


def _contract(entry: Entry) -> str:
    return entry.contract_id


def _receipt(entry: Entry) -> str:
    return entry.text("receipt_sha256")


def _turn(entry: Entry) -> tuple[str, int]:
    return entry.text("scope"), round(entry.number("epoch"))


def _count(log: list[Entry], kinds: tuple[str, ...], key: Callable[[Entry], Hashable]) -> Counter[Hashable]:
    return Counter(key(entry) for entry in log if entry.kind in kinds)


def _not_once(what: str, told: Iterable[Hashable], counted: Counter[Hashable]) -> Iterator[str]:
    for one in told:
        if counted[one] != 1:
            yield f"{what} {one} was acknowledged, and is on record {counted[one]} times"
