"""Statements compiled once and run on the driver's own cursor.

SQLAlchemy's ``Connection.execute`` builds a context, a result and a row object
for every statement, also when the compiled form is cached: measured, eight
times the CPU that SQLite needs for the statement itself. A birth runs some
twenty statements. So the statements of decisions are written in Core, which
keeps them portable and checked against the schema, and only their execution is
done here; what a type needs on its way in and out is still asked of the dialect.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Dialect, Executable, Select
from sqlalchemy.sql.compiler import SQLCompiler

Convert = Callable[[Any], Any]
Parameters = Mapping[str, Any]

NO_PARAMETERS: Parameters = {}


INTRANS = 2
"""libpq's PQTRANS_INTRANS: in a transaction that may be committed."""


class LostTransaction(Exception):
    """The database gave up the transaction under us."""


class Prepared:
    """One statement in the words of one dialect.

    Args:
        statement: Must bind by name and hold no expanding parameter.
        dialect: Of the connection that it will be run on.
    """

    def __init__(self, statement: Executable, dialect: Dialect) -> None:
        compiled = statement.compile(dialect=dialect)  # type: ignore[attr-defined]  # every one that we write
        assert isinstance(compiled, SQLCompiler)
        self.text = str(compiled)
        # Literals in the statement are parameters too, with values of their own.
        self._literals = {name: value for name, value in compiled.params.items() if value is not None}
        self._order = tuple(compiled.positiontup or ()) if compiled.positional else None
        self._binds: list[tuple[str, Convert]] = []
        for bind, name in compiled.bind_names.items():
            convert = bind.type.dialect_impl(dialect).bind_processor(dialect)
            if convert is not None:
                self._binds.append((name, convert))
        self._row: Callable[[Sequence[Any]], Any] = tuple
        self._results: list[tuple[int, Convert]] = []
        if isinstance(statement, Select):
            columns = statement.selected_columns
            row: Any = namedtuple("Row", columns.keys())  # type: ignore[misc]  # noqa: PYI024
            self._row = row._make
            for place, column in enumerate(columns):
                convert = column.type.dialect_impl(dialect).result_processor(dialect, None)
                if convert is not None:
                    self._results.append((place, convert))

    def arguments(self, parameters: Parameters) -> Sequence[Any] | Mapping[str, Any]:
        """Return *parameters* as the driver wants them: in order, or by name."""
        values = {**self._literals, **parameters} if self._literals or self._binds else parameters
        for name, convert in self._binds:
            values[name] = convert(values[name])  # type: ignore[index]  # our own copy
        return values if self._order is None else [values[name] for name in self._order]

    def row(self, values: Sequence[Any]) -> Any:  # noqa: ANN401 -- its fields are the statement's columns
        """Return what the driver fetched as a named tuple."""
        if self._results:
            values = list(values)
            for place, convert in self._results:
                values[place] = convert(values[place])
        return self._row(values)


class Driver:
    """Runs statements on the driver's connection beneath *connection*; raises the driver's own errors.

    Transactions stay *connection*'s.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._raw: Any = connection.connection.driver_connection
        self._prepared: dict[Executable, Prepared] = {}
        self._saved = True  # whether what is written now can be taken back alone

    def one(self, statement: Executable, parameters: Parameters = NO_PARAMETERS) -> Any:  # noqa: ANN401
        """Return the one row that *statement* finds, or ``None``."""
        prepared = self._prepare(statement)
        values = self._execute(prepared, parameters).fetchone()
        return None if values is None else prepared.row(values)

    def all(self, statement: Executable, parameters: Parameters = NO_PARAMETERS) -> list[Any]:
        """Return every row that *statement* finds."""
        prepared = self._prepare(statement)
        return [prepared.row(values) for values in self._execute(prepared, parameters).fetchall()]

    def run(self, statement: Executable, parameters: Parameters = NO_PARAMETERS) -> int:
        """Run *statement*; return how many rows it changed."""
        self.writing()
        return int(self._execute(self._prepare(statement), parameters).rowcount)

    def run_many(self, statement: Executable, rows: Sequence[Parameters]) -> None:
        """Run *statement* once with each of *rows*."""
        if rows:
            self.writing()
            prepared = self._prepare(statement)
            self._raw.cursor().executemany(prepared.text, [prepared.arguments(row) for row in rows])

    def say(self, text: str) -> None:
        """Run SQL that binds nothing and finds nothing, such as SAVEPOINT."""
        self._raw.cursor().execute(text)

    def begin_job(self) -> None:
        """Begin what :meth:`take_back` takes back. Its savepoint is made only once it writes."""
        self._saved = False

    def writing(self) -> None:
        """Make the savepoint, if there is none; call it before writing by :attr:`connection`."""
        if not self._saved:
            self.say("SAVEPOINT job")
            self._saved = True

    def end_job(self) -> None:
        """Keep what was written since :meth:`begin_job`.

        Raises:
            LostTransaction: There is no transaction any more that could keep it.
        """
        if self._saved:
            self.say("RELEASE SAVEPOINT job")
        elif not self._in_transaction():
            raise LostTransaction

    def take_back(self) -> None:
        """Undo what was written since :meth:`begin_job`; the transaction goes on.

        Raises:
            LostTransaction: It does not: the database undid more than that.
        """
        if self._saved:
            self.say("ROLLBACK TO SAVEPOINT job")
            self.say("RELEASE SAVEPOINT job")
        elif not self._in_transaction():
            raise LostTransaction

    @property
    def broken(self) -> bool:
        """Whether the connection is lost."""
        return bool(getattr(self._raw, "closed", False))

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

    def _prepare(self, statement: Executable) -> Prepared:
        prepared = self._prepared.get(statement)
        if prepared is None:
            prepared = self._prepared[statement] = Prepared(statement, self.connection.dialect)
        return prepared
