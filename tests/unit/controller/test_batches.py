"""Transactions that wait together are committed together, and are none the less apart."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from hayflick_controller.model import Event, Node
from hayflick_controller.store import Commit
from hayflick_controller.store.sql import SqlStore, sqlite_store
from hayflick_rpc.errors import HayflickError

WAIT_SECONDS = 10.0


class Gate:
    """Holds the database's thread, so that what is asked for meanwhile becomes one batch."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()

    def hold(self, tx: Any) -> None:
        """Return when the gate is opened."""
        del tx
        self.entered.set()
        assert self.open.wait(WAIT_SECONDS)


@pytest.fixture
def commits() -> list[Commit]:
    """What the store told after its commits."""
    return []


@pytest.fixture
async def store(tmp_path: Path, commits: list[Commit]) -> AsyncIterator[SqlStore]:
    """A store in a file."""
    made = sqlite_store(tmp_path / "data" / "controller.db")
    await made.open(commits.append)
    yield made
    await made.close()


def named(name: str) -> Any:
    """Return a transaction that writes one node and one event."""

    def run(tx: Any) -> int:
        tx.put_node(Node(name, "", "", "", 1, 1))
        tx.record(Event("audit", 1, details={"decision": name}))
        return int(tx.position)

    return run


def refused(name: str) -> Any:
    """Return a transaction that writes the same and then refuses."""

    def run(tx: Any) -> None:
        named(name)(tx)
        raise LookupError(name)

    return run


async def together(store: SqlStore, *work: Any) -> list[Any]:
    """Run transactions in one batch; return what each returned or raised."""
    gate = Gate()
    held = asyncio.ensure_future(store.transact(gate.hold))
    await asyncio.to_thread(gate.entered.wait, WAIT_SECONDS)
    waiting = [asyncio.ensure_future(store.transact(each)) for each in work]
    await asyncio.sleep(0)  # one turn of the loop: each has asked
    gate.open.set()
    await held
    return await asyncio.gather(*waiting, return_exceptions=True)


async def names(store: SqlStore) -> list[str]:
    """Read which nodes were written."""
    return [node.node_id for node in await store.transact(lambda tx: tx.nodes())]


async def test_a_refusal_takes_nothing_from_its_neighbours(store: SqlStore, commits: list[Commit]) -> None:
    """One that raises in a batch undoes itself alone, and leaves no gap among the events of the others."""
    outcomes = await together(store, named("a"), refused("b"), named("c"), refused("d"), named("e"))
    assert [type(outcome) for outcome in outcomes] == [int, LookupError, int, LookupError, int]
    assert await names(store) == ["a", "c", "e"]
    assert [event.sequence for commit in commits for event in commit.events] == [1, 2, 3]
    queued = await store.transact(lambda tx: tx.queued(0, 10))
    assert [event.position for event in queued] == [outcomes[0], outcomes[2], outcomes[4]]


async def test_who_gave_up_before_is_not_begun(store: SqlStore) -> None:
    """A transaction whose caller is gone before it begins is not run."""
    gate = Gate()
    held = asyncio.ensure_future(store.transact(gate.hold))
    await asyncio.to_thread(gate.entered.wait, WAIT_SECONDS)
    waiting = asyncio.ensure_future(store.transact(named("a")))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.sleep(0)
    gate.open.set()
    await held
    assert await names(store) == []


async def test_a_full_disk_fails_the_whole_batch_and_no_later_one(
    store: SqlStore, commits: list[Commit]
) -> None:
    """When the database gives up, nobody is told that anything holds, and nothing does; later ones work."""

    def no_room(tx: Any) -> None:
        (pages,) = tx._driver._raw.execute("PRAGMA page_count").fetchone()
        tx._driver.say(f"PRAGMA max_page_count = {pages}")

    def large(tx: Any) -> None:
        tx.put_node(Node("large", "", "x" * 2**20, "", 1, 1))

    def room(tx: Any) -> None:
        tx._driver.say("PRAGMA max_page_count = 1000000")

    await store.transact(no_room)
    outcomes = await together(store, named("a"), large, refused("b"), named("c"))
    await store.transact(room)
    assert isinstance(outcomes[1], HayflickError)
    assert outcomes[1].reason_name == "SERVICE_UNAVAILABLE"
    written = await names(store)
    for name, outcome in (("a", outcomes[0]), ("c", outcomes[3])):
        assert isinstance(outcome, int) == (name in written)
    assert [event.sequence for commit in commits for event in commit.events] == [*range(1, len(written) + 1)]
    await store.transact(named("z"))
    assert await names(store) == [*written, "z"]


async def test_a_lost_transaction_is_nobodys(store: SqlStore, commits: list[Commit]) -> None:
    """When the database undoes the whole transaction under a batch, each of it is told so."""

    def lose(tx: Any) -> None:
        tx._driver.say("ROLLBACK")
        raise LookupError

    outcomes = await together(store, named("a"), lose, named("b"))
    assert [getattr(outcome, "reason_name", "") for outcome in outcomes[::2]] == ["SERVICE_UNAVAILABLE"] * 2
    assert isinstance(outcomes[1], LookupError)
    assert await names(store) == []
    assert commits == []
    assert (await store.transact(named("c"))) & 0xFFFF == 1
