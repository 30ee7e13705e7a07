"""One connection's statements, and which of them wait to be written together.

What a decision writes, nobody reads again before its commit, as a rule. So such
writes wait here, and those of every transaction in a commit go to the database
as one list for each statement. Whatever asks the database something writes what
waits first, and so sees it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Connection, Executable, Insert

from hayflick_controller.store.prepared import NO_PARAMETERS, Parameters, Prepared, PreparedRows

INTRANS = 2
"""libpq's PQTRANS_INTRANS: in a transaction that may be committed."""

MIN_ARRAY_ROWS = 4
"""From how many rows on they go to PostgreSQL by columns."""

Merge = Callable[[list[Parameters]], list[Parameters]]
Later = Sequence[tuple[Executable, Merge | None]]
Waiting = list[tuple[Executable, Parameters]]


class LostTransaction(Exception):
    """The database gave up the transaction under us."""


class Spoilt(Exception):
    """What an earlier transaction of the commit left to be written could not be."""


class Driver:
    """Runs statements on the driver's connection beneath *connection*; raises the driver's own errors.

    Transactions stay *connection*'s.

    Args:
        connection: To the database.
        later: The statements that :meth:`later` takes, in the order in which they are written, which
            must come to the same as any in which they are asked for. Each with what makes
            its many rows fewer, if anything does.
    """

    def __init__(self, connection: Connection, later: Later = ()) -> None:
        self.connection = connection
        self._raw: Any = connection.connection.driver_connection
        self._prepared: dict[Executable, Prepared] = {}
        self._arrays = connection.dialect.name == "postgresql"
        self._at_once: dict[Executable, PreparedRows] = {}
        self._later = {statement: (place, merge) for place, (statement, merge) in enumerate(later)}
        self._waiting: Waiting = []  # of the transactions that have ended
        self._own: Waiting = []  # of the one under way
        self._saved = True  # whether what is written now can be taken back alone
        self.spoilt = False

    def one(self, statement: Executable, parameters: Parameters = NO_PARAMETERS) -> Any:  # noqa: ANN401
        """Return the one row that *statement* finds, or ``None``."""
        self.write_waiting()
        prepared = self._prepare(statement)
        values = self._execute(prepared, parameters).fetchone()
        return None if values is None else prepared.row(values)

    def all(self, statement: Executable, parameters: Parameters = NO_PARAMETERS) -> list[Any]:
        """Return every row that *statement* finds."""
        return self.gather([(statement, parameters)])[0]

    def gather(self, asked: Sequence[tuple[Executable, Parameters]]) -> list[list[Any]]:
        """Return every row that each statement finds, in one round trip where the database can."""
        self.write_waiting()
        prepared = [self._prepare(statement) for statement, _ in asked]
        with self._together(len(asked)):
            cursors = [self._execute(each, one[1]) for each, one in zip(prepared, asked, strict=True)]
        return [
            [each.row(values) for values in cursor.fetchall()]
            for each, cursor in zip(prepared, cursors, strict=True)
        ]

    def query(self, statement: Executable) -> Any:  # noqa: ANN401 -- rows by their columns' names
        """Run a statement that is put together for one occasion; return its result."""
        self.write_waiting()
        return self.connection.execute(statement)

    def run(self, statement: Executable, parameters: Parameters = NO_PARAMETERS) -> int:
        """Run *statement*; return how many rows it changed."""
        self.writing()
        return int(self._execute(self._prepare(statement), parameters).rowcount)

    def run_many(self, statement: Executable, rows: Sequence[Parameters]) -> None:
        """Run *statement* once with each of *rows*."""
        if rows:
            self.writing()
            self._execute_many(statement, rows)

    def later(self, statement: Executable, parameters: Parameters) -> None:
        """Run *statement* before anything is asked, and at the latest before the commit."""
        self._own.append((statement, parameters))

    def say(self, text: str) -> None:
        """Run SQL that binds nothing and finds nothing, such as SAVEPOINT."""
        self._raw.cursor().execute(text)

    def begin_commit(self) -> None:
        """Forget what an earlier commit may have left when it failed."""
        self._waiting, self._own = [], []
        self.spoilt = False

    def begin_job(self) -> None:
        """Begin what :meth:`take_back` takes back. Its savepoint is made only once it writes."""
        self._saved = False

    def writing(self) -> None:
        """Make the savepoint, if there is none, and write what waits; call it before writing otherwise.

        Raises:
            Spoilt: What waited of an earlier transaction could not be written.
        """
        self._write_earlier()
        if not self._saved:
            self.say("SAVEPOINT job")
            self._saved = True
        own, self._own = self._own, []
        self._write(own)

    def write_waiting(self) -> None:
        """Write what waits; what is asked after it sees it.

        Raises:
            LostTransaction: There is no transaction any more that it could be written in.
            Spoilt: What waited of an earlier transaction could not be written.
        """
        if self._own:
            self.writing()
        else:
            self._write_earlier()

    def end_job(self) -> None:
        """Keep what was written since :meth:`begin_job`.

        Raises:
            LostTransaction: There is no transaction any more that could keep it.
        """
        if self._saved:
            self.say("RELEASE SAVEPOINT job")
        elif not self._in_transaction():
            raise LostTransaction
        self._waiting += self._own
        self._own = []
        self._saved = True

    def take_back(self) -> None:
        """Undo what was written since :meth:`begin_job`; the transaction goes on.

        Raises:
            LostTransaction: It does not: the database undid more than that.
        """
        self._own = []
        if self._saved:
            self.say("ROLLBACK TO SAVEPOINT job")
            self.say("RELEASE SAVEPOINT job")
        elif not self._in_transaction():
            raise LostTransaction
        self._saved = True

    @property
    def broken(self) -> bool:
        """Whether the connection is lost."""
        return bool(getattr(self._raw, "closed", False))

    def _write_earlier(self) -> None:
        waiting, self._waiting = self._waiting, []
        try:
            self._write(waiting)
        except Exception as error:
            # Whoever asks now must not be told of it as of something of its own.
            self.spoilt = True
            raise Spoilt from error

    def _write(self, waiting: Waiting) -> None:
        if not waiting:
            return
        # SQLite would commit each by itself.
        if not self._in_transaction():
            raise LostTransaction
        rows: dict[Executable, list[Parameters]] = {}
        for statement, parameters in waiting:
            rows.setdefault(statement, []).append(parameters)
        with self._together(len(rows)):
            for statement in sorted(rows, key=lambda each: self._later[each][0]):
                merge = self._later[statement][1]
                self._execute_many(statement, merge(rows[statement]) if merge else rows[statement])

    def _together(self, count: int) -> contextlib.AbstractContextManager[Any]:
        """Send what is executed within without waiting for each answer, where the database can."""
        if count > 1 and hasattr(self._raw, "pipeline"):
            pipeline: contextlib.AbstractContextManager[Any] = self._raw.pipeline()
            return pipeline
        return contextlib.nullcontext()

    def _in_transaction(self) -> bool:
        # A statement that fails outside a savepoint fails the transaction, and
        # PostgreSQL then takes COMMIT for ROLLBACK and calls that a success.
        if hasattr(self._raw, "in_transaction"):  # sqlite3
            return bool(self._raw.in_transaction)
        return int(self._raw.info.transaction_status) == INTRANS

    def _execute(self, prepared: Prepared, parameters: Parameters) -> Any:  # noqa: ANN401 -- a cursor
        cursor = self._raw.cursor()
        cursor.execute(prepared.text, prepared.arguments(parameters))
        return cursor

    def _execute_many(self, statement: Executable, rows: Sequence[Parameters]) -> None:
        if self._arrays and isinstance(statement, Insert) and len(rows) >= MIN_ARRAY_ROWS:
            at_once = self._at_once.get(statement)
            if at_once is None:
                at_once = self._at_once[statement] = PreparedRows(statement)
            columns = at_once.arguments(rows)
            if columns is not None:
                self._raw.cursor().execute(at_once.text, columns)
                return
        prepared = self._prepare(statement)
        self._raw.cursor().executemany(prepared.text, [prepared.arguments(row) for row in rows])

    def _prepare(self, statement: Executable) -> Prepared:
        prepared = self._prepared.get(statement)
        if prepared is None:
            prepared = self._prepared[statement] = Prepared(statement, self.connection.dialect)
        return prepared


def summed(rows: list[Parameters]) -> list[Parameters]:
    """Return one row for each ``key``, with the sum of each other value: of what adds to a row."""
    sums: dict[Any, dict[str, Any]] = {}
    for row in rows:
        known = sums.get(row["key"])
        if known is None:
            sums[row["key"]] = dict(row)
            continue
        for name, value in row.items():
            if name != "key":
                known[name] += value
    return list(sums.values())
