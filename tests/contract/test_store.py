"""What any store must do; each implementation runs the whole suite."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hayflick.v1 import logger_pb2
from hayflick_controller.model import (
    EVERYTHING,
    Answer,
    Contract,
    EndReason,
    Event,
    Exit,
    Latch,
    Manifest,
    ManifestStatus,
    NetworkPolicy,
    Node,
    Policy,
    Predicate,
    Resources,
    Scope,
    ScopeKind,
    State,
    StopCondition,
    Usage,
    Worker,
)
from hayflick_controller.store import Commit, Store
from hayflick_controller.store.protocol import Beat
from hayflick_controller.store.sql import postgres_store, sqlite_store
from hayflick_controller.terms import (
    DenialClass,
    FamilyBudget,
    GradeFloor,
    IsolationGrade,
    Terms,
    Tripwire,
    TripwireScope,
)

CONTRACT = Contract(
    "contract-1",
    Policy(
        max_depth=3,
        max_replicas=10,
        cooldown_us=1,
        expiration_us=5,
        display_name="zähler",
        stop_conditions=(
            StopCondition("first", "why", cel="active_count > 3"),
            StopCondition("second", predicate=Predicate(b"\0pickle", "3.11", 7)),
        ),
        terms=Terms(
            grade_floors=(GradeFloor(1, IsolationGrade.B),),
            family_budget=FamilyBudget(2**30, 500, 64, 10, 60_000_000),
            tripwires=(Tripwire("t", 3, 7, (DenialClass.MOUNTS,), TripwireScope.FAMILY),),
        ),
    ),
    "key-1",
    100,
)
RESOURCES = Resources(
    500, 2**28, 3, 4, 5, 6, 2**53 - 1, 8, NetworkPolicy(allow_loopback=True, allowed_hosts=("é:1", "*.b")), 9
)


def manifest(
    name: str, parent_id: str = "", issue_us: int = 100, contract_id: str = "contract-1"
) -> Manifest:
    """Make a manifest that is good for 1,000 microseconds."""
    return Manifest(
        manifest_id=f"manifest-{name}",
        contract_id=contract_id,
        worker_id=name,
        parent_id=parent_id,
        depth=int(bool(parent_id)),
        epoch=2,
        state_snapshot_json='{"é": "\\u0000"}',
        resources=RESOURCES,
        issue_us=issue_us,
        expire_us=issue_us + 1_000,
        key_id="key-1",
        signature=b"\xff" * 32,
    )


def worker(name: str, parent: Worker | None = None, **fields: Any) -> Worker:
    """Make a worker just registered."""
    made = Worker(
        worker_id=name,
        contract_id="contract-1",
        parent_id=parent.worker_id if parent else "",
        root_id=parent.root_id if parent else name,
        path=f"{parent.path if parent else ''}{name}/",
        depth=parent.depth + 1 if parent else 0,
        node_id="node-1",
        state=State.STARTING,
        create_us=200,
        expire_us=None,
        last_heartbeat_us=200,
        manifest=manifest(name, parent.worker_id if parent else ""),
        degraded_layers=("landlock",),
    )
    return replace(made, **fields)


def without_snapshot(of: Worker) -> Worker:
    """Return a worker as lists show it."""
    return replace(of, manifest=replace(of.manifest, state_snapshot_json=""))


Maker = Callable[[], Store]


@pytest.fixture(params=["sqlite file", "sqlite memory", "postgresql"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Maker:
    """The implementations under test."""
    if request.param == "postgresql":
        url = request.getfixturevalue("cluster").new_database()
        return lambda: postgres_store(url, "controller-1")
    if request.param == "sqlite memory":
        return lambda: sqlite_store(None)
    return lambda: sqlite_store(tmp_path / "data" / "controller.db")


@pytest.fixture
def commits() -> list[Commit]:
    """What the store told after its commits."""
    return []


@pytest.fixture
async def store(make: Maker, commits: list[Commit]) -> AsyncIterator[Store]:
    """An open store with one contract."""
    made = make()
    await made.open(commits.append)
    await made.transact(lambda tx: tx.add_contract(CONTRACT, b"secret-1"), durable=True)
    yield made
    await made.close()


async def add(store: Store, *workers: Worker) -> None:
    """Issue and register *workers*."""

    def run(tx: Any) -> None:
        for each in workers:
            tx.add_manifest(each.manifest)
            tx.settle(each.manifest.manifest_id, ManifestStatus.REGISTERED)
            tx.add_worker(each)

    await store.transact(run)


async def counts(store: Store) -> tuple[int, int]:
    """Return how many slots are taken and reserved."""
    contract = await store.transact(lambda tx: tx.contract("contract-1"))
    assert contract is not None
    return contract.active_count, contract.reserved_count


async def test_contracts_come_back(store: Store) -> None:
    """A contract is read as it was added, with its conditions and the secret of its key."""
    assert await store.transact(lambda tx: tx.contract("contract-1")) == CONTRACT
    assert await store.transact(lambda tx: tx.contract("contract-1", lock=True)) == CONTRACT
    assert await store.transact(lambda tx: tx.contract("unknown")) is None
    assert await store.transact(lambda tx: tx.secret("key-1", "contract-1")) == b"secret-1"
    assert await store.transact(lambda tx: tx.secret("key-1", "contract-2")) is None


async def test_contracts_are_listed_newest_first(store: Store) -> None:
    """Pages of contracts follow from one another, newest first, also at the same instant."""
    for name, create_us in (("b", 300), ("a", 300), ("c", 400)):
        contract = replace(CONTRACT, contract_id=name, key_id=name, create_us=create_us)
        await store.transact(lambda tx, contract=contract: tx.add_contract(contract, b"s"))
    seen: list[str] = []
    before: tuple[int, str] | None = None
    while page := await store.transact(lambda tx, before=before: tx.contracts(before, 2)):
        seen += [contract.contract_id for contract in page]
        before = (page[-1].create_us, page[-1].contract_id)
    assert seen == ["c", "b", "a", "contract-1"]


async def test_a_transaction_that_raises_changes_nothing(store: Store, commits: list[Commit]) -> None:
    """What a failed transaction did, its events included, never was; the sequence has no gap."""

    def record(tx: Any) -> int:
        tx.record(Event("audit", 1))
        position: int = tx.position
        return position

    def fail(tx: Any) -> None:
        tx.add_manifest(manifest("a"))
        tx.record(Event("audit", 1))
        raise LookupError

    first = await store.transact(record)
    told = len(commits)
    with pytest.raises(LookupError):
        await store.transact(fail)
    assert await counts(store) == (0, 0)
    assert await store.transact(record) == first + 1
    assert [event.position for commit in commits[told:] for event in commit.events] == [first + 1]


async def test_slots_are_counted(store: Store) -> None:
    """Issuing reserves a slot, registering takes it, ending gives it back, the version follows."""
    one = worker("a")
    await store.transact(lambda tx: tx.add_manifest(one.manifest))
    assert await counts(store) == (0, 1)

    def register(tx: Any) -> int:
        tx.settle(one.manifest.manifest_id, ManifestStatus.REGISTERED)
        tx.add_worker(one)
        version: int = tx.contract("contract-1").population_version
        return version

    assert await store.transact(register) == 1
    assert await counts(store) == (1, 0)
    ended = replace(one, exit=Exit(EndReason.COMPLETED, 500, "done"))
    await store.transact(lambda tx: tx.end_workers([ended]))
    assert await counts(store) == (0, 0)
    contract = await store.transact(lambda tx: tx.contract("contract-1"))
    assert contract is not None
    assert contract.population_version == 2


async def test_settling_twice_counts_once(store: Store) -> None:
    """Moving a manifest to where it is already changes no count; moving it back reserves again."""
    await store.transact(lambda tx: tx.add_manifest(manifest("a")))
    for status, reserved in (
        (ManifestStatus.RETURNED, 0),
        (ManifestStatus.RETURNED, 0),
        (ManifestStatus.RESERVED, 1),
        (ManifestStatus.RESERVED, 1),
    ):
        await store.transact(lambda tx, status=status: tx.settle("manifest-a", status))
        assert await counts(store) == (0, reserved)


async def test_manifests_come_back(store: Store) -> None:
    """A manifest is read as it was issued, with its snapshot when that is asked for."""
    made = manifest("a")
    await store.transact(lambda tx: tx.add_manifest(made))
    found = await store.transact(lambda tx: tx.manifest("manifest-a", with_snapshot=True))
    assert found == (made, ManifestStatus.RESERVED)
    bare = await store.transact(lambda tx: tx.manifest("manifest-a"))
    assert bare == (replace(made, state_snapshot_json=""), ManifestStatus.RESERVED)
    assert await store.transact(lambda tx: tx.manifest("unknown")) is None


async def test_reservations_expire(store: Store) -> None:
    """Slots are given back at the very microsecond when their manifests' time is over, once."""
    for name, issue_us in (("a", 100), ("b", 101)):
        await store.transact(lambda tx, name=name, us=issue_us: tx.add_manifest(manifest(name, issue_us=us)))
    assert await store.transact(lambda tx: tx.return_expired(1_099)) == {}
    assert await store.transact(lambda tx: tx.return_expired(1_100)) == {"contract-1": 1}
    assert await store.transact(lambda tx: tx.return_expired(1_100)) == {}
    assert await counts(store) == (0, 1)
    assert await store.transact(lambda tx: tx.return_expired(9_999, "contract-2")) == {}
    assert await store.transact(lambda tx: tx.return_expired(9_999, "contract-1")) == {"contract-1": 1}


