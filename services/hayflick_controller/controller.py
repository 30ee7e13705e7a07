"""The parts of the controller, wired together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from functools import partial
from typing import TYPE_CHECKING

from hayflick_controller import anchor, events
from hayflick_controller.births import Births
from hayflick_controller.chores import Chore, Chores
from hayflick_controller.clock import MICROSECONDS, Clock
from hayflick_controller.contracts import Contracts
from hayflick_controller.deaths import Deaths
from hayflick_controller.decisions import Decisions
from hayflick_controller.keys import Keys
from hayflick_controller.killswitch import KillSwitch
from hayflick_controller.network_narrowing import Narrowing
from hayflick_controller.nodes import Nodes
from hayflick_controller.outbox import Outbox
from hayflick_controller.peers import Peers
from hayflick_controller.pursuit import Pursuit
from hayflick_controller.quarantine import Quarantine
from hayflick_controller.receipts import Issuer, Signer
from hayflick_controller.registry import Registry
from hayflick_controller.roster import Roster
from hayflick_controller.standing_orders import StandingOrders
from hayflick_controller.store import names
from hayflick_controller.store.sql import postgres_store, sqlite_store
from hayflick_controller.watch import Broadcast
from hayflick_rpc.channel import Dial, connect
from hayflick_rpc.clock import SteadyClock, boot_name

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from hayflick_controller.config import Config
    from hayflick_controller.links import Link
    from hayflick_controller.store import Commit, Store, Tx
    from hayflick_controller.store.notices import Notices
    from hayflick_controller.tripwires import Report

LOGGER_GRACE_SECONDS = 2.0
"""How long a start waits for the logger before it serves without one."""
EXPIRE_INTERVAL_SECONDS = 1.0
FORGET_INTERVAL_SECONDS = 60.0
EXPIRE_MARGIN_US = 5 * MICROSECONDS
"""How long after a worker's life by contract its node may take to end it."""
STEP_SECONDS = 1.0
"""By how much the wall clock must jump to be worth an event; NTP slews below that."""

log = logging.getLogger(__name__)


