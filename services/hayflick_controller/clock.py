"""The controller's one source of time and of names."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from datetime import datetime, timedelta

Clock = Callable[[], int]
"""Returns the time now, in microseconds since the Unix epoch. Cooldowns and expiries must survive
a restart, so it begins at the wall clock; that it then never jumps is the caller's business
(:class:`hayflick_rpc.clock.SteadyClock`)."""

MICROSECONDS = 1_000_000

_EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001 -- in UTC throughout, so that its text has no offset


def seconds(length_us: int) -> float:
    """Return a length of time in seconds, for people and events."""
    return length_us / MICROSECONDS


def rfc3339(instant_us: int) -> str:
    """Return an instant as RFC 3339 text in UTC, to the microsecond."""
    return (_EPOCH + timedelta(microseconds=instant_us)).isoformat(timespec="microseconds") + "Z"


def new_worker_id() -> str:
    """Return a name for a worker: 64 random bits, as 16 hex digits."""
    return secrets.token_hex(8)


def new_contract_id() -> str:
    """Return a name for a contract: 64 random bits, as 16 hex digits."""
    return secrets.token_hex(8)


def new_key_id() -> str:
    """Return a name for a key: 64 random bits, as 16 hex digits."""
    return secrets.token_hex(8)


def new_manifest_id() -> str:
    """Return a name for a manifest: 128 random bits, because it is also the nonce."""
    return secrets.token_hex(16)