@pytest.mark.parametrize(
    ("scope", "path", "returned"),
    [
        (EVERYTHING, "", 3),
        (Scope(ScopeKind.CONTRACT, "contract-1"), "", 3),
        (Scope(ScopeKind.CONTRACT, "contract-2"), "", 0),
        (Scope(ScopeKind.WORKER, "a"), "a/", 2),
        (Scope(ScopeKind.WORKER, "b"), "a/b/", 1),
    ],
)
async def test_reservations_under_a_scope(store: Store, scope: Scope, path: str, returned: int) -> None:
    """All that is reserved below a scope can be given back, and nothing else."""
    one = worker("a")
    two = worker("b", one)
    await add(store, one, two)

    def reserve(tx: Any) -> None:
        tx.add_manifest(manifest("c"))
        tx.add_manifest(manifest("d", "a"))
        tx.add_manifest(manifest("e", "b"))

    await store.transact(reserve)
    found = await store.transact(lambda tx: tx.return_reserved(scope, path))
    assert sum(found.values()) == returned
    assert await counts(store) == (2, 3 - returned)


async def test_births_of_a_parent(store: Store) -> None:
    """The last birth is the newest child that did not fail to launch; good reservations count."""
    parent = worker("a")
    await add(store, parent, worker("b", parent, create_us=300), worker("c", parent, create_us=400))
    assert await store.transact(lambda tx: tx.last_birth_us("a")) == 400
    assert await store.transact(lambda tx: tx.last_birth_us("b")) is None
    failed = worker("c", parent, create_us=400, exit=Exit(EndReason.LAUNCH_FAILED, 401))
    await store.transact(lambda tx: tx.end_workers([failed]))
    assert await store.transact(lambda tx: tx.last_birth_us("a")) == 300
    await store.transact(lambda tx: tx.add_manifest(manifest("d", "a", issue_us=500)))
    assert await store.transact(lambda tx: tx.last_reservation_us("a", 1_499)) == 500
    assert await store.transact(lambda tx: tx.last_reservation_us("a", 1_500)) is None


