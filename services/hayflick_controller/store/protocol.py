"""What the controller asks of a database; ``tests/contract`` is the suite any store must pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from hayflick_controller.conditions import Family
    from hayflick_controller.model import (
        Answer,
        Contract,
        Event,
        Key,
        Latch,
        Manifest,
        ManifestStatus,
        Node,
        Scope,
        State,
        Usage,
        Worker,
    )

T = TypeVar("T")

BOOT_SHIFT = 40
"""A position is ``boot << 40 | sequence``: it orders events across restarts, and sequences start at 1 anew.

A store that lost its last, unsynchronised commits to a power cut hands out the
same sequences again; in a new boot they belong to another source, so that the
logger never takes a new event for one that it knows.
"""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who the controller is: a name for life, and the number of this start.

    Each start of any controller on a database has a higher number than all
    before, so that a position names one event among all of theirs.
    """

    controller_id: str
    boot: int

    @property
    def source(self) -> str:
        """What the controller's events are sent as in this boot."""
        return source_of(self.controller_id, self.boot)


def source_of(controller_id: str, boot: int) -> str:
    """Return the name under which events of one boot are sent to the logger."""
    return f"controller/{controller_id}/{boot}"


@dataclass(frozen=True, slots=True)
class Queued:
    """An event in the outbox: serialised ``hayflick.v1.Event``, at its position."""

    position: int
    body: bytes

    @staticmethod
    def position_of(boot: int, sequence: int) -> int:
        """Return the position of an event."""
        return boot << BOOT_SHIFT | sequence

    @property
    def boot(self) -> int:
        """The start of the controller that recorded it."""
        return self.position >> BOOT_SHIFT

    @property
    def sequence(self) -> int:
        """Its place among the events of its boot, from 1."""
        return self.position & ((1 << BOOT_SHIFT) - 1)


@dataclass(frozen=True, slots=True)
class Notice:
    """What other controllers on the same database are told of a commit.

    Attributes:
        worker_ids: The workers that it changed.
        quarantine_ids: The workers whose quarantine it engaged or released.
    """

    worker_ids: tuple[str, ...] = ()
    quarantine_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Commit:
    """What a transaction did, told after it committed, in the order of commits."""

    events: tuple[Queued, ...] = ()
    workers: tuple[Worker, ...] = ()
    notice: Notice = Notice()


@dataclass(frozen=True, slots=True)
class Needs:
    """Names of what a transaction is going to read; each saves time, and none is a promise.

    Attributes:
        request_id: Whose answer.
        contract_id: Which contract, locked, and the kill switch over it.
        parent_id: Which worker, and the latches over it and its ancestors.
        manifest_id: Whose status.
        key_id: Which key.
        node_id: Which node.
    """

    request_id: str = ""
    contract_id: str = ""
    parent_id: str = ""
    manifest_id: str = ""
    key_id: str = ""
    node_id: str = ""


NO_NEEDS = Needs()


@dataclass(frozen=True, slots=True)
class Beat:
    """What was last heard of a worker."""

    worker_id: str
    last_heartbeat_us: int
    usage: Usage


