"""Stores to be tested: where they are, what they hold, and transactions that are committed together."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from hayflick_controller.model import Contract, Event, Manifest, Node, Policy, Resources, State, Worker
from hayflick_controller.store import Commit
from hayflick_controller.store.protocol import Needs
from hayflick_controller.store.sql import SqlStore, postgres_store, sqlite_store

WAIT_SECONDS = 10.0
NAMES = ("a", "b", "c")
CONTRACTS = ("contract-1", "contract-2")

Work = Callable[[Any], Any]


@dataclass(frozen=True)
class Asked:
    """A transaction, and what is said of it beforehand."""

    work: Work
    needs: Needs


class Gate:
    """Holds a store's thread, so that what is asked for meanwhile is committed together."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()

    def hold(self, tx: Any) -> None:
        """Return when the gate is opened."""
        del tx
        self.entered.set()
        assert self.open.wait(WAIT_SECONDS)


async def together(store: SqlStore, asked: Sequence[Asked]) -> list[Any]:
    """Have *asked* committed together; return what each returned or raised."""
    gate = Gate()
    held = asyncio.ensure_future(store.transact(gate.hold))
    await asyncio.to_thread(gate.entered.wait, WAIT_SECONDS)
    waiting = [asyncio.ensure_future(store.transact(each.work, needs=each.needs)) for each in asked]
    await asyncio.sleep(0)  # one turn of the loop: each has asked
    gate.open.set()
    await held
    return await asyncio.gather(*waiting, return_exceptions=True)


def contract(name: str) -> Contract:
    """Make a contract."""
    return Contract(name, Policy(max_depth=3, max_replicas=10), f"key-{name}", 100)


def manifest(name: str, parent_id: str = "", contract_id: str = "contract-1") -> Manifest:
    """Make a manifest."""
    return Manifest(
        f"manifest-{name}",
        contract_id,
        name,
        parent_id,
        int(bool(parent_id)),
        0,
        "",
        Resources(1, 1),
        100,
        200,
        "k",
    )


def worker(name: str, parent_id: str = "", contract_id: str = "contract-1") -> Worker:
    """Make a worker."""
    path = f"{parent_id}/{name}/" if parent_id else f"{name}/"
    root_id = parent_id or name
    made = manifest(name, parent_id, contract_id)
    return Worker(
        name,
        contract_id,
        parent_id,
        root_id,
        path,
        made.depth,
        "node-1",
        State.STARTING,
        300,
        None,
        300,
        made,
    )


async def opened(store: SqlStore, commits: list[Commit] | None = None) -> SqlStore:
    """Open *store* with two contracts, and with some workers of the first."""
    await store.open((lambda _: None) if commits is None else commits.append)

    def fill(tx: Any) -> None:
        for name in CONTRACTS:
            tx.add_contract(contract(name), b"secret")
        for name in NAMES:
            tx.add_manifest(manifest(name))
        tx.put_node(Node("node-1", "digest", "", "", 1, 1))

    await store.transact(fill, durable=True)
    for name in CONTRACTS:  # as in a controller that has decided before: its conditions are known
        await store.transact(lambda tx, name=name: tx.contract(name))
    return store


@dataclass(frozen=True)
class Place:
    """Where a store is, to open it and to look at it from outside."""

    kind: str
    path: str = ""

    def store(self) -> SqlStore:
        """Make the store."""
        if self.kind == "postgresql":
            return postgres_store(self.path, "controller-1")
        return sqlite_store(Path(self.path) if self.path else None)

    def seen_elsewhere(self) -> int:
        """Return how many events another connection sees."""
        query = "SELECT count(*) FROM outbox"
        if self.kind == "postgresql":
            with psycopg.connect(self.path) as connection:
                (count,) = connection.execute(query).fetchone() or (0,)
        else:
            with contextlib.closing(sqlite3.connect(self.path)) as file:
                (count,) = file.execute(query).fetchone()
        return int(count)


def issue(name: str) -> Asked:
    """Ask for a manifest to be added, with an event."""

    def run(tx: Any) -> int:
        tx.contract("contract-1", lock=True)
        tx.add_manifest(manifest(name))
        tx.record(Event("audit", 1))
        return int(tx.position)

    return Asked(run, Needs(contract_id="contract-1"))
