"""An event as canonical JSON: the one form in which it is checked, hashed and stored.

RFC 8785 gives each value exactly one spelling, so two events are equal when
their bytes are. Senders check with the same function as the logger does, so
that an event which cannot be recorded is refused where it is made.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any, TypeAlias

import rfc8785

from hayflick.v1 import logger_pb2
from hayflick_rpc import wire
from hayflick_rpc.errors import invalid_field

if TYPE_CHECKING:
    from google.protobuf import struct_pb2

MAX_DETAILS_BYTES = 64 * 1024
MAX_SOURCE_CHARS = 128

Json: TypeAlias = "bool | float | str | list[Json] | dict[str, Json] | None"

_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}", re.ASCII)
_SOURCE = re.compile(rf"[A-Za-z0-9_.:/-]{{1,{MAX_SOURCE_CHARS}}}", re.ASCII)
_IDS = ("contract_id", "worker_id", "parent_id", "root_id")


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


def require_timestamp(field: str, message: logger_pb2.Event | logger_pb2.MetricSample) -> str:
    """Return *message*'s timestamp as RFC 3339 text in UTC.

    Raises:
        HayflickError: INVALID_FIELD, naming *field*, when there is none or none
            that RFC 3339 can write.
    """
    if not message.HasField("timestamp"):
        raise invalid_field(field, "is required")
    try:
        return message.timestamp.ToJsonString()
    except ValueError:
        raise invalid_field(field, "must lie in the years 1 to 9999") from None


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
    document: dict[str, Any] = {
        "event": require_name("event.event", event.event),
        "timestamp": require_timestamp("event.timestamp", event),
    }
    for field in _IDS:
        if value := getattr(event, field):
            document[field] = wire.require_id(f"event.{field}", value)
    if event.details.fields:
        details = _from_struct(event.details)
        size_bytes = len(rfc8785.dumps(details))
        if size_bytes > MAX_DETAILS_BYTES:
            raise invalid_field(
                "event.details", f"must be at most {MAX_DETAILS_BYTES} bytes as JSON, not {size_bytes}"
            )
        document["details"] = details
    return rfc8785.dumps(document)


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


def _from_struct(struct: struct_pb2.Struct) -> dict[str, Json]:
    return {name: _from_value(value) for name, value in struct.fields.items()}


def _from_value(value: struct_pb2.Value) -> Json:
    match value.WhichOneof("kind"):
        case "string_value":
            return value.string_value
        case "number_value":
            if not math.isfinite(value.number_value):
                raise invalid_field("event.details", "numbers must be finite")
            return value.number_value
        case "bool_value":
            return value.bool_value
        case "struct_value":
            return _from_struct(value.struct_value)
        case "list_value":
            return [_from_value(item) for item in value.list_value.values]
        case _:
            return None
