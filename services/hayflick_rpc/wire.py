"""Small translations that every servicer needs: times, pages, identifiers."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from datetime import UTC, datetime, timedelta

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_rpc.errors import HayflickError, invalid_field

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1_000
MAX_TOKEN_CHARS = 1_024
ID_PATTERN = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def timestamp(instant_: datetime) -> Timestamp:
    """Return an aware *instant_* for the wire, to the microsecond."""
    elapsed = instant_ - _EPOCH
    return Timestamp(seconds=elapsed.days * 86_400 + elapsed.seconds, nanos=elapsed.microseconds * 1_000)


def instant(stamp: Timestamp) -> datetime:
    """Return the UTC instant that *stamp* says, to the microsecond."""
    return _EPOCH + timedelta(seconds=stamp.seconds, microseconds=stamp.nanos // 1_000)


def duration(seconds_: float) -> Duration:
    """Return *seconds_* for the wire."""
    nanos = round(seconds_ * 1_000_000_000)
    sign = -1 if nanos < 0 else 1
    whole, rest = divmod(abs(nanos), 1_000_000_000)
    return Duration(seconds=sign * whole, nanos=sign * rest)


def seconds(length: Duration) -> float:
    """Return *length* in seconds."""
    return length.seconds + length.nanos / 1_000_000_000


def require_id(field: str, value: str) -> str:
    """Return *value* when it has the form of an identifier.

    Raises:
        HayflickError: INVALID_FIELD, naming *field*.
    """
    if not ID_PATTERN.fullmatch(value):
        raise invalid_field(field, "must be 1 to 64 characters of [A-Za-z0-9_.-]")
    return value


def require_request_id(value: str) -> str:
    """Return *value* when it can serve as a request_id.

    Raises:
        HayflickError: INVALID_FIELD.
    """
    return require_id("request_id", value)


def page_size(asked: int) -> int:
    """Return how many items a page holds when the caller asked for *asked*.

    Raises:
        HayflickError: INVALID_FIELD when more were asked for than a page may hold.
    """
    if asked > MAX_PAGE_SIZE:
        raise invalid_field("page_size", f"must be at most {MAX_PAGE_SIZE}")
    return asked or DEFAULT_PAGE_SIZE


def fingerprint(*parts: object) -> str:
    """Return a short digest of what a page token must not be moved away from."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def encode_page_token(request_fingerprint: str, *position: str | int) -> str:
    """Return a token that continues after *position* in the same listing."""
    text = json.dumps([request_fingerprint, *position])
    return base64.urlsafe_b64encode(text.encode()).decode()


def decode_page_token(token: str, request_fingerprint: str) -> tuple[str | int, ...] | None:
    """Return the position in *token*, or ``None`` for the first page.

    Raises:
        HayflickError: PAGE_TOKEN_INVALID when the token was not made by this
            service for a request with this fingerprint.
    """
    if not token:
        return None
    try:
        if len(token) > MAX_TOKEN_CHARS:
            raise ValueError(len(token))
        made_for, *position = json.loads(base64.urlsafe_b64decode(token.encode()))
        if made_for != request_fingerprint or not all(type(part) in (str, int) for part in position):
            raise ValueError(made_for)
    except (ValueError, TypeError):
        raise HayflickError(
            ErrorReason.ERROR_REASON_PAGE_TOKEN_INVALID,
            "page_token: start again without one; tokens serve only the listing that gave them",
            metadata={"field": "page_token"},
        ) from None
    return tuple(position)