class Tx(Protocol):
    """One transaction. Its methods run on the database's thread and block it."""

    # Requests

    def answer(self, request_id: str) -> Answer | None:
        """Return what *request_id* was answered with, if it was seen before."""

    def remember(self, answer: Answer) -> None:
        """Keep the answer to a request that was not seen before."""

    def complete(self, request_id: str, body: bytes, position: int) -> None:
        """Fill in the answer to a request that was remembered without one."""

    def forget(self, request_id: str) -> None:
        """Drop the answer to *request_id*, so that it can be decided anew."""

    def forget_before(self, create_us: int) -> int:
        """Drop answers, and manifests that can no longer be used, older than *create_us*; count them."""

    # Contracts

    def add_contract(self, contract: Contract, secret: bytes) -> None:
        """Add *contract* and the secret of its key."""

    def contract(self, contract_id: str, *, lock: bool = False) -> Contract | None:
        """Return a contract; with *lock*, no other transaction changes its population until this one ends."""

    def contracts(self, before: tuple[int, str] | None, limit: int) -> list[Contract]:
        """Return at most *limit* contracts, newest first, that come after (create_us, id) *before*."""

    def secret(self, key_id: str, contract_id: str) -> bytes | None:
        """Return the secret of a contract's key."""

    # Keys

    def add_key(self, key: Key, secret: bytes) -> None:
        """Add *key* and make it the current one of its contract."""

    def put_key(self, key: Key) -> None:
        """Write when *key* was retired and revoked."""

    def key(self, key_id: str) -> Key | None:
        """Return a key."""

    def keys(self, before: tuple[int, str] | None, limit: int, contract_id: str = "") -> list[Key]:
        """Return at most *limit* keys, newest first, that come after (create_us, id) *before*."""

    # Latches

    def latches(self, scopes: Iterable[Scope]) -> dict[Scope, Latch]:
        """Return the latches over *scopes* that were ever engaged."""

    def engaged(self) -> list[Latch]:
        """Return every latch that is engaged."""

    def put_latch(self, latch: Latch) -> None:
        """Add or replace *latch*."""

    # Manifests

    def add_manifest(self, manifest: Manifest) -> None:
        """Add a manifest as RESERVED and count its slot as reserved."""

    def manifest(
        self, manifest_id: str, *, with_snapshot: bool = False
    ) -> tuple[Manifest, ManifestStatus] | None:
        """Return a manifest and what became of it."""

    def manifest_status(self, manifest_id: str) -> ManifestStatus | None:
        """Return what became of a manifest, ``None`` when there is none."""

    def settle(self, manifest_id: str, status: ManifestStatus) -> None:
        """Move a manifest to *status*, keeping its contract's count of reserved slots right."""

    def return_expired(self, now_us: int, contract_id: str | None = None) -> dict[str, int]:
        """Give back every slot whose manifest's time is over; return how many, by contract."""

    def return_reserved(self, scope: Scope, path: str = "") -> dict[str, int]:
        """Give back every slot reserved under *scope* (a worker's has a *path*); count them by contract."""

    def last_reservation_us(self, parent_id: str, now_us: int) -> int | None:
        """Return when the newest manifest for a child of *parent_id* that is still good was issued."""

    # Workers

    def add_worker(self, worker: Worker) -> None:
        """Add a live worker and count its slot."""

    def remove_worker(self, worker: Worker) -> None:
        """Take back :meth:`add_worker`, for a birth that could not be recorded."""

    def worker(self, worker_id: str, *, with_snapshot: bool = False) -> Worker | None:
        """Return a worker, live or ended."""

    def workers(
        self,
        *,
        after: tuple[int, str] | None,
        limit: int,
        contract_id: str = "",
        states: Sequence[State] = (),
    ) -> list[Worker]:
        """Return at most *limit* workers, oldest first, that come after (create_us, id) *after*."""

    def live_workers(
        self,
        *,
        contract_id: str = "",
        node_id: str = "",
        path: str = "",
        stopping: bool = False,
    ) -> list[Worker]:
        """Return the live workers for which every condition given holds.

        Args:
            contract_id: Of this contract.
            node_id: On this node.
            path: The worker at this path and its descendants.
            stopping: In STOPPING.
        """

    def stopping(self) -> list[tuple[str, str]]:
        """Return the node and the name of every worker in STOPPING."""

    def live_families(self, root_ids: Iterable[str]) -> list[Worker]:
        """Return the live workers of the family trees of these roots."""

    def descendants(self, path: str) -> list[Worker]:
        """Return every worker below *path*, live and ended, parents first."""

    def last_birth_us(self, parent_id: str) -> int | None:
        """Return when the newest child of *parent_id* that did not fail to launch was registered."""

    def spawn_count(self, root_id: str) -> int:
        """Return how many were born below a root in its whole life, failed launches not counted."""

    def promised_spawns(self, contract_id: str, root_id: str, now_us: int) -> int:
        """Count the manifests that reserve a birth below a root and are still good."""

    def family(self, root_id: str, parent_id: str) -> Family:
        """Count the live workers of a tree, and among them the children of *parent_id*."""

    def update_states(self, workers: Sequence[Worker]) -> None:
        """Write state, stop_reason and stop_detail of *workers*."""

    def narrow_workers(self, workers: Sequence[Worker]) -> None:
        """Write the network of *workers*."""

    def end_workers(self, workers: Sequence[Worker]) -> None:
        """Write *workers*, which carry an exit, as ENDED, and give back their slots."""

    def attest(self, worker: Worker, body: bytes) -> None:
        """Keep what was found of *worker*'s sandbox: its attestation, and *body*, which has every check."""

    def attestation(self, worker_id: str) -> bytes:
        """Return what was found of a worker's sandbox, with every check; empty when it was not told."""

    def beat(self, beats: Sequence[Beat]) -> None:
        """Write what was last heard of live workers."""

    # Nodes

    def node(self, node_id: str) -> Node | None:
        """Return a node that connected once."""

    def put_node(self, node: Node) -> None:
        """Add or replace *node*."""

    def nodes(self) -> list[Node]:
        """Return every node that connected once."""

    def touch_nodes(self, acks: Sequence[tuple[str, int]]) -> None:
        """Write when each node's (id, last_ack_us) last beat was acknowledged."""

    # The outbox

    @property
    def position(self) -> int:
        """The position of the newest event that any transaction recorded, this one's included."""

    def record(self, event: Event) -> None:
        """Put *event* in the outbox, at the next position."""

    def queued(self, after: int, limit: int, controller_id: str = "") -> list[Queued]:
        """Return at most *limit* events past position *after*, in order; our own, or another's."""

    def waits(self, position: int) -> bool:
        """Return whether the event at *position*, whosever it is, is not known to be delivered."""

    def delivered(self, position: int, controller_id: str = "") -> None:
        """Drop the events up to and including *position*; our own, or another's."""

    # Other controllers on the same database

    def heard(self, worker_ids: Iterable[str]) -> list[Worker]:
        """Return workers that another controller changed; our followers are told of them at the commit."""

    def alive(self, controller_id: str) -> bool:
        """Return whether a controller is connected; one that is not will not be before our commit."""

    def left_over(self) -> list[str]:
        """Return the controllers that are not connected and have events waiting."""


