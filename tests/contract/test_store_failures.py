"""What a batch of transactions loses when a part of it fails, or all of it, in any store."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest
from stores import WAIT_SECONDS, Asked, Gate, Place, issue, together

from hayflick_controller.store import Commit
from hayflick_controller.store.protocol import Needs
from hayflick_controller.store.sql import SqlStore
from hayflick_rpc.errors import HayflickError


def _unavailable(outcome: object) -> bool:
    return isinstance(outcome, HayflickError) and outcome.reason_name == "SERVICE_UNAVAILABLE"


async def test_what_cannot_be_written_fails_alone(store: SqlStore, commits: list[Commit]) -> None:
    """A write that the database refuses at the end of a batch fails its transaction and no other."""
    before = await store.transact(lambda tx: tx.contract("contract-1"))
    outcomes = await together(store, [issue("x"), issue("y"), issue("x"), issue("z")])
    assert [_unavailable(outcome) for outcome in outcomes] == [False, False, True, False]
    after = await store.transact(lambda tx: tx.contract("contract-1"))
    assert after is not None
    assert before is not None
    assert after.reserved_count == before.reserved_count + 3
    queued = await store.transact(lambda tx: tx.queued(0, 10))
    assert [event.position for event in queued] == [outcomes[0], outcomes[1], outcomes[3]]
    assert [event.sequence for event in queued] == [1, 2, 3]
    assert [event for commit in commits for event in commit.events] == queued


async def test_who_asks_is_not_told_of_what_another_could_not_write(store: SqlStore) -> None:
    """A transaction that reads after one whose write is refused sees the others' writes alone."""

    def count(tx: Any) -> int:
        return sum(tx.manifest(f"manifest-{name}") is not None for name in ("x", "y"))

    outcomes = await together(store, [issue("x"), issue("x"), issue("y"), Asked(count, Needs())])
    assert [_unavailable(outcome) for outcome in outcomes] == [False, True, False, False]
    assert outcomes[3] == 2


async def test_nobody_is_answered_before_the_commit(
    store: SqlStore, place: Place, commits: list[Commit]
) -> None:
    """While one transaction of a batch runs, those before it are neither answered, nor told, nor seen."""
    first, last = Gate(), Gate()
    held = asyncio.ensure_future(store.transact(first.hold))
    await asyncio.to_thread(first.entered.wait, WAIT_SECONDS)
    one = asyncio.ensure_future(store.transact(issue("x").work))
    two = asyncio.ensure_future(store.transact(last.hold))
    await asyncio.sleep(0)  # one turn of the loop: both have asked
    first.open.set()
    await held
    await asyncio.to_thread(last.entered.wait, WAIT_SECONDS)
    try:
        assert not one.done()
        assert commits == []
        if place.path:
            assert place.seen_elsewhere() == 0
    finally:
        last.open.set()
    await asyncio.gather(one, two)
    assert [len(commit.events) for commit in commits] == [1]
    if place.path:
        assert place.seen_elsewhere() == 1


SUPPORT = Path(__file__).parents[1] / "support"
DIES = """
import asyncio, os, signal, sys
sys.path.insert(0, sys.argv[1])
from stores import WAIT_SECONDS, Gate, Place, issue, opened

async def main():
    store = await opened(Place(sys.argv[2], sys.argv[3]).store())
    print("open", flush=True)
    def tell(future):
        print("answered", flush=True)
    gate = Gate()
    held = asyncio.ensure_future(store.transact(gate.hold))
    await asyncio.to_thread(gate.entered.wait, WAIT_SECONDS)
    for name in ("x", "y", "z"):
        asked = issue(name)
        asyncio.ensure_future(store.transact(asked.work, needs=asked.needs)).add_done_callback(tell)
    die = lambda tx: tx.live_workers() or os.kill(os.getpid(), signal.SIGKILL)
    asyncio.ensure_future(store.transact(die))
    await asyncio.sleep(0)
    gate.open.set()
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_crash_loses_the_whole_batch_and_answers_none(place: Place) -> None:
    """A controller that dies within a batch has answered nobody in it, and nothing of it is there."""
    if not place.path:
        pytest.skip("memory does not outlive a process")
    command = [sys.executable, "-c", DIES, str(SUPPORT), place.kind, place.path]
    ended = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert ended.stdout == "open\n"
    assert place.seen_elsewhere() == 0
    again = place.store()
    await again.open(lambda _: None)
    try:
        assert [await again.transact(lambda tx, n=n: tx.manifest(f"manifest-{n}")) for n in "xyz"] == [
            None
        ] * 3
        asked = issue("x")
        await again.transact(asked.work, needs=asked.needs)
    finally:
        await again.close()


async def test_a_connection_lost_within_a_batch_fails_all_of_it(
    store: SqlStore, place: Place, commits: list[Commit]
) -> None:
    """When the server ends the session under a batch, all of it is refused, and later ones work."""
    if place.kind != "postgresql":
        pytest.skip("only a server has sessions to end")

    def end_session(tx: Any) -> None:
        del tx
        with psycopg.connect(place.path, autocommit=True) as other:
            other.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'hayflick_controller' AND datname = current_database()"
            )

    outcomes = await together(store, [issue("x"), Asked(end_session, Needs()), issue("y")])
    assert [_unavailable(outcome) for outcome in outcomes] == [True] * 3
    assert commits == []
    assert place.seen_elsewhere() == 0
    asked = issue("x")
    position = await store.transact(asked.work, needs=asked.needs)
    assert position & 0xFFFF == 1