class Controller:
    """Everything but the wire.

    Use :meth:`start` to make one.
    """

    def __init__(self, config: Config, store: Store, clock: Clock, dial: Dial = connect) -> None:
        self.config = config
        self._dial = dial
        self.clock = clock
        self._store = store
        self._roster = Roster()
        self._broadcast = Broadcast()
        self._pursuit = Pursuit(store, self._roster, clock)
        self._standing = StandingOrders(self._pursuit.links, self._roster)
        self._outbox: Outbox | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._pursuing: asyncio.Task[None] | None = None
        self._chores: Chores | None = None
        self._peers: Peers | None = None
        self._notices: Notices | None = None
        self._told_step_seconds = 0.0
        self.nodes = Nodes(
            store, self._roster, self._pursuit, clock, round(config.lease_seconds * MICROSECONDS)
        )
        self.registry = Registry(store, self._roster, self._broadcast)

    @classmethod
    async def start(
        cls, config: Config, clock: Clock | None = None, store: Store | None = None, dial: Dial = connect
    ) -> Controller:
        """Open the database, take up what an earlier start left, and begin to work.

        Args:
            config: What it is told.
            clock: The time; by default the one that is kept for this boot of the machine.
            store: Where its state lives; by default what *config* names.
            dial: Makes channels to the logger.

        Raises:
            OSError: The data directory cannot be made safe.
            HayflickError: The database cannot be opened.
        """
        store = store or _store_of(config)
        if clock is None:
            clock = await asyncio.to_thread(_clock_of, config)
        controller = cls(config, store, clock, dial)
        await controller._open()
        # Started together with its logger, it would refuse its first callers for
        # a moment; without one it serves all the same: reads, denials, kills.
        assert controller._outbox is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOGGER_GRACE_SECONDS):
                await controller._outbox.wait_up()
        return controller

    async def _open(self) -> None:
        config = self.config
        await self._store.open(self._follow)
        self._outbox = Outbox(self._store, config.logger, self._dial)
        signer = Signer.load(config.data_dir)
        self._decisions = Decisions(self._store, self._outbox, self.clock, config.audit_timeout_seconds)
        self.contracts = Contracts(self._store, self._decisions, self.clock)
        self.keys = Keys(self._store, self._decisions, self.clock)
        self.births = Births(self._decisions, self.nodes, self.clock)
        self.deaths = Deaths(self._decisions, self._pursuit, self._roster, self.clock)
        issuer = Issuer(signer, self._store.identity.controller_id)
        self.kill_switch = KillSwitch(self._decisions, self._pursuit, self._roster, self.clock, issuer)
        self.quarantine = Quarantine(self._decisions, self._standing, self._roster, self.clock)
        self.narrowing = Narrowing(self._decisions, self._standing, self._roster, self.clock)
        await self.nodes.open()
        started = events.controller_started(
            self._store.identity, signer.key_id, signer.public_key, self.clock()
        )
        await self._store.transact(lambda tx: tx.record(started))
        await self._outbox.start()
        if config.database is not None:
            self._hear_peers(config.database)
        self._pursuing = asyncio.create_task(self._pursuit.run(), name="pursuit")
        self._standing.start(
            self.quarantine.pursue_freezes, self.quarantine.pursue_thaws, self.narrowing.pursue
        )
        self._chores = Chores(
            Chore("leases", config.lease_seconds / 15, self._enforce_leases),
            Chore("heartbeats", config.flush_interval_seconds, self.nodes.write_beats),
            Chore("reservations", EXPIRE_INTERVAL_SECONDS, self._return_expired),
            Chore("launches", config.start_timeout_seconds / 10, self._stop_stillborn),
            Chore("lives", EXPIRE_INTERVAL_SECONDS, self._end_expired),
            Chore("clock", EXPIRE_INTERVAL_SECONDS, self._tell_of_step),
            Chore("retention", FORGET_INTERVAL_SECONDS, self._forget_old),
        )

    def _hear_peers(self, url: str) -> None:
        from hayflick_controller.store.notices import Notices

        self._peers = Peers(self._store, self._roster, self._pursuit, self._standing)
        self._notices = Notices(url, self._store.identity.controller_id, self._peers.hear)

    def welcomed(self) -> None:
        """A node was admitted: end, freeze and narrow there what must be."""
        self._pursuit.kick()
        self._standing.kick()

    def tripped(self, link: Link, report: Report) -> None:
        """A node froze some of its workers by itself: make a quarantine of it."""
        self._spawn(self.quarantine.trip(link, report))

    def left(self, link: Link) -> None:
        """A node's stream ended."""
        link.close()
        why = link.failure.message if link.failure else "the stream ended"
        # Not awaited by the stream's own handler, which may be cancelled.
        self._spawn(self.nodes.disconnect(link, why))

    @property
    def audit_up(self) -> bool:
        """Whether the logger answers."""
        return self._outbox is not None and self._outbox.up

    async def wait_ready(self) -> None:
        """Return once the logger answers and has all that earlier starts left."""
        assert self._outbox is not None
        await self._outbox.wait_up()

    async def drain(self) -> None:
        """End what would never end by itself: node streams and watches."""
        self.nodes.close()
        self._broadcast.close()

    async def close(self) -> None:
        """Stop working; what is not delivered stays in the database."""
        if self._notices is not None and self._peers is not None:
            await self._notices.close()
            await self._peers.close()
        if self._chores is not None:
            await self._chores.close()
        if self._pursuing is not None:
            self._pursuing.cancel()
            await asyncio.gather(self._pursuing, return_exceptions=True)
        await self._standing.close()
        await self._pursuit.close()
        await self.nodes.settle()
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._outbox is not None:
            await self._decisions.close()
            with contextlib.suppress(Exception):
                await self.nodes.write_beats()
            await self._outbox.close()
        await self._store.close()

    def _follow(self, commit: Commit) -> None:
        self._roster.follow(commit)
        self._broadcast.follow(commit)
        if self._outbox is not None:
            self._outbox.feed(commit)

    async def _enforce_leases(self) -> None:
        self.nodes.cut_silent()
        if lost := await self.nodes.record_lost():
            log.warning("%d workers are lost with their nodes", len(lost))
            self._pursuit.kick()  # their descendants elsewhere

    async def _return_expired(self) -> None:
        now_us = self.clock()

        def run(tx: Tx) -> None:
            for contract_id, count in tx.return_expired(now_us).items():
                tx.record(events.reservations_returned(contract_id, count, now_us))

        await self._store.transact(run)

    async def _end_expired(self) -> None:
        # Each node does so by a timer of its own; this is for one that does not.
        await self.deaths.end_expired(EXPIRE_MARGIN_US)

    async def _tell_of_step(self) -> None:
        if not isinstance(self.clock, SteadyClock):
            return
        step_seconds = self.clock.step_seconds
        if abs(step_seconds - self._told_step_seconds) < STEP_SECONDS:
            return
        self._told_step_seconds = step_seconds
        event = events.clock_stepped(step_seconds, self.clock())
        await self._store.transact(lambda tx: tx.record(event))

    async def _stop_stillborn(self) -> None:
        await self.deaths.stop_stillborn(round(self.config.start_timeout_seconds * MICROSECONDS))

    async def _forget_old(self) -> None:
        before_us = self.clock() - round(self.config.request_retention_seconds * MICROSECONDS)
        await self._store.transact(lambda tx: tx.forget_before(before_us))
        if self._store.shared and self._outbox is not None and self._outbox.up:
            await self._outbox.deliver_left_over()

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(_logged(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _store_of(config: Config) -> Store:
    if config.database is None:
        return sqlite_store(config.database_file)
    return postgres_store(config.database, names.keep(config.name_file))


def _clock_of(config: Config) -> SteadyClock:
    """Return the clock of this boot.

    Controllers that share a database take the time from its server, for cooldowns
    that one begins must end alike for the others.

    Raises:
        OSError: The kept time cannot be read, or a new one not be kept.
        HayflickError: The database does not tell the time.
    """
    if config.database is None:
        return SteadyClock(anchor_seconds=anchor.keep(config.clock_file, boot_name(), time.time))
    from hayflick_controller.store import postgres

    wall = partial(postgres.wall_seconds, config.database)
    # What was kept while the database was its own is not the others' time.
    return SteadyClock(anchor_seconds=anchor.keep(config.clock_file, f"{boot_name()}/shared", wall))


async def _logged(work: Coroutine[object, object, None]) -> None:
    try:
        await work
    except Exception:
        log.exception("a background task failed")
