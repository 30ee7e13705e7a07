"""Pure: what the index remembers of an entry, and which entries a filter lets through.

A filter is said twice, in SQL for what is on disk and in Python for what is
still in memory; the tests hold one against the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from hayflick_logger import entries
from hayflick_rpc import events

_IDS = ("contract_id", "worker_id", "root_id")


@dataclass(frozen=True)
class Filter:
    """Which entries; each condition that is given must hold. Instants are (seconds, nanos) of Unix time."""

    contract_id: str = ""
    worker_id: str = ""
    root_id: str = ""
    events: tuple[str, ...] = ()
    start: tuple[int, int] | None = None
    end: tuple[int, int] | None = None


class Row(NamedTuple):
    """What the index remembers of one entry."""

    entry_index: int
    source: str
    sequence: int
    event: str
    contract_id: str
    worker_id: str
    root_id: str
    seconds: int
    nanos: int


def row_of(index: int, entry: bytes) -> Row:
    """Return the row of the *entry* at *index*.

    Raises:
        BadEntry: it is not one.
    """
    fields: dict[str, Any] = dict(entries.document(entry, index))
    event = fields["event"]
    ids = (event.get("contract_id", ""), event.get("worker_id", ""), event.get("root_id", ""))
    instant = events.unix_time(event["timestamp"])
    return Row(index, fields["source"], fields["sequence"], event["event"], *ids, *instant)


def allows(wanted: Filter, row: Row) -> bool:
    """Return whether *wanted* lets the entry of *row* through."""
    instant = (row.seconds, row.nanos)
    return (
        wanted.contract_id in ("", row.contract_id)
        and wanted.worker_id in ("", row.worker_id)
        and wanted.root_id in ("", row.root_id)
        and (not wanted.events or row.event in wanted.events)
        and (wanted.start is None or instant >= wanted.start)
        and (wanted.end is None or instant < wanted.end)
    )


def conditions(wanted: Filter) -> tuple[list[str], list[object]]:
    """Return the SQL of *wanted*, to be joined by AND, and the values bound in it."""
    texts: list[str] = []
    values: list[object] = []
    for column in _IDS:
        if value := getattr(wanted, column):
            texts.append(f"{column} = ?")
            values.append(value)
    if wanted.events:
        texts.append(f"event IN ({', '.join('?' * len(wanted.events))})")
        values += wanted.events
    if wanted.start is not None:
        texts.append("(seconds, nanos) >= (?, ?)")
        values += wanted.start
    if wanted.end is not None:
        texts.append("(seconds, nanos) < (?, ?)")
        values += wanted.end
    return texts, values
