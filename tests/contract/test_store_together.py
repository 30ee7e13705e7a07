"""Transactions that are committed together do what they would do one after the other, in any store."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from stores import CONTRACTS, NAMES, Asked, Place, Work, opened, together, worker

from hayflick_controller.model import (
    EVERYTHING,
    Answer,
    EndReason,
    Event,
    Exit,
    Key,
    Latch,
    ManifestStatus,
    Node,
    Scope,
    ScopeKind,
    State,
)
from hayflick_controller.store.protocol import Needs
from hayflick_controller.store.sql import SqlStore, sqlite_store

# What transactions do, each step seen in what it returns.
names, contract_ids = st.sampled_from(NAMES), st.sampled_from(CONTRACTS)
scopes = st.sampled_from([EVERYTHING, *(Scope(ScopeKind.CONTRACT, name) for name in CONTRACTS)]) | names.map(
    lambda name: Scope(ScopeKind.WORKER, name)
)


def _contract(name: str) -> Work:
    return lambda tx: tx.contract(name, lock=True)


def _latches(name: str, path: str) -> Work:
    def run(tx: Any) -> Any:
        scopes_ = [EVERYTHING, Scope(ScopeKind.CONTRACT, name)]
        if path:
            scopes_ += [Scope(ScopeKind.WORKER, path), Scope(ScopeKind.QUARANTINE, path)]
        return sorted(tx.latches(scopes_).items(), key=str)

    return run


def _register(name: str, parent_id: str) -> Work:
    def run(tx: Any) -> Any:
        if tx.manifest_status(f"manifest-{name}") is not ManifestStatus.RESERVED or tx.worker(name):
            return "no"
        tx.settle(f"manifest-{name}", ManifestStatus.REGISTERED)
        tx.add_worker(worker(name, parent_id if parent_id != name and tx.worker(parent_id) else ""))
        return "yes"

    return run


def _end(name: str) -> Work:
    def run(tx: Any) -> Any:
        found = tx.worker(name)
        if found is None or not found.live:
            return None
        return tx.end_workers([replace(found, exit=Exit(EndReason.LAUNCH_FAILED, 400))])

    return run


def _remove(name: str) -> Work:
    def run(tx: Any) -> Any:
        found = tx.worker(name)
        if found is None or not found.live:
            return None
        tx.remove_worker(found)
        return tx.settle(f"manifest-{name}", ManifestStatus.RESERVED)

    return run


def _remember(name: str) -> Work:
    def run(tx: Any) -> Any:
        if (known := tx.answer(name)) is not None:
            return known
        return tx.remember(Answer(name, "m", "d", None, tx.position, 5))

    return run


def _turn(scope: Scope) -> Work:
    def run(tx: Any) -> Any:
        latch = tx.latches([scope]).get(scope, Latch(scope))
        tx.put_latch(replace(latch, engaged=not latch.engaged, epoch=latch.epoch + 1))
        return latch

    return run


def _stop(name: str) -> Work:
    def run(tx: Any) -> Any:
        found = tx.worker(name)
        return found and tx.update_states([replace(found, state=State.STOPPING)] if found.live else [])

    return run


def _rotate(name: str) -> Work:
    def run(tx: Any) -> Any:
        before = tx.contract(name, lock=True).key_id
        key = Key(f"{before}+", name, 5)
        tx.put_key(replace(tx.key(before), retire_us=7))
        tx.add_key(key, b"new")
        return tx.secret(key.key_id, name)

    return run


def _settle(name: str, status: ManifestStatus) -> Work:
    return lambda tx: tx.worker(name) or tx.settle(f"manifest-{name}", status)


def _refuse(tx: Any) -> None:
    del tx
    raise LookupError


steps = st.one_of(
    contract_ids.map(_contract),
    st.builds(_latches, contract_ids, names | st.just("")),
    st.builds(_register, names, names | st.just("")),
    st.builds(_settle, names, st.sampled_from(ManifestStatus)),
    names.map(_end),
    names.map(_remove),
    names.map(_remember),
    names.map(_stop),
    scopes.map(_turn),
    contract_ids.map(_rotate),
    names.map(lambda name: lambda tx: tx.worker(name)),
    names.map(lambda name: lambda tx: tx.answer(name)),
    names.map(lambda name: lambda tx: tx.complete(name, b"body", 3)),
    names.map(lambda name: lambda tx: tx.forget(name)),
    names.map(lambda name: lambda tx: tx.manifest_status(f"manifest-{name}")),
    names.map(lambda name: lambda tx: tx.spawn_count(name)),
    st.sampled_from(("key-contract-1", "key-contract-1+")).map(lambda name: lambda tx: tx.key(name)),
    st.just(lambda tx: tx.node("node-1")),
    st.just(lambda tx: tx.touch_nodes([("node-1", 9)])),
    st.just(lambda tx: tx.put_node(Node("node-1", "other", "", "", 2, 2))),
    st.just(lambda tx: tx.return_expired(10_000)),
    st.just(lambda tx: tx.live_workers()),
    st.just(lambda tx: tx.contracts(None, 9)),
    st.just(lambda tx: tx.record(Event("audit", 1))),
    st.just(_refuse),
)
needs = st.builds(
    Needs,
    request_id=names,
    contract_id=contract_ids,
    parent_id=names,
    manifest_id=names.map(lambda name: f"manifest-{name}") | st.just("\x00forged"),
    key_id=st.sampled_from(("key-contract-1", "key-contract-1+")),
    node_id=st.just("node-1"),
)


def in_turn(parts: Sequence[Work]) -> Work:
    """Return a transaction that takes every step of *parts*."""
    return lambda tx: [part(tx) for part in parts]


transactions = st.builds(Asked, st.lists(steps, min_size=2, max_size=5).map(in_turn), needs)


async def everything(store: SqlStore) -> list[Any]:
    """Read all that the steps can have changed."""

    def read(tx: Any) -> list[Any]:
        return [
            tx.contracts(None, 9),
            tx.workers(after=None, limit=99),
            tx.keys(None, 99),
            tx.nodes(),
            [tx.manifest(f"manifest-{name}") for name in NAMES],
            [tx.answer(name) for name in NAMES],
            [tx.spawn_count(name) for name in NAMES],
            sorted(
                tx.latches([EVERYTHING, *(Scope(ScopeKind.WORKER, name) for name in NAMES)]).items(), key=str
            ),
            tx.queued(0, 999),
        ]

    return await store.transact(read)


def furnish(tx: Any) -> None:
    """Leave something of each kind for the steps to find."""
    for name in ("a", "b"):
        tx.remember(Answer(name, "m", "d", None, 0, 5))
        tx.settle(f"manifest-{name}", ManifestStatus.REGISTERED)
        tx.add_worker(worker(name, "" if name == "a" else "a"))
    tx.put_latch(Latch(EVERYTHING, epoch=1))


async def compare(one: SqlStore, other: SqlStore, batches: Sequence[Sequence[Asked]]) -> None:
    """Run *batches* together in one store and one after the other in another; both must say the same."""
    for batch in batches:
        outcomes = await together(one, batch)
        expected = [
            (await asyncio.gather(other.transact(asked.work), return_exceptions=True))[0] for asked in batch
        ]
        assert [repr(outcome) for outcome in outcomes] == [repr(outcome) for outcome in expected]
        assert await everything(one) == await everything(other)


@given(batches=st.lists(st.lists(transactions, min_size=4, max_size=12), min_size=1, max_size=3))
@settings(max_examples=50, deadline=None)
def test_a_batch_does_what_its_transactions_do_one_by_one(batches: list[list[Asked]]) -> None:
    """Whatever is read ahead, held back or refused, a batch has the outcomes and the effects of its parts."""

    async def run() -> None:
        async with contextlib.AsyncExitStack() as stack:
            one, other = await opened(sqlite_store(None)), await opened(sqlite_store(None))
            for each in (one, other):
                stack.push_async_callback(each.close)
                await each.transact(furnish)
            await compare(one, other, batches)

    asyncio.run(run())


async def test_a_batch_on_every_database(place: Place, tmp_path: Path) -> None:
    """The same holds of a store in a file and of PostgreSQL, for a batch of births."""
    batch = [
        Asked(
            in_turn([_contract("contract-1"), _latches("contract-1", ""), _register("a", "")]), _about("a")
        ),
        Asked(in_turn([_contract("contract-1"), _register("b", "a"), _remember("b")]), _about("b", "a")),
        Asked(
            in_turn([_contract("contract-1"), _register("c", "a"), _remember("b"), _refuse]), _about("c", "a")
        ),
        Asked(in_turn([_turn(EVERYTHING), _remember("b")]), _about("b")),
        Asked(in_turn([_latches("contract-1", ""), _contract("contract-1"), _end("b")]), _about("c")),
        Asked(in_turn([_contract("contract-1"), _register("c", ""), _rotate("contract-1")]), _about("c")),
        Asked(in_turn([_contract("contract-1"), _settle("c", ManifestStatus.RETURNED)]), _about("c")),
    ]
    one, other = await opened(place.store()), await opened(sqlite_store(tmp_path / "other" / "controller.db"))
    try:
        await compare(one, other, [batch, batch])
    finally:
        await one.close()
        await other.close()


def _about(name: str, parent_id: str = "") -> Needs:
    return Needs(name, "contract-1", parent_id, f"manifest-{name}", "key-contract-1", "node-1")
