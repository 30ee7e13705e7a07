"""What the controller keeps in memory: watchers, the roster, links, plans of kills."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from hayflick.v1 import controller_pb2 as pb
from hayflick_controller import pursuit
from hayflick_controller.config import Config
from hayflick_controller.links import Link
from hayflick_controller.model import (
    EVERYTHING,
    EndReason,
    Exit,
    Latch,
    Manifest,
    Resources,
    Scope,
    ScopeKind,
    State,
    Usage,
    Worker,
)
from hayflick_controller.roster import Roster
from hayflick_controller.store import Commit
from hayflick_controller.watch import MAX_BEHIND, Broadcast
from hayflick_rpc.errors import HayflickError

MANIFEST = Manifest("m", "contract", "a", "", 0, 0, "{}", Resources(100, 2**25), 0, 1, "key")


def worker(path: str, state: State = State.RUNNING) -> Worker:
    """Make the worker at *path*."""
    members = path.rstrip("/").split("/")
    return Worker(
        worker_id=members[-1],
        contract_id="contract",
        parent_id=members[-2] if len(members) > 1 else "",
        root_id=members[0],
        path=path,
        depth=len(members) - 1,
        node_id="node",
        state=state,
        create_us=10,
        expire_us=None,
        last_heartbeat_us=10,
        manifest=MANIFEST,
        stop_reason=EndReason.KILLED if state is State.STOPPING else None,
    )


async def test_a_slow_watcher_is_cut_off() -> None:
    """A watcher that is too many changes behind gets those it has, then the reason; others get all."""
    broadcast = Broadcast()
    slow = broadcast.join("")
    for _ in range(MAX_BEHIND + 5):
        broadcast.follow(Commit(workers=(worker("a/"),)))
    changes = slow.changes()
    for _ in range(MAX_BEHIND):
        await anext(changes)
    with pytest.raises(HayflickError) as caught:
        await anext(changes)
    assert caught.value.reason_name == "SERVICE_UNAVAILABLE"
    assert "behind" in caught.value.message


async def test_watchers_end_with_the_service() -> None:
    """A watcher is told that the service shuts down."""
    broadcast = Broadcast()
    watch = broadcast.join("contract")
    broadcast.close()
    with pytest.raises(HayflickError) as caught:
        await anext(watch.changes())
    assert caught.value.reason_name == "SHUTTING_DOWN"


def test_the_roster_follows_the_commits() -> None:
    """A beat is kept until it is written, freshens the record, and is forgotten at the end."""
    roster = Roster()
    living = worker("a/")
    roster.follow(Commit(workers=(living,)))
    assert roster.state_on("node", "a") is State.RUNNING
    assert roster.state_on("another", "a") is None
    roster.beat("a", 20, Usage(1))
    assert roster.freshen(living).last_heartbeat_us == 20
    assert [beat.worker_id for beat in roster.unwritten()] == ["a"]
    assert roster.unwritten() == []
    assert roster.freshen(living).usage == Usage(1)
    roster.follow(Commit(workers=(replace(living, state=State.ENDED, exit=Exit(EndReason.KILLED, 30)),)))
    assert roster.state_on("node", "a") is None
    assert roster.freshen(living) == living


async def test_departures() -> None:
    """Whoever waits for the end of some workers is told when the last of them has ended."""
    roster = Roster()
    roster.load([worker("a/"), worker("b/")])
    departures = roster.watch_departures(["a", "b", "ended before"])
    for name in ("a", "b"):
        assert departures.remaining
        roster.follow(Commit(workers=(worker(f"{name}/", State.ENDED),)))
    async with asyncio.timeout(1):
        await departures.wait()


async def test_a_link_fails_what_is_awaited() -> None:
    """Orders without a result fail when the stream ends, and so do later ones."""
    link = Link("node", "", "3.11", 0)
    early = link.order(pb.Order())
    link.close()
    for order in (early, link.order(pb.Order())):
        with pytest.raises(HayflickError) as caught:
            await order
        assert caught.value.metadata["node_id"] == "node"
    assert [message.order.order_id async for message in link.outgoing()] != []


def test_kills_are_as_wide_as_their_causes() -> None:
    """Workers under a latch are ended by one order for the latch, the others by one per family."""
    stopping = [
        worker(path, State.STOPPING) for path in ("a/", "a/b/", "c/", "c/d/", "c/d/e/", "cc/", "f/g/")
    ]
    latch = Latch(Scope(ScopeKind.WORKER, "d"), engaged=True, reason="why")
    quarantine = Latch(Scope(ScopeKind.QUARANTINE, "a"), engaged=True)
    kills = pursuit.plan(stopping, [quarantine, latch])
    assert [(kill.scope.id, set(kill.worker_ids), kill.reason) for kill in kills] == [
        ("d", {"d", "e"}, EndReason.KILL_SWITCH),
        ("a", {"a", "b"}, EndReason.KILLED),
        ("c", {"c"}, EndReason.KILLED),
        ("cc", {"cc"}, EndReason.KILLED),
        ("g", {"g"}, EndReason.KILLED),
    ]
    (everything,) = pursuit.plan(stopping, [Latch(EVERYTHING, engaged=True)])
    assert len(everything.worker_ids) == len(stopping)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_settings_are_checked(seconds: float, tmp_path: object) -> None:
    """A setting that cannot be meant is refused by name."""
    with pytest.raises(ValueError, match="lease_seconds"):
        Config("unix:///x", tmp_path, "unix:///y", lease_seconds=seconds)  # type: ignore[arg-type]
