"""One entry of the log: the bytes that are a leaf of its tree. Pure.

An entry is the RFC 8785 JSON of ``{event, index, sequence, source}``.
docs/record.md works one out by hand.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from hayflick.v1 import logger_pb2
from hayflick_rpc import events
from hayflick_tlog.merkle import leaf_hash

if TYPE_CHECKING:
    from collections.abc import Mapping

# RFC 8785 numbers are doubles; beyond this, neighbours would look alike.
MAX_SEQUENCE = 2**53 - 1


class BadEntry(Exception):
    """Bytes that are no entry."""


def compose(index: int, source: str, sequence: int, event: bytes) -> bytes:
    """Return the entry at *index*.

    Args:
        index: Its place in the record.
        source: Who sent it; of the form that :func:`hayflick_rpc.events.require_source` allows,
            hence without a character that JSON escapes.
        sequence: Its number at its source.
        event: What :func:`hayflick_rpc.events.to_json` made of the event.
    """
    tail = b',"index":%d,"sequence":%d,"source":"%s"}' % (index, sequence, source.encode("ascii"))
    return b'{"event":' + event + tail


def document(entry: bytes, index: int) -> Mapping[str, object]:
    """Return the JSON of the entry at *index*.

    Raises:
        BadEntry: it is not an entry, or states another place.
    """
    try:
        fields = json.loads(entry)
        stated = fields["index"]
    except (ValueError, TypeError, KeyError) as error:
        raise BadEntry(f"entry {index} is not an entry: {error}") from error
    if stated != index or not isinstance(fields.get("event"), dict):
        raise BadEntry(f"entry {index} is out of place")
    return dict(fields)


def event_bytes(entry: bytes) -> bytes:
    """Return the canonical JSON of the event in an *entry* that :func:`compose` made.

    Parses nothing: behind the event come an index, a sequence and a source,
    and none of them can look like the key of the first.
    """
    return entry.rpartition(b',"index":')[0].removeprefix(b'{"event":')


def parse(entry: bytes, index: int) -> logger_pb2.RecordedEvent:
    """Return the entry at *index* for the wire.

    Raises:
        BadEntry: it is not one.
    """
    fields = document(entry, index)
    try:
        return logger_pb2.RecordedEvent(
            index=index,
            source=str(fields["source"]),
            sequence=int(str(fields["sequence"])),
            event=events.from_document(fields["event"]),
            hash=leaf_hash(entry),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise BadEntry(f"entry {index} is not an entry: {error}") from error
