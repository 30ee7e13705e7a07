"""An entry of the record as a program reads it. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class BadEntry(Exception):
    """Bytes that are not an entry of this kind of log."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry; docs/events.md says what each kind holds.

    Attributes:
        index: Its place in the log.
        source: Who sent it.
        sequence: Its number at its source, from 1.
        kind: The event's name, or for an ``audit`` event its decision.
        timestamp_us: When, by its source's clock, in microseconds since the Unix epoch.
        contract_id: What it is about; "" where it is about none, here and below.
        worker_id: The worker.
        parent_id: The worker's parent.
        root_id: The root of its family.
        details: The rest.
    """

    index: int
    source: str
    sequence: int
    kind: str
    timestamp_us: int
    contract_id: str = ""
    worker_id: str = ""
    parent_id: str = ""
    root_id: str = ""
    details: Mapping[str, Any] = ()  # type: ignore[assignment]

    def text(self, name: str) -> str:
        """Return a detail that is text; "" when it is not there."""
        value = self.details.get(name, "")
        return value if isinstance(value, str) else ""

    def number(self, name: str) -> float:
        """Return a detail that is a number.

        Raises:
            BadEntry: It is not there, or none.
        """
        value = self.details.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BadEntry(f"{self.kind} has no number {name}")
        return value


def parse(data: bytes) -> Entry:
    """Return the entry in *data*, which is JSON as the log holds it.

    Raises:
        BadEntry: It is not an entry of this log's kind.
    """
    try:
        fields = json.loads(data)
        event = fields["event"]
        details = event.get("details", {})
        if not isinstance(details, dict):
            raise BadEntry("its details are no object")
        decision = details.get("decision", "") if event["event"] == "audit" else ""
        return Entry(
            index=int(fields["index"]),
            source=str(fields["source"]),
            sequence=int(fields["sequence"]),
            kind=str(decision or event["event"]),
            timestamp_us=instant_us(event["timestamp"]),
            contract_id=str(event.get("contract_id", "")),
            worker_id=str(event.get("worker_id", "")),
            parent_id=str(event.get("parent_id", "")),
            root_id=str(event.get("root_id", "")),
            details=details,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadEntry("it is not an entry of this log's kind") from error


def instant_us(text: str) -> int:
    """Return an RFC 3339 instant in microseconds since the Unix epoch; finer digits are cut.

    Raises:
        ValueError: It is none.
    """
    return (datetime.fromisoformat(text) - _EPOCH) // _MICROSECOND