async def test_workers_come_back(store: Store) -> None:
    """A worker is read as it was added, and as it ended, for ever."""
    one = worker("a", expire_us=900)
    await add(store, one)
    assert await store.transact(lambda tx: tx.worker("a", with_snapshot=True)) == one
    assert await store.transact(lambda tx: tx.worker("a")) == without_snapshot(one)
    ended = replace(
        one,
        state=State.ENDED,
        last_heartbeat_us=700,
        usage=Usage(1, 2, 3, 4),
        exit=Exit(EndReason.SIGNALED, 800, "why", -1, 11),
    )
    await store.transact(lambda tx: tx.end_workers([ended]))
    assert await store.transact(lambda tx: tx.worker("a", with_snapshot=True)) == ended
    assert await store.transact(lambda tx: tx.worker("b")) is None


async def test_a_worker_can_be_taken_back(store: Store) -> None:
    """A birth that is undone leaves no worker and no slot, and whoever follows the commits sees it end."""
    one = worker("a")
    await add(store, one)
    await store.transact(lambda tx: tx.remove_worker(one))
    assert await counts(store) == (0, 0)
    assert await store.transact(lambda tx: tx.worker("a")) is None


async def test_workers_are_listed_oldest_first(store: Store) -> None:
    """Pages of workers follow from one another, oldest first, within a contract and states."""
    for name, create_us in (("b", 300), ("a", 300), ("c", 100)):
        await add(store, worker(name, create_us=create_us))
    await store.transact(
        lambda tx: tx.end_workers([worker("b", create_us=300, exit=Exit(EndReason.KILLED, 1))])
    )

    async def names(after: tuple[int, str] | None = None, limit: int = 10, **which: Any) -> list[str]:
        found = await store.transact(lambda tx: tx.workers(after=after, limit=limit, **which))
        return [each.worker_id for each in found]

    assert await names() == ["c", "a", "b"]
    assert await names(limit=1) == ["c"]
    assert await names(after=(300, "a")) == ["b"]
    assert await names(states=[State.ENDED]) == ["b"]
    assert await names(contract_id="contract-2") == []


