"""Histories made by hand: the good one is kept, and each bad one breaks just the promise that it should."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hayflick_cli import family_tree
from hayflick_cli.entries import BadEntry, parse
from hayflick_cli.judgement import Judgement, judge

START = datetime(2026, 1, 1, tzinfo=UTC)
CONTROLLER = "controller/c1/1"
NODE = "orchestrator/n1/b1"
SCOPE = "contract/k"


class Book:
    """A log that is written by hand, one entry after the other, a second apart."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.sequences: dict[str, int] = {}

    def write(self, event: str, source: str = CONTROLLER, **fields: Any) -> int:
        """Write an entry; return its index."""
        self.seconds += 1
        ids = {name: fields.pop(name) for name in ("contract_id", "worker_id", "parent_id") if name in fields}
        sequence = self.sequences[source] = self.sequences.get(source, 0) + 1
        body = {"event": event, "timestamp": self.time(), **ids, "details": fields}
        index = len(self.entries)
        self.entries.append({"event": body, "index": index, "sequence": sequence, "source": source})
        return index

    def time(self, later_seconds: float = 0) -> str:
        """Return the time now, or later."""
        return (START + timedelta(seconds=self.seconds + later_seconds)).isoformat().replace("+00:00", "Z")

    def audit(self, decision: str, **fields: Any) -> int:
        """Write a decision."""
        return self.write("audit", decision=decision, **fields)

    def begin(self, **limits: Any) -> Book:
        """Write a contract and a node."""
        self.write("controller_started")
        wanted = {"max_depth": 2, "max_replicas": 3, "cooldown_seconds": 5, **limits}
        self.audit("contract_created", contract_id="k", **wanted)
        self.write("node_connected", node_id="n1")
        return self

    def issue(self, worker: str, parent: str = "", depth: int = 0, epoch: int = 0, **fields: Any) -> int:
        """Write that a manifest was issued."""
        wanted = {
            "manifest_id": f"m-{worker}",
            "depth": depth,
            "epoch": epoch,
            "key_id": "key",
            "expire_time": self.time(60),
            **fields,
        }
        return self.audit(
            "replication_requested", contract_id="k", worker_id=worker, parent_id=parent, **wanted
        )

    def register(self, worker: str, parent: str = "", depth: int = 0, epoch: int = 0, **fields: Any) -> int:
        """Write that a worker was registered."""
        wanted = {"manifest_id": f"m-{worker}", "depth": depth, "epoch": epoch, "node_id": "n1", **fields}
        return self.write("worker_registered", contract_id="k", worker_id=worker, parent_id=parent, **wanted)

    def born(self, worker: str, parent: str = "", depth: int = 0, epoch: int = 0) -> int:
        """Write a whole birth; return the index of its registration."""
        self.issue(worker, parent, depth, epoch)
        index = self.register(worker, parent, depth, epoch)
        self.write("worker_started", NODE, worker_id=worker, node_id="n1")
        return index

    def end(self, worker: str, reason: str = "completed", **fields: Any) -> int:
        """Write that a worker ended."""
        wanted = {"end_reason": reason, "node_id": "n1", **fields}
        return self.write("worker_shutdown", contract_id="k", worker_id=worker, **wanted)

    def engage(self, count: int, epoch: int = 1, decision: str = "kill_switch_engaged", **fields: Any) -> int:
        """Write that a latch was engaged over so many workers."""
        return self.audit(decision, **{"scope": SCOPE, "epoch": epoch, "worker_count": count, **fields})

    def confirm(self, dead: int, unconfirmed: int = 0, epoch: int = 1) -> int:
        """Write what a kill had done when it answered."""
        return self.audit(
            "kill_switch_confirmed",
            scope=SCOPE,
            epoch=epoch,
            dead_count=dead,
            unconfirmed_count=unconfirmed,
            unconfirmed_worker_ids=[],
        )

    def judged(self) -> Judgement:
        """Judge it as it is."""
        return judge(parse(json.dumps(entry).encode()) for entry in self.entries)


def whole() -> Book:
    """Return a history in which everything happens, and all is well."""
    book = Book().begin()
    book.born("a")
    book.born("b", "a", 1)
    book.born("c", "b", 2)
    book.end("c")
    book.audit("quarantined", scope="quarantine/b", epoch=1, worker_count=1)
    book.audit("quarantine_released", scope="quarantine/b", epoch=2)
    book.born("d", "b", 2)
    book.engage(3)
    book.end("d", "kill_switch")
    book.end("b", "kill_switch")
    book.end("a", "node_lost", silent_seconds=4.0, lease_seconds=3.0)
    book.confirm(2, 1)
    book.audit("kill_switch_released", scope=SCOPE, epoch=2)
    book.born("e", epoch=2)
    book.engage(1, epoch=3)
    return book


