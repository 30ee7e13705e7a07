"""The store in SQL, on one thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from sqlalchemy import Connection, Engine, insert, select, update
from sqlalchemy.exc import DBAPIError

from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_controller.store import migrations, schema, sqlite
from hayflick_controller.store.part import Immutable
from hayflick_controller.store.prepared import Driver
from hayflick_controller.store.protocol import Commit, Identity, Tx
from hayflick_controller.store.thread import Job, Thread
from hayflick_controller.store.transaction import SqlTx
from hayflick_rpc.errors import HayflickError

if TYPE_CHECKING:
    from pathlib import Path

T = TypeVar("T")


class SqlStore:
    """A :class:`~hayflick_controller.store.protocol.Store` over SQLAlchemy Core.

    One thread runs all transactions, one after the other. SQLite allows no more
    anyway, and it makes the order of events that of commits, with no gaps.

    Transactions that wait at the same time are committed together. Each has a
    savepoint, so that one that raises takes nothing back but its own; each is
    told its outcome after the commit, so that nobody ever saw what a failed
    commit loses.

    Args:
        engine: Made by the dialect's module, such as
            :func:`hayflick_controller.store.sqlite.engine`.
        set_durable: Chooses whether the next commit waits for the disk.
    """

    def __init__(self, engine: Engine, set_durable: Callable[[Connection, bool], None]) -> None:
        self._engine = engine
        self._set_durable = set_durable
        self._thread = Thread(self._run)
        self._connection: Connection | None = None
        self._driver: Driver | None = None
        self._identity: Identity | None = None
        self._sequence = 0
        self._durable: bool | None = None
        self._immutable = Immutable()
        self._on_commit: Callable[[Commit], None] = lambda _: None

    @property
    def identity(self) -> Identity:
        """Who the controller is; known once the store is open."""
        if self._identity is None:
            raise RuntimeError("the store is not open")
        return self._identity

    async def open(self, on_commit: Callable[[Commit], None]) -> None:
        """See :meth:`Store.open <hayflick_controller.store.protocol.Store.open>`."""
        self._on_commit = on_commit
        await asyncio.to_thread(self._open)
        self._thread.start()

    async def transact(self, fn: Callable[[Tx], T], *, durable: bool = False) -> T:
        """See :meth:`Store.transact <hayflick_controller.store.protocol.Store.transact>`."""
        result: T = await self._thread.submit(fn, durable=durable)
        return result

    async def close(self) -> None:
        """See :meth:`Store.close <hayflick_controller.store.protocol.Store.close>`."""
        await self._thread.stop()
        await asyncio.to_thread(self._close)

    def _open(self) -> None:
        with self._errors():
            self._connection = self._engine.connect()
            self._driver = Driver(self._connection)
            self._choose_durable(durable=True)
            with self._connection.begin():
                migrations.upgrade(self._connection)
            with self._connection.begin():
                self._identity = _count_start(self._connection)

    def _run(self, jobs: list[Job]) -> None:
        """Run *jobs* in one commit."""
        assert self._connection is not None
        before = self._sequence
        try:
            with self._errors():
                self._choose_durable(durable=any(job.durable for job in jobs))
                with self._connection.begin():
                    for job in jobs:
                        self._attempt(job)
        except BaseException as error:  # noqa: BLE001 -- whatever it was, those who wait must be told
            self._sequence = before
            for job in jobs:
                job.error, job.told = job.error or error, None

    def _attempt(self, job: Job) -> None:
        """Run *job* in a savepoint; fill in what came of it.

        Raises:
            HayflickError: The database gave up the whole transaction.
        """
        assert self._driver is not None
        self._driver.say("SAVEPOINT job")
        tx = SqlTx(self._driver, self.identity.boot, self._sequence, self._immutable)
        try:
            with self._errors():
                job.value = job.work(tx)
                commit = tx.finish()
        except BaseException as error:  # noqa: BLE001 -- it is for whoever waits, not for this thread
            job.error = error
            # Fails where the database undid more than the statement that
            # failed (a full disk): then nothing of this batch holds.
            self._driver.say("ROLLBACK TO SAVEPOINT job")
            self._driver.say("RELEASE SAVEPOINT job")
            return
        self._driver.say("RELEASE SAVEPOINT job")
        self._sequence = tx.sequence
        if commit.events or commit.workers:
            # Told by the thread, and not by whoever awaits the result: that one
            # may be cancelled, and the order must be that of commits.
            job.told = partial(self._on_commit, commit)

    def _choose_durable(self, *, durable: bool) -> None:
        assert self._connection is not None
        if durable is not self._durable:
            self._set_durable(self._connection, durable)
            self._durable = durable

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._engine.dispose()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (DBAPIError, self._engine.dialect.loaded_dbapi.Error) as error:
            # Its text may hold a statement's values; the cause stays in our log.
            name = type(error.orig if isinstance(error, DBAPIError) else error).__name__
            raise HayflickError(
                ErrorReason.ERROR_REASON_SERVICE_UNAVAILABLE,
                f"the database refused: {name}",
                metadata={"service": "database"},
            ) from error


def sqlite_store(path: Path | None) -> SqlStore:
    """Return a store in the SQLite file at *path*, or in memory for ``None``.

    Raises:
        OSError: The file or its directory cannot be made safe.
    """
    if path is not None:
        sqlite.prepare_file(path)
    return SqlStore(sqlite.engine(path), sqlite.set_durable)


def _count_start(connection: Connection) -> Identity:
    row = connection.execute(select(schema.identity)).one_or_none()
    if row is None:
        started = Identity(secrets.token_hex(8), 1)
        connection.execute(
            insert(schema.identity), {"controller_id": started.controller_id, "boot": started.boot}
        )
        return started
    started = Identity(row.controller_id, row.boot + 1)
    connection.execute(update(schema.identity).values(boot=started.boot))
    return started
