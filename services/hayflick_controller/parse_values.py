"""Single values of requests, checked: lengths, instants, texts, numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hayflick_controller.clock import MICROSECONDS
from hayflick_controller.model import MAX_EXACT_INTEGER
from hayflick_rpc.errors import invalid_field

if TYPE_CHECKING:
    from google.protobuf.duration_pb2 import Duration
    from google.protobuf.timestamp_pb2 import Timestamp

MAX_LENGTH_US = 366 * 24 * 3_600 * MICROSECONDS
"""The longest cooldown or expiration: a leap year."""
MAX_REASON_CHARS = 256


def length_us(field: str, length: Duration, *, maximum_us: int = MAX_LENGTH_US, minimum_us: int = 0) -> int:
    """Return *length* in microseconds.

    Raises:
        HayflickError: INVALID_FIELD when it is malformed, finer than a
            microsecond, or outside the bounds.
    """
    _well_formed(field, length.seconds, length.nanos)
    value = length.seconds * MICROSECONDS + length.nanos // 1_000
    if not minimum_us <= value <= maximum_us:
        low, high = minimum_us / MICROSECONDS, maximum_us / MICROSECONDS
        raise invalid_field(field, f"must be from {low:g} s to {high:g} s")
    return value


def instant_us(field: str, stamp: Timestamp) -> int:
    """Return *stamp* in microseconds since the Unix epoch.

    Raises:
        HayflickError: INVALID_FIELD when it is malformed or finer than a microsecond.
    """
    _well_formed(field, stamp.seconds, stamp.nanos)
    value = stamp.seconds * MICROSECONDS + stamp.nanos // 1_000
    if not 0 <= value <= MAX_EXACT_INTEGER:
        raise invalid_field(field, "must be between 1970 and 2255")
    return value


def text(field: str, value: str, maximum_chars: int) -> str:
    """Return *value* when it has at most *maximum_chars* characters and none of them is a NUL.

    Raises:
        HayflickError: INVALID_FIELD.
    """
    if len(value) > maximum_chars:
        raise invalid_field(field, f"must have at most {maximum_chars} characters")
    if "\0" in value:
        raise invalid_field(field, "must not contain NUL")
    return value


def required(field: str, value: str, maximum_chars: int = MAX_REASON_CHARS) -> str:
    """Return *value* when it is given and not too long.

    Raises:
        HayflickError: INVALID_FIELD.
    """
    if not value:
        raise invalid_field(field, "is required")
    return text(field, value, maximum_chars)


def within(field: str, value: int, minimum: int, maximum: int) -> None:
    """Return when *value* is from *minimum* to *maximum*.

    Raises:
        HayflickError: INVALID_FIELD.
    """
    if not minimum <= value <= maximum:
        raise invalid_field(field, f"must be from {minimum} to {maximum}, not {value}")


def _well_formed(field: str, whole: int, nanos: int) -> None:
    if not -999_999_999 <= nanos <= 999_999_999 or whole * nanos < 0:
        raise invalid_field(field, "has nanos that are out of range or of the other sign")
    if nanos % 1_000:
        raise invalid_field(field, "must be a whole number of microseconds")
