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

from sqlalchemy import BigInteger, Boolean, Dialect, Executable, Insert, Integer, LargeBinary, Select, String
from sqlalchemy.sql.compiler import SQLCompiler

Convert = Callable[[Any], Any]
Parameters = Mapping[str, Any]

NO_PARAMETERS: Parameters = {}


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


class PreparedRows:
    """An INSERT of many rows as one statement of PostgreSQL's, which takes each column as an array.

    Measured, it takes a third of the time of a statement for each row, on either side.

    Args:
        statement: Into a table with a column of each of its values.
    """

    # Without a length: a cast to one would cut what is too long, where the column refuses it.
    _TYPES = (
        (String, "text"),
        (LargeBinary, "bytea"),
        (BigInteger, "bigint"),
        (Integer, "integer"),
        (Boolean, "boolean"),
    )

    def __init__(self, statement: Insert) -> None:
        table: Any = statement.table
        self._names = tuple(table.columns.keys())
        arrays = ", ".join(f"%b::{self._type(column.type)}[]" for column in table.columns)
        names = ", ".join(self._names)
        self.text = f"INSERT INTO {table.name} ({names}) SELECT * FROM unnest({arrays})"  # noqa: S608 -- ours

    def arguments(self, rows: Sequence[Parameters]) -> list[list[Any]] | None:
        """Return the columns of *rows*; ``None`` where one holds nothing that shows its type."""
        columns = [[row[name] for row in rows] for name in self._names]
        if any(all(value is None for value in column) for column in columns):
            return None
        return columns

    def _type(self, of: object) -> str:
        return next(name for kind, name in self._TYPES if isinstance(of, kind))
