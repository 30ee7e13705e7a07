"""An event as canonical JSON: the one form in which it is checked, hashed and stored.

RFC 8785 gives each value exactly one spelling, so two events are equal when
their bytes are. Senders check with the same function as the logger does, so
that an event which cannot be recorded is refused where it is made.
"""

from __future__ import annotations

import json
import math
import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, TypeAlias

import rfc8785

from hayflick.v1 import logger_pb2
from hayflick_rpc import wire
from hayflick_rpc.errors import invalid_field

if TYPE_CHECKING:
    from google.protobuf import struct_pb2
    from google.protobuf.timestamp_pb2 import Timestamp

# An entry of the record, the event and a little more, has 64 KiB less one byte at most.
MAX_DETAILS_BYTES = 60 * 1024
MAX_SOURCE_CHARS = 128

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}", re.ASCII)
_SOURCE = re.compile(rf"[A-Za-z0-9_.:/-]{{1,{MAX_SOURCE_CHARS}}}", re.ASCII)
_IDS = ("contract_id", "worker_id", "parent_id", "root_id")
# Up to here every whole number is a double of its own.
_MAX_WHOLE = 2.0**53
# From here up to _MAX_WHOLE, ECMAScript and Python write a fraction the same.
_MIN_PLAIN_FRACTION = 1e-4
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ONE_SECOND = timedelta(seconds=1)
# Those that protobuf's Timestamp may hold: the years 1 to 9999.
_MIN_SECONDS = -62_135_596_800
_MAX_SECONDS = 253_402_300_799
_encode = json.JSONEncoder(
    ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False, check_circular=False
).encode


def require_source(source: str) -> str:
    """Return *source* when it can name a sender.

    Raises:
        HayflickError: INVALID_FIELD.
    """
    if not _SOURCE.fullmatch(source):
        raise invalid_field("source", f"must be 1 to {MAX_SOURCE_CHARS} characters of [A-Za-z0-9_.:/-]")
    return source


def require_name(field: str, name: str) -> str:
    """Return *name* when it can name an event or a metric.

    Raises:
        HayflickError: INVALID_FIELD, naming *field*.
    """
    if not _NAME.fullmatch(name):
        raise invalid_field(field, "must be 1 to 64 characters of [a-z0-9_], a letter first")
    return name


def require_timestamp(field: str, message: logger_pb2.Event | logger_pb2.MetricSample) -> Timestamp:
    """Return *message*'s timestamp when RFC 3339 can write it.

    Raises:
        HayflickError: INVALID_FIELD, naming *field*, when there is none or none
            that RFC 3339 can write.
    """
    if not message.HasField("timestamp"):
        raise invalid_field(field, "is required")
    stamp = message.timestamp
    if not (_MIN_SECONDS <= stamp.seconds <= _MAX_SECONDS and 0 <= stamp.nanos < 1_000_000_000):
        raise invalid_field(field, "must lie in the years 1 to 9999")
    return stamp


def unix_time(text: str) -> tuple[int, int]:
    """Return the seconds and nanoseconds of Unix time in *text*, as protobuf writes a Timestamp in JSON.

    As ``Timestamp.FromJsonString`` does, at a fraction of its cost, for the one
    form that ``ToJsonString`` has: UTC, with 0, 3, 6 or 9 digits of a second.

    Raises:
        ValueError: *text* is no instant.
    """
    elapsed = datetime.fromisoformat(text[:19] + "Z") - _EPOCH
    return elapsed // _ONE_SECOND, int(text[20:-1].ljust(9, "0"))


def require_metric(sample: logger_pb2.MetricSample) -> logger_pb2.MetricSample:
    """Return *sample* when it can be kept.

    Raises:
        HayflickError: INVALID_FIELD, naming the field.
    """
    require_name("metric.name", sample.name)
    if not math.isfinite(sample.value):
        raise invalid_field("metric.value", "must be finite")
    require_timestamp("metric.timestamp", sample)
    for field in ("contract_id", "worker_id"):
        if value := getattr(sample, field):
            wire.require_id(f"metric.{field}", value)
    return sample


