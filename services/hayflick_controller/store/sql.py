"""The store in SQL, on one thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Connection, func, insert, select, update
from sqlalchemy.exc import DBAPIError

from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_controller.store import ahead, migrations, schema
from hayflick_controller.store.database import Database, postgres_database, sqlite_database
from hayflick_controller.store.driver import Driver, LostTransaction, Spoilt
from hayflick_controller.store.known import Immutable, Known
from hayflick_controller.store.outbox import QUEUED
from hayflick_controller.store.protocol import NO_NEEDS, Commit, Identity, Needs, Queued, Tx
from hayflick_controller.store.thread import Job, Run, Thread
from hayflick_controller.store.transaction import LATER, SqlTx
from hayflick_rpc.errors import HayflickError

if TYPE_CHECKING:
    from pathlib import Path

T = TypeVar("T")

RECONNECT_SECONDS = 0.5
"""How long after a failure to connect every transaction is refused at once."""
MAX_UNTOLD = 100_000
"""More events than any one commit holds."""

log = logging.getLogger(__name__)


class SqlStore:
    """A :class:`~hayflick_controller.store.protocol.Store` over SQLAlchemy Core.

    One thread runs all transactions, one after the other. SQLite allows no more
    anyway, and it makes the order of events that of commits, with no gaps.
    Where controllers share a database, their commits take turns.

    Transactions that wait at the same time are committed together. What one that
    raises has written is taken back alone, by a savepoint, or was not written
    yet; each is told its outcome after the commit, so that nobody ever saw what a
    failed commit loses. What most of them read is read for all of them at once
    (:mod:`~hayflick_controller.store.ahead`), and what most of them write is written for all
    of them at the end (:mod:`~hayflick_controller.store.driver`). Where that fails, nobody can
    tell by whose fault: they are run again, each with what it writes.

    A connection that is lost is made anew by the next transaction. Whether a
    commit that was under way then holds is read from the outbox: its callers
    were told SERVICE_UNAVAILABLE and find its answer when they ask again, and
    its events go out as if nothing had happened.

    Args:
        database: Which one.
        thread: Makes what runs the transactions.
    """

    def __init__(self, database: Database, thread: Callable[[Run], Thread] = Thread) -> None:
        self._database = database
        self._thread = thread(self._run)
        self._connection: Connection | None = None
        self._driver: Driver | None = None
        self._identity: Identity | None = None
        self._sequence = 0
        self._durable: bool | None = None
        self._immutable = Immutable()
        self._on_commit: Callable[[Commit], None] = lambda _: None
        self._untold: Commit | None = None
        self._retry_at = 0.0

    @property
    def identity(self) -> Identity:
        """Who the controller is; known once the store is open."""
        if self._identity is None:
            raise RuntimeError("the store is not open")
        return self._identity

    @property
    def shared(self) -> bool:
        """Whether other controllers may work on the same database."""
        return bool(self._database.controller_id)

    async def open(self, on_commit: Callable[[Commit], None]) -> None:
        """See :meth:`Store.open <hayflick_controller.store.protocol.Store.open>`."""
        self._on_commit = on_commit
        await asyncio.to_thread(self._open)
        self._thread.start()

    async def transact(self, fn: Callable[[Tx], T], *, durable: bool = False, needs: Needs = NO_NEEDS) -> T:
        """See :meth:`Store.transact <hayflick_controller.store.protocol.Store.transact>`."""
        result: T = await self._thread.submit(fn, durable=durable, needs=needs)
        return result

    async def close(self) -> None:
        """See :meth:`Store.close <hayflick_controller.store.protocol.Store.close>`."""
        await self._thread.stop()
        await asyncio.to_thread(self._close)

    def _open(self) -> None:
        with self._errors():
            self._connect()

    def _connect(self) -> None:
        """Connect; count this start, or go on where a lost connection left off."""
        self._connection = self._database.engine.connect()
        self._driver = Driver(self._connection, LATER)
        self._durable = None
        self._choose_durable(durable=True)
        if self._identity is not None:
            with self._connection.begin():  # its turn comes when what was under way has ended
                self._database.claim(self._connection, self._identity.controller_id)
                self._take_up(self._identity)
            return
        with self._connection.begin():
            migrations.upgrade(self._connection)
        with self._connection.begin():
            if self._database.controller_id:
                self._database.claim(self._connection, self._database.controller_id)
            identity = _count_start(self._connection, self._database.controller_id)
        self._identity = identity

    def _take_up(self, identity: Identity) -> None:
        """Find the events of a commit whose outcome was never heard."""
        assert self._driver is not None
        after = Queued.position_of(identity.boot, self._sequence)
        found = self._driver.all(
            QUEUED, {"whose": identity.controller_id, "after": after, "limit": MAX_UNTOLD}
        )
        events = tuple(Queued(row.position, row.body) for row in found)
        if events:
            log.warning("%d events were committed as the connection was lost", len(events))
            self._sequence = events[-1].sequence
            self._untold = Commit(events)

    def _run(self, jobs: list[Job]) -> None:
        """Run *jobs* in one commit."""
        before: int | None = None
        try:
            with self._errors():
                self._require_connection()
                before = self._sequence
                try:
                    self._commit(jobs, together=True)
                except Spoilt as error:
                    self._require_unbroken(error)
                    self._sequence = before
                    self._commit(jobs, together=False)
        except BaseException as error:  # noqa: BLE001 -- whatever it was, those who wait must be told
            if before is not None:
                self._sequence = before
            for job in jobs:
                job.error, job.told = job.error or error, None
            self._drop_lost()
            return
        if self._untold is not None:
            jobs[0].told = partial(_tell_both, partial(self._on_commit, self._untold), jobs[0].told)
            self._untold = None

    def _commit(self, jobs: list[Job], *, together: bool) -> None:
        """Run *jobs* and commit them; *together*, or each apart from the faults of the others.

        Raises:
            Spoilt: Something of one of them could not be read or written, and they ran together.
        """
        assert self._connection is not None
        assert self._driver is not None
        self._choose_durable(durable=any(job.durable for job in jobs))
        self._driver.begin_commit()
        with self._connection.begin():
            known = self._read_ahead(jobs) if together else Known(self._immutable)
            commits = [commit for job in jobs if (commit := self._attempt(job, known, together)) is not None]
            self._driver.write_waiting()
            self._database.tell(
                self._connection, self.identity.controller_id, [commit.notice for commit in commits]
            )

    def _read_ahead(self, jobs: list[Job]) -> Known:
        needs = [job.needs for job in jobs if job.needs != NO_NEEDS]
        if not needs:
            return Known(self._immutable)
        assert self._driver is not None
        try:
            return ahead.read(self._driver, needs, self._immutable)
        except Exception as error:
            raise Spoilt from error

    def _attempt(self, job: Job, known: Known, together: bool) -> Commit | None:
        """Run *job*, to be taken back alone; fill in what came of it.

        Raises:
            HayflickError: The database gave up the whole transaction.
            Spoilt: It is the whole transaction's fault.
        """
        assert self._driver is not None
        self._driver.begin_job()
        assert self._connection is not None
        job.value, job.error, job.told = None, None, None
        turn = self._database.turn(self._connection)
        tx = SqlTx(self._driver, self.identity, self._sequence, known, self._is_alive, turn=turn)
        try:
            with self._errors():
                job.value = job.work(tx)
                commit = tx.finish()
                if not together:
                    self._driver.write_waiting()
        except BaseException as error:
            if self._driver.spoilt:
                raise Spoilt from error
            job.error = error  # it is for whoever waits, not for this thread
            # Fails where the database undid more than the statement that
            # failed (a full disk): then nothing of this batch holds.
            self._driver.take_back()
            return None
        if self._driver.spoilt:  # and the job took the error for its own
            raise Spoilt
        self._driver.end_job()
        tx.keep()
        self._sequence = tx.sequence
        if commit.events or commit.workers:
            # Told by the thread, and not by whoever awaits the result: that one
            # may be cancelled, and the order must be that of commits.
            job.told = partial(self._on_commit, commit)
        return commit

    def _is_alive(self, controller_id: str) -> bool:
        assert self._connection is not None
        return self._database.alive(self._connection, controller_id)

    def _choose_durable(self, *, durable: bool) -> None:
        assert self._connection is not None
        if durable is not self._durable:
            self._database.set_durable(self._connection, durable)
            self._durable = durable

    def _require_connection(self) -> None:
        """Connect anew where the connection was lost.

        Raises:
            HayflickError: SERVICE_UNAVAILABLE, at once for a while after each failure.
        """
        if self._connection is not None:
            return
        if time.monotonic() < self._retry_at:
            raise _unavailable("is not connected")
        try:
            self._connect()
        except BaseException:
            self._retry_at = time.monotonic() + RECONNECT_SECONDS
            self._close_connection()
            raise
        log.warning("connected to the database again")

    def _require_unbroken(self, error: Spoilt) -> None:
        """Raise why what ran together failed, where running it again cannot help."""
        assert self._driver is not None
        if self._driver.broken and error.__cause__ is not None:
            raise error.__cause__

    def _drop_lost(self) -> None:
        if self._driver is not None and self._driver.broken:
            log.warning("the connection to the database is lost")
            self._close_connection()

    def _close_connection(self) -> None:
        connection, self._connection, self._driver = self._connection, None, None
        if connection is not None:
            with contextlib.suppress(Exception):  # of a connection that is lost
                connection.close()

    def _close(self) -> None:
        self._close_connection()
        self._database.engine.dispose()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (DBAPIError, self._database.engine.dialect.loaded_dbapi.Error) as error:
            # Its text may hold a statement's values; the cause stays in our log.
            name = type(error.orig if isinstance(error, DBAPIError) else error).__name__
            raise _unavailable(f"refused: {name}") from error
        except LostTransaction as error:
            raise _unavailable("gave up the transaction") from error


def sqlite_store(path: Path | None) -> SqlStore:
    """Return a store in the SQLite file at *path*, or in memory for ``None``.

    Raises:
        OSError: The file or its directory cannot be made safe.
    """
    return SqlStore(sqlite_database(path))


def postgres_store(url: str, controller_id: str) -> SqlStore:
    """Return a store in the PostgreSQL database at *url*, for the controller *controller_id*."""
    return SqlStore(postgres_database(url, controller_id))


def _count_start(connection: Connection, controller_id: str) -> Identity:
    identity = schema.identity
    boot = (connection.execute(select(func.max(identity.c.boot))).scalar() or 0) + 1
    if not controller_id:  # the only one on its database
        controller_id = connection.execute(select(identity.c.controller_id)).scalar() or secrets.token_hex(8)
    started = Identity(controller_id, boot)
    own = identity.c.controller_id == controller_id
    if not connection.execute(update(identity).where(own).values(boot=boot)).rowcount:
        connection.execute(insert(identity), {"controller_id": controller_id, "boot": boot})
    return started


def _tell_both(first: Callable[[], Any], then: Callable[[], Any] | None) -> None:
    first()
    if then is not None:
        then()


def _unavailable(what: str) -> HayflickError:
    return HayflickError(
        ErrorReason.ERROR_REASON_SERVICE_UNAVAILABLE,
        f"the database {what}",
        metadata={"service": "database"},
    )