async def test_the_living(store: Store) -> None:
    """The living are found by contract, node, subtree, family and state."""
    a = worker("a")
    b = worker("b", a, node_id="node-2")
    c = worker("c", b)
    ab = worker("ab")  # its name begins as a's does
    await add(store, a, b, c, ab)
    await store.transact(lambda tx: tx.end_workers([replace(c, exit=Exit(EndReason.KILLED, 1))]))
    stopping = replace(b, state=State.STOPPING, stop_reason=EndReason.EXPIRED, stop_detail="late")
    await store.transact(lambda tx: tx.update_states([stopping]))

    async def names(**which: Any) -> set[str]:
        return {each.worker_id for each in await store.transact(lambda tx: tx.live_workers(**which))}

    async def families(roots: list[str]) -> set[str]:
        return {each.worker_id for each in await store.transact(lambda tx: tx.live_families(roots))}

    assert await names() == {"a", "b", "ab"}
    assert await names(contract_id="contract-1") == {"a", "b", "ab"}
    assert await names(contract_id="contract-2") == set()
    assert await names(node_id="node-2") == {"b"}
    assert await names(path="a/") == {"a", "b"}
    assert await families(["a"]) == {"a", "b"}
    assert await families([]) == set()
    assert await families([str(number) for number in range(2_000)] + ["ab"]) == {"ab"}
    assert await names(stopping=True) == {"b"}
    assert await store.transact(lambda tx: tx.stopping()) == [("node-2", "b")]
    assert await store.transact(lambda tx: tx.worker("b")) == without_snapshot(stopping)
    assert [each.worker_id for each in await store.transact(lambda tx: tx.descendants("a/"))] == ["b", "c"]
    family = await store.transact(lambda tx: tx.family("a", "a"))
    assert (family.live_count, family.sibling_count) == (2, 1)


async def test_beats_are_written_to_the_living(store: Store) -> None:
    """Beats update workers that live; one that comes after the end changes nothing."""
    await add(store, worker("a"), worker("b"))
    ended = worker("b", exit=Exit(EndReason.KILLED, 1))
    await store.transact(lambda tx: tx.end_workers([ended]))
    usage = Usage(5, 6, 7, 8)
    await store.transact(lambda tx: tx.beat([Beat(name, 999, usage) for name in ("a", "b", "unknown")]))
    living = await store.transact(lambda tx: tx.worker("a"))
    dead = await store.transact(lambda tx: tx.worker("b"))
    assert living is not None
    assert dead is not None
    assert (living.last_heartbeat_us, living.usage) == (999, usage)
    assert dead.usage == Usage()