def to_json(event: logger_pb2.Event) -> bytes:
    """Return *event* as canonical JSON; empty fields are left out.

    Raises:
        HayflickError: INVALID_FIELD, naming the field that cannot be recorded:
            a name or identifier out of form, no timestamp or one outside the
            years 1 to 9999, details with a number that JSON has not or of more
            than MAX_DETAILS_BYTES.
    """
    name = require_name("event.event", event.event)
    text = require_timestamp("event.timestamp", event).ToJsonString()
    # None of these has a character that JSON escapes.
    members = {"event": f'"{name}"', "timestamp": f'"{text}"'}
    for field in _IDS:
        if value := getattr(event, field):
            members[field] = '"' + wire.require_id(f"event.{field}", value) + '"'
    if event.details.fields:
        members["details"] = _details(event.details)
    return ("{" + ",".join([f'"{key}":{members[key]}' for key in sorted(members)]) + "}").encode()


def from_json(text: bytes | str) -> logger_pb2.Event:
    """Return the event that :func:`to_json` wrote as *text*.

    Raises:
        ValueError: *text* was not written by :func:`to_json`.
    """
    return from_document(json.loads(text))


def from_document(document: object) -> logger_pb2.Event:
    """Return the event in a parsed JSON *document*.

    Raises:
        ValueError: it is not what :func:`to_json` wrote.
    """
    if not isinstance(document, dict):
        raise ValueError("an event is a JSON object")  # noqa: TRY004 -- one error for one fault
    fields = dict(document)
    event = logger_pb2.Event()
    try:
        event.timestamp.FromJsonString(fields.pop("timestamp"))
        details = fields.pop("details", None)
        if details is not None:
            event.details.update(details)
        for name, value in fields.items():
            setattr(event, name, value)
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"not an event: {error}") from error
    return event


def canonical(document: Json) -> bytes:
    """Return *document* as RFC 8785 has it.

    The standard library's encoder, which is many times faster, is used for all
    that it spells in the same way.

    Raises:
        rfc8785.CanonicalizationError: *document* holds what JSON has not.
    """
    return _encode(document).encode() if _is_plain(document) else rfc8785.dumps(document)


def _is_plain(document: Json) -> bool:
    """Return whether the standard library spells *document* as RFC 8785 does."""
    match document:
        case bool() | str() | None:
            return True
        case int():
            return abs(document) < _MAX_WHOLE
        case float():
            # Whole ones end in .0 there, and exponents begin elsewhere.
            return _MIN_PLAIN_FRACTION <= abs(document) < _MAX_WHOLE and not document.is_integer()
        case list():
            return all(map(_is_plain, document))
        case _:
            # Beyond ASCII the two may sort keys differently.
            return all(map(str.isascii, document)) and all(map(_is_plain, document.values()))


def _details(struct: struct_pb2.Struct) -> str:
    """Return *struct* as canonical JSON, when it is not too large."""
    text = canonical(_from_struct(struct))
    if len(text) > MAX_DETAILS_BYTES:
        raise invalid_field(
            "event.details", f"must be at most {MAX_DETAILS_BYTES} bytes as JSON, not {len(text)}"
        )
    return text.decode()


def _from_struct(struct: struct_pb2.Struct) -> dict[str, Json]:
    # By name: items() of a protobuf map is a generator in Python, at twice the cost.
    fields = struct.fields
    return {name: _from_value(fields[name]) for name in fields}


def _from_value(value: struct_pb2.Value) -> Json:
    match value.WhichOneof("kind"):
        case "string_value":
            return value.string_value
        case "number_value":
            return _from_number(value.number_value)
        case "bool_value":
            return value.bool_value
        case "struct_value":
            return _from_struct(value.struct_value)
        case "list_value":
            return [_from_value(item) for item in value.list_value.values]
        case _:
            return None


def _from_number(number: float) -> int | float:
    if not math.isfinite(number):
        raise invalid_field("event.details", "numbers must be finite")
    # Both forms are the same JSON; the whole one is the faster to write.
    return int(number) if number.is_integer() and abs(number) < _MAX_WHOLE else number
