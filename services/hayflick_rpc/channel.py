"""Channels from one service to another."""

from __future__ import annotations

from collections.abc import Callable

import grpc

MAX_MESSAGE_BYTES = 24 * 1024 * 1024

OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A service that restarts is back within a second; do not wait longer.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_http_proxy", 0),
)


Dial = Callable[[str], grpc.aio.Channel]
"""Makes a channel to the service at an address, as :func:`connect` does."""


def connect(address: str) -> grpc.aio.Channel:
    """Return a channel to the service at *address*, a ``unix:`` gRPC target.

    Raises:
        ValueError: *address* is not a Unix socket; plain TCP would let anyone in.
    """
    if not address.startswith("unix:"):
        raise ValueError(f"address: {address!r} is not a unix: target")
    return grpc.aio.insecure_channel(address, options=OPTIONS)