async def test_latches(store: Store) -> None:
    """A latch is kept per scope, the last word counts, and the engaged ones can be listed."""
    quarantine = Scope(ScopeKind.QUARANTINE, "a")
    on = Latch(EVERYTHING, True, 1, "why", 5)
    await store.transact(lambda tx: tx.put_latch(on), durable=True)
    await store.transact(lambda tx: tx.put_latch(Latch(quarantine, True, 1, "", 5)))
    assert await store.transact(lambda tx: tx.latches([EVERYTHING, Scope(ScopeKind.WORKER, "a")])) == {
        EVERYTHING: on
    }
    off = replace(on, engaged=False, epoch=2)
    await store.transact(lambda tx: tx.put_latch(off))
    assert await store.transact(lambda tx: tx.latches([EVERYTHING])) == {EVERYTHING: off}
    assert [latch.scope for latch in await store.transact(lambda tx: tx.engaged())] == [quarantine]


async def test_answers(store: Store) -> None:
    """An answer is kept, completed and forgotten; old ones go, with manifests that are no use."""
    answer = Answer("request", "Method", "digest", None, 7, 100)
    await store.transact(lambda tx: tx.remember(answer))
    assert await store.transact(lambda tx: tx.answer("request")) == answer
    await store.transact(lambda tx: tx.complete("request", b"body", 8))
    assert await store.transact(lambda tx: tx.answer("request")) == replace(answer, body=b"body", position=8)

    def leave(tx: Any) -> None:
        tx.add_manifest(manifest("a"))
        tx.settle("manifest-a", ManifestStatus.RETURNED)

    await store.transact(leave)
    assert await store.transact(lambda tx: tx.forget_before(100)) == 0
    assert await store.transact(lambda tx: tx.forget_before(2_000)) == 2
    assert await store.transact(lambda tx: tx.answer("request")) is None
    await store.transact(lambda tx: tx.remember(answer))
    await store.transact(lambda tx: tx.forget("request"))
    assert await store.transact(lambda tx: tx.answer("request")) is None


async def test_attestations_come_back(store: Store, commits: list[Commit]) -> None:
    """What was found of a sandbox is read as it was written, the newest word counts, and it is told of."""
    one = worker("a")
    await add(store, one)
    assert await store.transact(lambda tx: tx.attestation("a")) == b""
    for word in (b"first", b"\x00second"):
        attested = replace(one, attestation=word)
        await store.transact(
            lambda tx, attested=attested: tx.attest(attested, attested.attestation + b" and all")
        )
        found = await store.transact(lambda tx: tx.worker("a"))
        assert found is not None
        assert found.attestation == word
        assert await store.transact(lambda tx: tx.attestation("a")) == word + b" and all"
    assert word in [told.attestation for commit in commits for told in commit.workers]


async def test_nodes(store: Store) -> None:
    """A node is kept by name, the last word counts."""
    node = Node("node-1", "digest", "unix:///x", "3.11", 5, 6)
    await store.transact(lambda tx: tx.put_node(node))
    await store.transact(lambda tx: tx.put_node(replace(node, connected=False)))
    await store.transact(lambda tx: tx.touch_nodes([("node-1", 9), ("unknown", 9)]))
    expected = replace(node, connected=False, last_ack_us=9)
    assert await store.transact(lambda tx: tx.node("node-1")) == expected
    assert await store.transact(lambda tx: tx.nodes()) == [expected]