def broken(book: Book) -> list[tuple[int, str]]:
    """Return each entry that breaks a promise, and which."""
    return [(violation.index, violation.promise) for violation in book.judged().violations]


def test_a_good_history_is_kept() -> None:
    """A history that keeps every promise has no violation, and each promise was asked after."""
    judgement = whole().judged()
    assert judgement.violations == []
    assert all(judgement.checked[name] for name in dict(family_rows(judgement)))
    assert family_tree.summary(judgement) == "28 entries: 1 contracts, 5 births, 4 ends, 1 alive"


def family_rows(judgement: Judgement) -> list[tuple[str, str]]:
    """Return the rows of the table: the promise's name, and the rest."""
    return [(line.split(":")[0], line) for line in list(family_tree.table(judgement))[1:]]


def test_a_family_is_drawn() -> None:
    """The tree shows each worker below its parent, its node, its entries, and how it ended."""
    judgement = whole().judged()
    (history,) = judgement.histories.values()
    lines = list(family_tree.tree(history))
    assert lines[0] == "contract k (max_replicas 3, max_depth 2)"
    assert [line.partition(" on n1")[0] for line in lines[1:]] == [
        "├─ a",
        "│  └─ b",
        "│     ├─ c",
        "│     └─ d",
        "└─ e",
    ]
    assert lines[3].endswith("completed after 2.000 s, entry 12")
    assert lines[5].endswith("alive")


class Crime(Book):
    """A history that is about to break a promise; each way returns the index of the entry that does."""

    def no_manifest(self) -> int:
        return self.register("a")

    def used_twice(self) -> int:
        self.born("a")
        self.issue("b", manifest_id="m-a")
        self.register("b", manifest_id="m-a")
        return self.register("c", manifest_id="m-a")

    def of_another(self) -> int:
        self.issue("a")
        return self.register("b", manifest_id="m-a")

    def taken_back(self) -> int:
        self.issue("a")
        self.audit("replication_undone", contract_id="k", worker_id="a", manifest_id="m-a")
        return self.register("a")

    def too_late(self) -> int:
        self.issue("a", expire_time=self.time(2))
        return self.register("a")

    def by_a_revoked_key(self) -> int:
        self.issue("a")
        self.audit("key_revoked", contract_id="k", key_id="key")
        return self.register("a")

    def too_many(self) -> int:
        for worker in "abc":
            self.born(worker)
        return self.born("d")

    def too_deep(self) -> int:
        self.born("a")
        self.born("b", "a", 1)
        self.born("c", "b", 2)
        self.end("a")
        return self.born("d", "c", 3)

    def skipped_a_generation(self) -> int:
        self.born("a")
        return self.born("b", "a", 2)

    def of_a_dead_parent(self) -> int:
        self.born("a")
        self.end("a")
        return self.born("b", "a", 1)

    def born_twice(self) -> int:
        self.born("a")
        self.issue("a", manifest_id="m-2")
        return self.register("a", manifest_id="m-2")

    def too_soon(self) -> int:
        self.born("a")
        self.born("b", "a", 1)
        return self.born("c", "a", 1)

    def under_a_latch(self) -> int:
        self.engage(0)
        self.issue("a", epoch=1)
        return self.register("a", epoch=1)

    def of_an_old_epoch(self) -> int:
        self.issue("a")
        self.engage(0)
        self.audit("kill_switch_released", scope=SCOPE, epoch=2)
        return self.register("a")

    def below_a_switched_off_worker(self) -> int:
        self.born("a")
        self.engage(1, scope="worker/a")
        return self.born("b", "a", 1, epoch=1)

    def below_the_frozen(self) -> int:
        self.born("a")
        self.born("b", "a", 1)
        self.audit("quarantined", scope="quarantine/a", epoch=1, worker_count=2)
        return self.born("c", "b", 2)

    def ended_twice(self) -> int:
        self.born("a")
        self.end("a")
        return self.end("a")

    def ended_unborn(self) -> int:
        return self.end("a")

    def called_killed_unseen(self) -> int:
        self.born("a")
        return self.end("a", "kill_switch", silent_seconds=4.0, lease_seconds=3.0)

    def lost_within_its_lease(self) -> int:
        self.born("a")
        return self.end("a", "node_lost", silent_seconds=2.0, lease_seconds=3.0)

    def lost_though_it_was_just_there(self) -> int:
        self.born("a")
        self.write("node_connected", node_id="n1")
        return self.end("a", "node_lost", silent_seconds=4.0, lease_seconds=3.0)

    def confirmed_and_alive(self) -> int:
        self.born("a")
        self.engage(1)
        return self.confirm(1)

    def confirmed_dead_and_unseen(self) -> int:
        self.born("a")
        self.engage(1)
        self.end("a", "node_lost", silent_seconds=4.0, lease_seconds=3.0)
        return self.confirm(1)

    def turned_unrecorded(self) -> int:
        return self.engage(0, epoch=2)

    def counted_otherwise(self) -> int:
        self.born("a")
        return self.engage(2)

    def started_unadmitted(self) -> int:
        return self.write("worker_started", NODE, worker_id="a", node_id="n1")

    def started_before_it_was_admitted(self) -> int:
        self.issue("a")
        index = self.write("worker_started", NODE, worker_id="a", node_id="n1")
        self.register("a")
        return index

    def started_though_undone(self) -> int:
        self.issue("a")
        self.register("a")
        self.audit("registration_undone", contract_id="k", worker_id="a", manifest_id="m-a")
        return self.write("worker_started", NODE, worker_id="a", node_id="n1")

    def started_twice(self) -> int:
        self.born("a")
        return self.write("worker_started", NODE, worker_id="a", node_id="n1")

    def recorded_twice(self) -> int:
        self.sequences[CONTROLLER] -= 1
        return self.write("node_disconnected", node_id="n1")

    def left_out(self) -> int:
        self.sequences[CONTROLLER] += 2
        return self.write("node_disconnected", node_id="n1")

    def says_too_little(self) -> int:
        return self.audit("kill_switch_engaged", scope=SCOPE)


