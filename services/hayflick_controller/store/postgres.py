"""Everything about PostgreSQL that another database would do otherwise.

Several controllers may share one database. Their commits take turns, by one
advisory lock that each holds from its first statement to its commit: what
BEGIN IMMEDIATE is to SQLite. So every rule that holds because nothing else
writes meanwhile (no birth below a parent that ends, no birth past a latch that
is being engaged, no slot given back twice) holds between controllers too, and
two batches can never lock two contracts in each other's way. A controller that
stalls with the lock in its hand loses its session within
``IDLE_IN_TRANSACTION_SECONDS``.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import psycopg
import sqlalchemy
from psycopg import conninfo
from sqlalchemy import event, pool

from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_rpc.errors import HayflickError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hayflick_controller.store.protocol import Notice

SCHEMES = ("postgresql://", "postgres://")
CHANNEL = "hayflick"
CONNECT_TIMEOUT_SECONDS = 5
LOCK_TIMEOUT_SECONDS = 5.0
"""How long a transaction waits for its turn before its callers are told SERVICE_UNAVAILABLE."""
STATEMENT_TIMEOUT_SECONDS = 30.0
IDLE_IN_TRANSACTION_SECONDS = 3.0
"""How long a controller that stalls in a transaction can keep the others from theirs."""
UNANSWERED_MS = 10_000
"""How long a server may leave sent data unacknowledged before the connection counts as lost."""
MAX_NAMED = 100
"""How many workers a notice names; PostgreSQL takes payloads of less than 8,000 bytes."""


def check(url: str) -> None:
    """Refuse a URL that cannot be used, or that holds a password.

    Raises:
        ValueError: Without the URL in its text.
    """
    if not url.startswith(SCHEMES):
        raise ValueError(f"database: must begin with {SCHEMES[0]}")
    try:
        parts = conninfo.conninfo_to_dict(url)
    except psycopg.ProgrammingError:
        raise ValueError("database: is not a URL that libpq understands") from None
    if parts.keys() & {"password", "sslpassword"}:
        raise ValueError(
            "database: must hold no password, which others could read;"
            " put it in a password file (PGPASSFILE, or passfile=) or in a service file (service=)"
        )


def engine(url: str) -> sqlalchemy.Engine:
    """Return an engine over the database at *url*, which libpq completes from its files and environment."""

    def connect() -> psycopg.Connection[Any]:
        return psycopg.connect(
            url,
            connect_timeout=CONNECT_TIMEOUT_SECONDS,
            tcp_user_timeout=UNANSWERED_MS,
            fallback_application_name="hayflick_controller",
        )

    made = sqlalchemy.create_engine("postgresql+psycopg://", creator=connect, poolclass=pool.NullPool)
    event.listen(made, "connect", _set_up)
    event.listen(made, "begin", _take_turn)
    return made


def wall_seconds(url: str) -> float:
    """Return what time it is by the server's wall clock: Unix time, in seconds.

    Raises:
        HayflickError: SERVICE_UNAVAILABLE.
    """
    try:
        with psycopg.connect(url, connect_timeout=CONNECT_TIMEOUT_SECONDS) as connection:
            row = connection.execute("SELECT extract(epoch FROM clock_timestamp())").fetchone()
    except psycopg.Error as error:
        raise HayflickError(
            ErrorReason.ERROR_REASON_SERVICE_UNAVAILABLE,
            f"the database does not tell the time: {type(error).__name__}",
            metadata={"service": "database"},
        ) from error
    assert row is not None
    return float(row[0])


def set_durable(connection: sqlalchemy.Connection, durable: bool) -> None:
    """Do nothing: every commit waits for the disk.

    When a machine with SQLite loses power, its workers go with what it forgot.
    A database server that crashes leaves every worker running, so a birth or a
    death that it forgot would be one more than the contract allows.
    """
    del connection, durable


def claim(connection: sqlalchemy.Connection, controller_id: str) -> None:
    """Hold, for as long as the session lives, what shows that this controller does.

    Raises:
        OperationalError: Another process holds it for longer than ``LOCK_TIMEOUT_SECONDS``.
    """
    connection.exec_driver_sql("SELECT pg_advisory_lock(%s)", (_key(f"controller/{controller_id}"),))


def alive(connection: sqlalchemy.Connection, controller_id: str) -> bool:
    """Return whether another controller's session lives; if not, it begins none before we commit."""
    free = connection.exec_driver_sql(
        "SELECT pg_try_advisory_xact_lock(%s)", (_key(f"controller/{controller_id}"),)
    ).scalar()
    return not free


def tell(connection: sqlalchemy.Connection, controller_id: str, notices: Sequence[Notice]) -> None:
    """Tell the other controllers, when this transaction commits, what it changed."""
    workers = list(dict.fromkeys(name for notice in notices for name in notice.worker_ids))
    quarantines = list(dict.fromkeys(name for notice in notices for name in notice.quarantine_ids))
    while workers or quarantines:
        names, workers = workers[:MAX_NAMED], workers[MAX_NAMED:]
        room = MAX_NAMED - len(names)
        held, quarantines = quarantines[:room], quarantines[room:]
        payload = json.dumps({"c": controller_id, "w": names, "q": held}, separators=(",", ":"))
        connection.exec_driver_sql("SELECT pg_notify(%s, %s)", (CHANNEL, payload))


def _set_up(driver: psycopg.Connection[Any], record: object) -> None:
    del record
    for name, seconds in (
        ("lock_timeout", LOCK_TIMEOUT_SECONDS),
        ("statement_timeout", STATEMENT_TIMEOUT_SECONDS),
        ("idle_in_transaction_session_timeout", IDLE_IN_TRANSACTION_SECONDS),
    ):
        driver.execute("SELECT set_config(%s, %s, false)", (name, f"{round(seconds * 1_000)}ms"))
    # Everything that a decision reads has an index. A plan is kept for as long as the
    # session lives, and one that was made while a table was small would scan it for ever.
    # The price that this puts on a scan must not be taken for work worth compiling.
    for name in ("enable_seqscan", "jit"):
        driver.execute("SELECT set_config(%s, 'off', false)", (name,))
    # A stronger setting of the server's, such as remote_apply, stays.
    driver.execute(
        "SELECT set_config('synchronous_commit', 'on', false)"
        " WHERE current_setting('synchronous_commit') = 'off'"
    )
    driver.commit()


def turn(connection: sqlalchemy.Connection) -> int:
    """Return the number of the turn that was taken last: those of later commits are higher, whoever's."""
    return int(connection.info["turn"])


def _take_turn(connection: sqlalchemy.Connection) -> None:
    # READ COMMITTED: each statement after this one sees what the last turn committed. The
    # number is drawn with the lock in hand; the first migrations run before there are any.
    taken = connection.exec_driver_sql(
        "SELECT pg_advisory_xact_lock(%s), nextval(to_regclass('turns'))", (_key("commit"),)
    ).one()
    connection.info["turn"] = taken[1] or 0


def _key(name: str) -> int:
    """Return the 64-bit number that PostgreSQL knows the lock *name* by."""
    return int.from_bytes(hashlib.sha256(f"hayflick/{name}".encode()).digest()[:8], "big", signed=True)