async def test_events_keep_their_order(store: Store, commits: list[Commit]) -> None:
    """Events are queued in the order of commits, told in that order, and dropped up to a position."""

    def record(tx: Any, number: int) -> int:
        tx.record(Event("audit", number, contract_id="contract-1", details={"n": number, "l": ["x"]}))
        position: int = tx.position
        return position

    positions = await asyncio.gather(
        *(store.transact(lambda tx, number=number: record(tx, number)) for number in range(50))
    )
    queued = await store.transact(lambda tx: tx.queued(0, 100))
    assert [event.position for event in queued] == sorted(positions)
    assert [event.sequence for event in queued] == list(range(1, 51))
    assert [event for commit in commits for event in commit.events] == queued
    assert logger_pb2.Event.FromString(queued[0].body).details["n"] == 0
    await store.transact(lambda tx: tx.delivered(positions[29]))
    assert await store.transact(lambda tx: tx.queued(0, 5)) == queued[30:35]
    assert await store.transact(lambda tx: tx.queued(positions[39], 100)) == queued[40:]


async def test_commits_are_told_to_those_who_follow_when_the_caller_is_gone(
    store: Store, commits: list[Commit]
) -> None:
    """A commit is told also when whoever asked for it was cancelled meanwhile."""
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()

    def run(tx: Any) -> None:
        loop.call_soon_threadsafe(begun.set)
        tx.record(Event("audit", 1))

    task = asyncio.create_task(store.transact(run))
    await begun.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await store.transact(lambda tx: tx.nodes())  # whatever was begun has ended
    assert [len(commit.events) for commit in commits] == [1]


async def test_a_file_outlives_its_store(tmp_path: Path) -> None:
    """What was committed is there at the next open, which is another boot of the same controller."""
    path = tmp_path / "data" / "controller.db"
    first = sqlite_store(path)
    await first.open(lambda _: None)
    await first.transact(lambda tx: tx.add_contract(CONTRACT, b"s"))
    await first.transact(lambda tx: tx.record(Event("audit", 1)))
    await first.close()
    second = sqlite_store(path)
    await second.open(lambda _: None)
    assert await second.transact(lambda tx: tx.contract("contract-1")) == CONTRACT
    assert second.identity.controller_id == first.identity.controller_id
    assert second.identity.boot == first.identity.boot + 1
    await second.transact(lambda tx: tx.record(Event("audit", 2)))
    queued = await second.transact(lambda tx: tx.queued(0, 10))
    assert [(event.boot, event.sequence) for event in queued] == [(1, 1), (2, 1)]
    await second.close()


async def test_only_this_user_can_read_the_file(tmp_path: Path) -> None:
    """The database, which holds signing keys, has mode 0600 in a directory of mode 0700."""
    path = tmp_path / "data" / "controller.db"
    store = sqlite_store(path)
    await store.open(lambda _: None)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert set(modes.values()) == {0o600}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    await store.close()


async def test_a_directory_open_to_others_is_refused(tmp_path: Path) -> None:
    """A data directory that others may enter is refused rather than used."""
    (tmp_path / "data").mkdir(mode=0o755)
    with pytest.raises(OSError, match="0700"):
        sqlite_store(tmp_path / "data" / "controller.db")


async def test_spawns_of_a_family_are_counted(store: Store) -> None:
    """Births below a root count for its whole life, promised ones while they are good; failures do not."""
    root, other = worker("a"), worker("x")
    child = worker("b", root)
    grandchild, failed = worker("c", child), worker("d", child)
    await add(store, root, other, child, grandchild, failed, worker("y", other))
    ended = replace(grandchild, exit=Exit(EndReason.COMPLETED, 400))
    stillborn = replace(failed, exit=Exit(EndReason.LAUNCH_FAILED, 400))
    counted = []

    def run(tx: Any) -> None:
        counted.append(tx.spawn_count("a"))
        tx.end_workers([ended])
        counted.append(tx.spawn_count("a"))
        tx.end_workers([stillborn])
        tx.remove_worker(worker("y", other))
        counted.extend([tx.spawn_count("a"), tx.spawn_count("x"), tx.spawn_count("nobody")])
        tx.add_manifest(manifest("promised", "b", issue_us=500))
        tx.add_manifest(manifest("elsewhere", "x", issue_us=500))
        counted.append(tx.promised_spawns("contract-1", "a", 1_499))
        counted.append(tx.promised_spawns("contract-1", "a", 1_500))

    await store.transact(run)
    assert counted == [3, 3, 2, 0, 0, 1, 0]
