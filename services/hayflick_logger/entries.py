"""One entry of the journal: its line, its hash, and whether it follows from the one before.

Pure. A line is the RFC 8785 JSON of ``{event, hash, index, sequence, source}``
and a newline. The hash is SHA-256 over the hash of the entry before (32 bytes;
zeros before the first) and the RFC 8785 JSON of the entry without its hash.
docs/events.md works it out by hand.
"""

from __future__ import annotations

import hashlib
import json

from hayflick.v1 import logger_pb2
from hayflick_rpc import events

HASH_BYTES = 32
GENESIS = bytes(HASH_BYTES)
# RFC 8785 numbers are doubles; beyond this, neighbours would look alike.
MAX_SEQUENCE = 2**53 - 1

_HEX_CHARS = 2 * HASH_BYTES
_HASH_KEY = b',"hash":"'


class BadEntry(Exception):
    """A line that is no entry, or does not follow from the one before it."""


def compose(index: int, source: str, sequence: int, event: bytes, previous: bytes) -> tuple[bytes, bytes]:
    """Return the line, and the hash, of the entry at *index*.

    Args:
        index: Its place in the record.
        source: Who sent it; of the form that :func:`hayflick_rpc.events.require_source` allows,
            hence without a character that JSON escapes.
        sequence: Its number at its source.
        event: What :func:`hayflick_rpc.events.to_json` made of the event.
        previous: The hash of the entry before, or GENESIS.
    """
    head = b'{"event":' + event
    tail = b',"index":%d,"sequence":%d,"source":"%s"}' % (index, sequence, source.encode("ascii"))
    digest = hashlib.sha256(previous + head + tail)
    return head + _HASH_KEY + digest.hexdigest().encode() + b'"' + tail + b"\n", digest.digest()


def check(line: bytes, index: int, previous: bytes) -> bytes:
    """Return the hash of the entry in *line*, having recomputed it.

    Parses nothing: the hash is over bytes, and only its own place in the line
    must be found. Nothing after it can look like it, for an index, a sequence
    and a source hold no quoted key.

    Raises:
        BadEntry: *line* is not the entry at *index* that follows *previous*.
    """
    head, key, rest = line.rpartition(_HASH_KEY)
    stated, tail = rest[:_HEX_CHARS], rest[_HEX_CHARS + 1 : -1]
    if not key or not line.endswith(b"}\n") or rest[_HEX_CHARS : _HEX_CHARS + 1] != b'"':
        raise BadEntry(f"entry {index} is not an entry")
    if not head.startswith(b'{"event":{') or not tail.startswith(b',"index":%d,"sequence":' % index):
        raise BadEntry(f"entry {index} is out of place")
    digest = hashlib.sha256(previous + head + tail)
    if digest.hexdigest().encode() != stated:
        raise BadEntry(f"entry {index} does not follow from the one before it")
    return digest.digest()


def event_bytes(line: bytes) -> bytes:
    """Return the canonical JSON of the event in a *line* that was checked."""
    return line.rpartition(_HASH_KEY)[0].removeprefix(b'{"event":')


def parse(line: bytes) -> logger_pb2.RecordedEvent:
    """Return the entry in *line* for the wire.

    Raises:
        BadEntry: *line* is not an entry.
    """
    try:
        fields = json.loads(line)
        return logger_pb2.RecordedEvent(
            index=fields["index"],
            source=fields["source"],
            sequence=fields["sequence"],
            event=events.from_document(fields["event"]),
            hash=bytes.fromhex(fields["hash"]),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise BadEntry(f"not an entry: {error}") from error
