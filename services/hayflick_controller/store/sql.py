"""The store in SQL, on one thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from sqlalchemy import Connection, Engine, insert, select, update
from sqlalchemy.exc import DBAPIError

from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_controller.store import migrations, schema, sqlite
from hayflick_controller.store.protocol import Commit, Identity, Tx
from hayflick_controller.store.transaction import SqlTx
from hayflick_rpc.errors import HayflickError

if TYPE_CHECKING:
    from pathlib import Path

    from hayflick_controller.model import StopCondition

T = TypeVar("T")

STACK_BYTES = 16 * 1024 * 1024
"""The database's thread evaluates CEL, which is recursive; its stack must not depend on ulimit."""

_stack_lock = threading.Lock()


class SqlStore:
    """A :class:`~hayflick_controller.store.protocol.Store` over SQLAlchemy Core.

    One thread runs all transactions, one after the other. SQLite allows no more
    anyway, and it makes the order of events that of commits, with no gaps.

    Args:
        engine: Made by the dialect's module, such as
            :func:`hayflick_controller.store.sqlite.engine`.
        set_durable: Chooses whether the next commit waits for the disk.
    """

    def __init__(self, engine: Engine, set_durable: Callable[[Connection, bool], None]) -> None:
        self._engine = engine
        self._set_durable = set_durable
        self._executor = _executor()
        self._connection: Connection | None = None
        self._identity: Identity | None = None
        self._sequence = 0
        self._durable: bool | None = None
        self._conditions: dict[str, tuple[StopCondition, ...]] = {}
        self._on_commit: Callable[[Commit], None] = lambda _: None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def identity(self) -> Identity:
        """Who the controller is; known once the store is open."""
        if self._identity is None:
            raise RuntimeError("the store is not open")
        return self._identity

    async def open(self, on_commit: Callable[[Commit], None]) -> None:
        """See :meth:`Store.open <hayflick_controller.store.protocol.Store.open>`."""
        self._on_commit = on_commit
        self._loop = asyncio.get_running_loop()
        await self._loop.run_in_executor(self._executor, self._open)

    async def transact(self, fn: Callable[[Tx], T], *, durable: bool = False) -> T:
        """See :meth:`Store.transact <hayflick_controller.store.protocol.Store.transact>`."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._run, fn, durable)

    async def close(self) -> None:
        """See :meth:`Store.close <hayflick_controller.store.protocol.Store.close>`."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._executor, self._close)
        self._executor.shutdown()

    def _open(self) -> None:
        with _errors():
            self._connection = self._engine.connect()
            self._choose_durable(durable=True)
            with self._connection.begin():
                migrations.upgrade(self._connection)
            with self._connection.begin():
                self._identity = _count_start(self._connection)

    def _run(self, fn: Callable[[Tx], T], durable: bool) -> T:
        assert self._connection is not None
        assert self._loop is not None
        with _errors():
            self._choose_durable(durable=durable)
            with self._connection.begin():
                tx = SqlTx(self._connection, self.identity.boot, self._sequence, self._conditions)
                result = fn(tx)
                commit = tx.finish()
            self._sequence = tx.sequence
        if commit.events or commit.workers:
            # From here, and not where the result is awaited: the one who
            # awaits may be cancelled, and the order must be that of commits.
            self._loop.call_soon_threadsafe(self._on_commit, commit)
        return result

    def _choose_durable(self, *, durable: bool) -> None:
        assert self._connection is not None
        if durable is not self._durable:
            self._set_durable(self._connection, durable)
            self._durable = durable

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._engine.dispose()


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


def _executor() -> ThreadPoolExecutor:
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="database")
    with _stack_lock:
        previous = threading.stack_size(STACK_BYTES)
        try:
            executor.submit(lambda: None).result()  # starts the thread now, with this stack
        finally:
            threading.stack_size(previous)
    return executor


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        # Its text may hold a statement's values; the cause stays in our log.
        raise HayflickError(
            ErrorReason.ERROR_REASON_SERVICE_UNAVAILABLE,
            f"the database refused: {type(error.orig).__name__}",
            metadata={"service": "database"},
        ) from error
