"""The nodes: who is connected, whose lease has run out, what each reports.

A node renews its lease with every beat that is acknowledged. Without a renewal
it ends its own workers when the lease runs out; the controller waits a little
longer than that and then records them as lost. So a slot is given back only
when nothing can run in it.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hayflick.v1 import controller_pb2
from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_controller import ends, events, parse, render
from hayflick_controller.attestations import Attestations
from hayflick_controller.clock import MICROSECONDS, Clock
from hayflick_controller.links import Link, gone
from hayflick_controller.model import EndReason, Exit, Node, Silence, State, Worker
from hayflick_rpc import wire
from hayflick_rpc.attestation import PUBLIC_KEY_BYTES
from hayflick_rpc.errors import HayflickError, invalid_field

if TYPE_CHECKING:
    from hayflick_controller.pursuit import Pursuit
    from hayflick_controller.roster import Roster
    from hayflick_controller.store import Store, Tx

LEASE_MARGIN_US = MICROSECONDS
"""How much longer than the lease the controller waits: an acknowledgement may be under way."""
WRITE_SLACK_US = 15 * MICROSECONDS
"""How long a controller that shares its database renews leases without being able to tell the others.

They wait for as long, beyond the lease, before they record its nodes' workers as lost.
"""
HELLO_TIMEOUT_SECONDS = 10.0
MAX_VERSION_CHARS = 16

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Hello:
    """How a node introduced itself, checked."""

    node_id: str
    address: str
    worker_ids: tuple[str, ...]
    birth_worker_ids: tuple[str, ...]
    python_version: str
    attestation_public_key: bytes


@dataclass(frozen=True, slots=True)
class Welcome:
    """What a node is admitted with."""

    link: Link
    session: str
    stop_worker_ids: tuple[str, ...]


def parse_hello(hello: controller_pb2.NodeHello) -> Hello:
    """Return *hello* checked.

    Raises:
        HayflickError: INVALID_FIELD.
    """
    if len(hello.worker_ids) > parse.MAX_HELLO_WORKERS:
        raise invalid_field("hello.worker_ids", f"must be at most {parse.MAX_HELLO_WORKERS}")
    if len(hello.birth_worker_ids) > parse.MAX_HELLO_WORKERS:
        raise invalid_field("hello.birth_worker_ids", f"must be at most {parse.MAX_HELLO_WORKERS}")
    if len(hello.attestation_public_key) not in (0, PUBLIC_KEY_BYTES):
        raise invalid_field("hello.attestation_public_key", f"must be {PUBLIC_KEY_BYTES} bytes")
    return Hello(
        wire.require_id("hello.node_id", hello.node_id),
        parse.text("hello.address", hello.address, parse.MAX_ADDRESS_CHARS),
        tuple(hello.worker_ids),
        tuple(hello.birth_worker_ids),
        parse.text("hello.python_version", hello.python_version, MAX_VERSION_CHARS),
        hello.attestation_public_key,
    )


def digest(session: str) -> str:
    """Return what is kept of a session token: enough to know it again, not enough to be it."""
    return hashlib.sha256(session.encode()).hexdigest()


def require_session(tx: Tx, node_id: str, session: str) -> Node:
    """Return the node that *session* is the live session of.

    Raises:
        HayflickError: NODE_SESSION_INVALID.
    """
    node = tx.node(node_id)
    if node is None or not node.connected or not hmac.compare_digest(node.session_digest, digest(session)):
        raise HayflickError(
            ErrorReason.ERROR_REASON_NODE_SESSION_INVALID,
            f"session: is not the live session of node {node_id}; connect again",
            metadata={"node_id": node_id, "field": "session"},
        )
    return node


class Nodes:
    """See the module.

    Args:
        store: The record.
        roster: The living.
        pursuit: Ends workers that a node should not run.
        clock: The time.
        lease_us: How long after the last acknowledgement a node's workers may run.
    """

    def __init__(self, store: Store, roster: Roster, pursuit: Pursuit, clock: Clock, lease_us: int) -> None:
        self._store = store
        self._roster = roster
        self._pursuit = pursuit
        self._clock = clock
        self._lease_us = lease_us
        self._start_us = clock()
        self._written_us = self._start_us
        # What was last read of each node's lease, and when that was new to us: another
        # controller's clock need not agree with ours.
        self._acks: dict[str, tuple[int, int]] = {}
        self._links = pursuit.links
        self._attestations = Attestations(clock)
        self._started: set[str] = set()
        self._strangers: dict[str, set[str]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Take up the record: no stream survived the controller's own restart."""

        def run(tx: Tx) -> list[Worker]:
            for node in tx.nodes():
                if node.connected and node.controller_id == self._store.identity.controller_id:
                    tx.put_node(replace(node, connected=False))
            return tx.live_workers()

        self._roster.load(await self._store.transact(run))
        self._written_us = self._clock()

    async def connect(self, hello: Hello) -> Welcome:
        """Admit a node.

        Raises:
            HayflickError: NODE_ALREADY_CONNECTED while another stream of that name lives.
        """
        while (before := self._links.get(hello.node_id)) is not None and before.closed:
            await before.departed.wait()  # its end is being recorded
        if before is not None:
            raise _already_connected(hello.node_id)
        now_us = self._clock()
        key = hello.attestation_public_key
        link = Link(hello.node_id, hello.address, hello.python_version, now_us, key)
        self._links[hello.node_id] = link  # before the first await: the name is taken now
        session = secrets.token_hex(32)
        node = Node(
            hello.node_id,
            digest(session),
            hello.address,
            hello.python_version,
            now_us,
            now_us,
            connected=True,
            controller_id=self._store.identity.controller_id,
        )

        def run(tx: Tx) -> tuple[str, ...]:
            known = tx.node(hello.node_id)
            if (
                known is not None
                and known.connected
                and known.controller_id != node.controller_id
                and tx.alive(known.controller_id)
            ):
                raise _already_connected(hello.node_id)
            tx.put_node(node)
            tx.record(events.node_connected(node, len(hello.worker_ids), key))
            return self._reconcile(tx, hello, now_us)

        try:
            stop_worker_ids = await self._store.transact(run)
        except BaseException:
            self._forget(link)
            raise
        log.info("node %s connected with %d workers", hello.node_id, len(hello.worker_ids))
        return Welcome(link, session, stop_worker_ids)

    async def disconnect(self, link: Link, reason: str) -> None:
        """Record that a node's stream ended; its lease runs on from its last acknowledgement."""
        link.close()
        now_us = self._clock()
        # Never lost in the moment in which it was cut: it may be we who slept.
        self._acks[link.node_id] = link.last_ack_us, max(link.last_ack_us, now_us - self._lease_us)

        def run(tx: Tx) -> None:
            node = tx.node(link.node_id)
            if node is not None and node.connect_us == link.connect_us:
                tx.put_node(replace(node, connected=False, last_ack_us=link.last_ack_us))
                tx.record(events.node_disconnected(link.node_id, now_us, reason))

        try:
            await self._store.transact(run)
        finally:
            self._forget(link)
        log.info("node %s disconnected: %s", link.node_id, reason)

    def beat(self, link: Link, beat: controller_pb2.NodeBeat) -> None:
        """Take a beat, and acknowledge it.

        Raises:
            HayflickError: INVALID_FIELD when the beat is malformed or out of order.
        """
        if beat.sequence <= link.sequence:
            raise invalid_field("beat.sequence", "must rise with each beat")
        if len(beat.workers) > parse.MAX_BEATS:
            raise invalid_field("beat.workers", f"must be at most {parse.MAX_BEATS}")
        now_us = self._clock()
        for worker in beat.workers:
            state = self._roster.state_on(link.node_id, worker.worker_id)
            if state is None:
                self._strangers.setdefault(link.node_id, set()).add(worker.worker_id)
                continue
            usage = parse.usage("beat.workers.usage", worker.usage)
            self._roster.beat(worker.worker_id, now_us, usage)
            if worker.HasField("attestation"):
                self._attestations.hear(link, worker.worker_id, worker.attestation)
            if state is State.STARTING and render.state_from_wire(worker.state) is State.RUNNING:
                self._started.add(worker.worker_id)
        link.sequence = beat.sequence
        link.last_beat_us = now_us
        link.worker_count = len(beat.workers)
        if self._store.shared and now_us - self._written_us > WRITE_SLACK_US:
            return  # another controller may be about to take the node for lost: let its lease run out
        link.last_ack_us = now_us
        link.send(controller_pb2.ConnectNodeResponse(ack=controller_pb2.BeatAck(sequence=beat.sequence)))
        if self._started or self._strangers or self._attestations.waiting:
            self._spawn()

    def connected(self) -> list[Link]:
        """Return the live links, by name."""
        return [self._links[name] for name in sorted(self._links) if not self._links[name].closed]

    def page(self, page_size: int, page_token: str) -> controller_pb2.ListNodesResponse:
        """Return a page of connected nodes, by name.

        Raises:
            HayflickError: INVALID_FIELD; PAGE_TOKEN_INVALID.
        """
        limit = wire.page_size(page_size)
        mark = wire.fingerprint("nodes")
        position = wire.decode_page_token(page_token, mark)
        after = "" if position is None else str(position[0])
        links = [link for link in self.connected() if link.node_id > after]
        page = controller_pb2.ListNodesResponse(nodes=[render.node(link) for link in links[:limit]])
        if len(links) > limit:
            page.next_page_token = wire.encode_page_token(mark, links[limit - 1].node_id)
        return page

    def cut_silent(self) -> None:
        """End the streams of nodes that have not beaten for a whole lease."""
        now_us = self._clock()
        for link in self.connected():
            if now_us - link.last_beat_us > self._lease_us:
                link.close(gone(link.node_id, "sent no beat for a whole lease"))

    async def record_lost(self) -> list[str]:
        """Record the workers of nodes whose lease has run out as lost; return their ids."""
        now_us = self._clock()
        deadline_us = now_us - self._lease_us - LEASE_MARGIN_US
        connected = {link.node_id for link in self.connected()}

        def run(tx: Tx) -> list[str]:
            lost: list[str] = []
            for node in tx.nodes():
                slack_us = 0 if node.controller_id == self._store.identity.controller_id else WRITE_SLACK_US
                if node.node_id in connected:
                    continue
                renewed_us = self._renewed_us(node, now_us)
                if renewed_us + slack_us > deadline_us:
                    continue
                workers = tx.live_workers(node_id=node.node_id)
                lost += [worker.worker_id for worker in workers]
                silence = Silence(now_us - renewed_us, self._lease_us)
                ends.end(tx, _silent(workers, now_us), now_us, self._roster.freshen, silence)
            return lost

        return await self._store.transact(run)

    def _renewed_us(self, node: Node, now_us: int) -> int:
        """Return when the lease of a node that is not connected here was last renewed, by our clock.

        A controller that was away acknowledged nothing that it has not written;
        it grants every node a whole lease from its start.
        """
        known = self._acks.get(node.node_id)
        if known is None:
            known = self._acks[node.node_id] = node.last_ack_us, self._start_us
        elif known[0] != node.last_ack_us:
            known = self._acks[node.node_id] = node.last_ack_us, now_us
        return known[1]

    async def write_beats(self) -> None:
        """Write what was heard since the last time to the database, in one transaction."""
        beats = self._roster.unwritten()
        now_us = self._clock()
        shared = self._store.shared
        # To other controllers it says until when we may have renewed a lease.
        acks = [(link.node_id, now_us if shared else link.last_ack_us) for link in self.connected()]

        def run(tx: Tx) -> None:
            tx.beat(beats)
            tx.touch_nodes(acks)

        if beats or acks:
            await self._store.transact(run)
        self._written_us = now_us

    def close(self) -> None:
        """End every stream: the service stops."""
        for link in self.connected():
            link.close(
                HayflickError(ErrorReason.ERROR_REASON_SHUTTING_DOWN, "the controller is shutting down")
            )

    async def settle(self) -> None:
        """Return when what beats have set off has ended."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _reconcile(self, tx: Tx, hello: Hello, now_us: int) -> tuple[str, ...]:
        """Bring the record and the node's word together; return what the node must end."""
        named, births = set(hello.worker_ids), set(hello.birth_worker_ids)
        recorded = tx.live_workers(node_id=hello.node_id)
        missing = [
            worker
            for worker in recorded
            # One that ran is no birth: a manifest that is shown again may name any worker.
            if worker.worker_id not in named
            and (worker.worker_id not in births or worker.state is State.RUNNING)
        ]
        ends.end(tx, _missing(missing, now_us), now_us, self._roster.freshen)
        # Read again: what descends from the missing is STOPPING now.
        may_run = {
            worker.worker_id
            for worker in tx.live_workers(node_id=hello.node_id)
            if worker.state is not State.STOPPING
        }
        # A birth that is not on record was never asked for, or not yet.
        known = {worker_id for worker_id in births if tx.worker(worker_id) is not None}
        return tuple(sorted((named | known) - may_run))

    def _spawn(self) -> None:
        task = asyncio.create_task(self._settle_beats())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _settle_beats(self) -> None:
        """Write who began to run, and end who should not."""
        started, self._started = self._started, set()
        strangers, self._strangers = self._strangers, {}
        told = self._attestations.take()

        def run(tx: Tx) -> tuple[bool, dict[str, list[str]]]:
            # First: who is condemned does not become RUNNING.
            condemned = self._attestations.settle(tx, told, started)
            found = [tx.worker(worker_id) for worker_id in started]
            tx.update_states(
                [
                    replace(worker, state=State.RUNNING)
                    for worker in found
                    if worker is not None and worker.state is State.STARTING
                ]
            )
            return condemned, {
                node_id: [worker_id for worker_id in ids if not _lives_on(tx, node_id, worker_id)]
                for node_id, ids in strangers.items()
            }

        try:
            condemned, unknown = await self._store.transact(run)
            if condemned:
                self._pursuit.kick()
            for node_id, ids in unknown.items():
                if ids:
                    log.warning("node %s beats for %d workers that may not run", node_id, len(ids))
                    self._pursuit.evict(node_id, ids)
        except HayflickError as error:
            self._attestations.keep(told)  # which are told but once
            log.warning("beats were not settled: %s", error.message)  # the next beats say it again

    def _forget(self, link: Link) -> None:
        if self._links.get(link.node_id) is link:
            del self._links[link.node_id]
        link.departed.set()