CRIMES: list[tuple[Callable[[Crime], int], str]] = [
    (Crime.no_manifest, "manifest"),
    (Crime.used_twice, "manifest"),
    (Crime.of_another, "manifest"),
    (Crime.taken_back, "manifest"),
    (Crime.too_late, "manifest"),
    (Crime.by_a_revoked_key, "manifest"),
    (Crime.too_many, "population"),
    (Crime.too_deep, "depth"),
    (Crime.skipped_a_generation, "depth"),
    (Crime.of_a_dead_parent, "parentage"),
    (Crime.born_twice, "parentage"),
    (Crime.too_soon, "cooldown"),
    (Crime.under_a_latch, "kill switch"),
    (Crime.of_an_old_epoch, "kill switch"),
    (Crime.below_a_switched_off_worker, "kill switch"),
    (Crime.below_the_frozen, "quarantine"),
    (Crime.ended_twice, "end"),
    (Crime.ended_unborn, "end"),
    (Crime.called_killed_unseen, "lease"),
    (Crime.lost_within_its_lease, "lease"),
    (Crime.lost_though_it_was_just_there, "lease"),
    (Crime.confirmed_and_alive, "killed"),
    (Crime.confirmed_dead_and_unseen, "killed"),
    (Crime.turned_unrecorded, "latch"),
    (Crime.counted_otherwise, "count"),
    (Crime.started_unadmitted, "start"),
    (Crime.started_before_it_was_admitted, "start"),
    (Crime.started_though_undone, "start"),
    (Crime.started_twice, "start"),
    (Crime.recorded_twice, "sequence"),
    (Crime.left_out, "sequence"),
    (Crime.says_too_little, "record"),
]


ENTANGLED = (Crime.used_twice, Crime.says_too_little)
"""Those that break more than one promise by what they do."""


@pytest.mark.parametrize(("crime", "promise"), CRIMES, ids=[crime.__name__ for crime, _ in CRIMES])
def test_a_broken_promise_is_found_and_its_entry_named(crime: Callable[[Crime], int], promise: str) -> None:
    """A history that breaks one promise is found to break that one first, at the entry that does."""
    book = Crime()
    book.begin()
    index = crime(book)
    assert (index, promise) in broken(book)
    assert min(place for place, _ in broken(book)) == index


@pytest.mark.parametrize(
    "crime",
    [crime for crime, _ in CRIMES if crime not in ENTANGLED],
    ids=lambda crime: crime.__name__,
)
def test_nothing_else_is_called_broken(crime: Callable[[Crime], int]) -> None:
    """Where one promise is broken, the others are not said to be."""
    book = Crime()
    book.begin()
    crime(book)
    assert len(broken(book)) == 1