class Store(Protocol):
    """A database that keeps the controller's state."""

    @property
    def identity(self) -> Identity:
        """Who the controller is; raised in the database at each open."""

    @property
    def shared(self) -> bool:
        """Whether other controllers may work on the same database."""

    async def open(self, on_commit: Callable[[Commit], None]) -> None:
        """Connect, migrate, and count this start.

        Args:
            on_commit: Called on the event loop after each transaction that
                changed something, in the order of commits, also when whoever
                asked for the transaction was cancelled meanwhile.

        Raises:
            OSError: The database's file or directory cannot be made safe.
        """

    async def transact(self, fn: Callable[[Tx], T], *, durable: bool = False, needs: Needs = NO_NEEDS) -> T:
        """Run *fn* in a transaction: committed when it returns, rolled back when it raises.

        Those that wait at the same time may be committed together. Each is still all
        or nothing by itself, sees those before it, and returns after the commit.

        Args:
            fn: Runs on the database's thread; must not keep its argument. It is run again
                where what ran before it in the same commit could not be written, so that
                only what its last run returned or raised holds.
            durable: Whether the commit must survive a power cut before this
                returns. Without it, it survives a crash of the process only.
            needs: What *fn* is going to read.

        Raises:
            HayflickError: SERVICE_UNAVAILABLE when the database cannot do it.
        """

    async def close(self) -> None:
        """End the connection when what was begun has ended."""