def _already_connected(node_id: str) -> HayflickError:
    return HayflickError(
        ErrorReason.ERROR_REASON_NODE_ALREADY_CONNECTED,
        f"another orchestrator is connected as {node_id}",
        metadata={"node_id": node_id},
    )


def _silent(workers: Iterable[Worker], now_us: int) -> list[tuple[Worker, Exit]]:
    """Return the ends of workers whose node's lease ran out: also of those that were being killed.

    Nobody saw them die, so nothing else may be said of them.
    """
    return [
        (worker, Exit(EndReason.NODE_LOST, now_us, _told("lease ran out", worker.stop_reason)))
        for worker in workers
    ]


def _told(detail: str, stop_reason: EndReason | None) -> str:
    return detail if stop_reason is None else f"{detail} while it was being ended as {stop_reason.value}"


def _missing(workers: Iterable[Worker], now_us: int) -> list[tuple[Worker, Exit]]:
    """Return the ends of workers that their node, which is back, says it does not run."""
    # One that was being ended ended as it was told to; the node only did not get to say so.
    detail = "its node no longer runs it"
    return [
        (worker, Exit(worker.stop_reason or EndReason.NODE_LOST, now_us, worker.stop_detail or detail))
        for worker in workers
    ]


def _lives_on(tx: Tx, node_id: str, worker_id: str) -> bool:
    worker = tx.worker(worker_id)
    return worker is not None and worker.live and worker.node_id == node_id