def test_an_undone_birth_counts_for_nothing() -> None:
    """A registration that was taken back frees its slot, its parent's cooldown and its manifest."""
    book = Book().begin(max_replicas=2)
    book.born("a")
    book.issue("b", "a", 1)
    book.register("b", "a", 1)
    book.audit("registration_undone", contract_id="k", worker_id="b", parent_id="a", manifest_id="m-b")
    book.register("b", "a", 1)
    assert broken(book) == []


def test_a_launch_that_failed_starts_no_cooldown() -> None:
    """A child whose launch failed does not make its parent wait."""
    book = Book().begin()
    book.born("a")
    book.born("b", "a", 1)
    book.end("b", "launch_failed")
    book.born("c", "a", 1)
    assert broken(book) == []


def test_without_a_cooldown_no_clock_is_asked() -> None:
    """Where a contract has no cooldown, a clock that was set back between two births breaks nothing."""
    book = Book().begin(cooldown_seconds=0)
    book.born("a")
    book.born("b", "a", 1)
    book.seconds -= 3_600
    book.born("c", "a", 1)
    assert broken(book) == []


def test_a_late_event_closes_its_gap() -> None:
    """An event that arrives after later ones of its source is recorded, not lost; missing ones are named."""
    book = Book().begin()
    book.sequences[CONTROLLER] += 3
    index = book.write("node_disconnected", node_id="n1")
    book.sequences[CONTROLLER] = 4
    book.write("node_connected", node_id="n1")
    (violation, other) = book.judged().violations
    assert violation.index == other.index == index
    assert {violation.detail, other.detail} == {
        f"event 4 of {CONTROLLER} missing",
        f"event 6 of {CONTROLLER} missing",
    }


def test_turns_order_the_decisions_of_several_controllers() -> None:
    """What arrived in another order is judged in the order of turns, whichever controller decided."""
    book = Book()
    wanted = {"max_depth": 2, "max_replicas": 1, "cooldown_seconds": 0}
    book.write("node_connected", node_id="n1", turn=1)
    book.write("audit", "controller/c2/2", decision="contract_created", contract_id="k", turn=2, **wanted)
    for turn, worker in ((3, "a"), (6, "b")):
        issued = {"manifest_id": f"m-{worker}", "depth": 0, "epoch": 0, "expire_time": book.time(60)}
        details = {**issued, "node_id": "n1", "worker_id": worker, "contract_id": "k"}
        book.write("audit", "controller/c2/2", decision="replication_requested", turn=turn, **details)
        book.write("worker_registered", "controller/c2/2", turn=turn + 1, **details)
    # The end that made room for b was recorded by another, and arrives last.
    book.write(
        "worker_shutdown", worker_id="a", contract_id="k", node_id="n1", end_reason="completed", turn=5
    )
    assert broken(book) == []
    del book.entries[-1]
    assert [promise for _, promise in broken(book)] == ["population"]


def test_controllers_that_share_nothing_are_judged_apart() -> None:
    """A kill switch over everything of one database says nothing about another's."""
    book = Book()
    book.write(
        "audit",
        "controller/other/1",
        decision="kill_switch_engaged",
        scope="everything",
        epoch=1,
        worker_count=0,
    )
    book.begin()
    book.born("a")
    assert broken(book) == []
    assert set(book.judged().histories) == {"c1", "other"}


@given(st.data())
def test_no_decision_can_be_taken_out_unseen(data: st.DataObject) -> None:
    """Whichever decision is taken out of a whole history, and the rest numbered anew, the lack is found."""
    book = whole()
    told = [
        place
        for place, entry in enumerate(book.entries[:-1])
        if entry["source"] == CONTROLLER
        # From these nothing else follows.
        and entry["event"]["event"] != "controller_started"
        and entry["event"]["details"].get("decision") != "kill_switch_confirmed"
    ]
    del book.entries[data.draw(st.sampled_from(told))]
    sequences: dict[str, int] = {}
    for entry in book.entries:
        entry["sequence"] = sequences[entry["source"]] = sequences.get(entry["source"], 0) + 1
    assert not book.judged().kept


@given(st.binary(max_size=64) | st.text(max_size=64).map(str.encode))
def test_nonsense_is_no_entry(data: bytes) -> None:
    """Bytes that are no entry are refused as such, whatever they are."""
    with pytest.raises(BadEntry):
        parse(data)
