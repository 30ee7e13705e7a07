"""Whether the promises were kept, recomputed from the record alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

from hayflick.v1 import logger_pb2
from simulation.record import Record


@dataclass
class _Life:
    """A worker, as its birth was recorded."""

    contract_id: str
    parent_id: str
    depth: int
    birth_us: int
    manifest_id: str
    end_reason: str = ""


class Auditor:
    """Reads the record as it grows, and raises AssertionError at the first promise that was not kept.

    Attributes:
        births: How often each worker was registered, less what was undone.
        ends: How each worker ended, each time that it did.
        turns: Every turn of a kill switch or quarantine: (decision, scope, epoch).
    """

    def __init__(self, record: Record) -> None:
        self.births: Counter[str] = Counter()
        self.ends: defaultdict[str, list[str]] = defaultdict(list)
        self.turns: Counter[tuple[str, str, int]] = Counter()
        self._record = record
        self._read = 0
        self._contracts: dict[str, dict[str, Any]] = {}
        self._lives: dict[str, _Life] = {}
        self._used: set[str] = set()
        self._epochs: Counter[str] = Counter()
        self._engaged: set[str] = set()
        self._issued: dict[str, logger_pb2.Event] = {}

    def read(self) -> None:
        """Read on."""
        entries = self._record.entries
        while self._read < len(entries):
            self._take(entries[self._read].event)
            self._read += 1

    def _take(self, event: logger_pb2.Event) -> None:
        details = dict(event.details)
        match event.event, details.get("decision"):
            case "worker_registered", _:
                self._born(event, details)
            case "worker_shutdown", _:
                self._ended(event.worker_id, details["end_reason"])
            case "audit", "contract_created":
                self._contracts[event.contract_id] = details
            case "audit", "replication_requested":
                assert details["manifest_id"] not in self._issued, "a manifest was issued twice"
                self._issued[details["manifest_id"]] = event
            case "audit", "registration_undone":
                self.births[event.worker_id] -= 1
                self._used.discard(details["manifest_id"])
                del self._lives[event.worker_id]
            case "audit", (
                "kill_switch_engaged" | "kill_switch_released" | "quarantined" | "quarantine_released" as word
            ):
                self._turned(word, details["scope"], int(details["epoch"]))

    def _born(self, event: logger_pb2.Event, details: dict[str, Any]) -> None:
        policy = self._contracts[event.contract_id]
        life = _Life(
            event.contract_id,
            event.parent_id,
            int(details["depth"]),
            event.timestamp.ToMicroseconds(),
            details["manifest_id"],
        )
        assert life.manifest_id in self._issued, "a manifest that was never issued was registered"
        assert life.manifest_id not in self._used, f"{life.manifest_id} was registered twice"
        assert event.worker_id not in self._lives, f"{event.worker_id} was born twice"
        living = [
            other
            for other in self._lives.values()
            if other.contract_id == life.contract_id and not other.end_reason
        ]
        assert len(living) < policy["max_replicas"], f"a birth beyond max_replicas {policy['max_replicas']}"
        assert life.depth <= policy["max_depth"], f"a birth at depth {life.depth}"
        path = self._path(life.parent_id)
        assert life.depth == len(path), f"{event.worker_id} has depth {life.depth} below {path}"
        if life.parent_id:
            self._check_parent(life, policy["cooldown_seconds"])
        over = ["everything", f"contract/{life.contract_id}", *(f"worker/{name}" for name in path)]
        held = self._engaged.intersection([*over, *(f"quarantine/{name}" for name in path)])
        assert not held, f"a birth under {held}"
        epoch = sum(self._epochs[scope] for scope in over)
        assert details["epoch"] == epoch, f"a birth of epoch {details['epoch']} in epoch {epoch}"
        self._lives[event.worker_id] = life
        self._used.add(life.manifest_id)
        self.births[event.worker_id] += 1

    def _check_parent(self, life: _Life, cooldown_seconds: float) -> None:
        parent = self._lives[life.parent_id]
        assert not parent.end_reason, "a birth below an ended parent"
        assert parent.contract_id == life.contract_id, "a birth below another contract's worker"
        for other in self._lives.values():
            if other.parent_id == life.parent_id and other.end_reason != "launch_failed":
                apart_us = life.birth_us - other.birth_us
                assert apart_us >= cooldown_seconds * 1_000_000, f"siblings {apart_us} us apart"

    def _ended(self, worker_id: str, reason: str) -> None:
        life = self._lives[worker_id]
        assert not life.end_reason, f"{worker_id} ended twice"
        life.end_reason = reason
        self.ends[worker_id].append(reason)

    def _turned(self, word: str, scope: str, epoch: int) -> None:
        self.turns[word, scope, epoch] += 1
        assert epoch > self._epochs[scope], f"epoch {epoch} of {scope} came after {self._epochs[scope]}"
        self._epochs[scope] = epoch
        if word in ("kill_switch_engaged", "quarantined"):
            self._engaged.add(scope)
        else:
            self._engaged.discard(scope)

    def _path(self, worker_id: str) -> list[str]:
        path: list[str] = []
        while worker_id:
            path.append(worker_id)
            worker_id = self._lives[worker_id].parent_id
        return path
