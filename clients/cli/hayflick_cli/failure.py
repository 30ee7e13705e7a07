"""Why a verb could not be carried out, for people."""

from __future__ import annotations

import grpc

EXIT_BAD = 1
EXIT_FAILED = 2


class Failure(Exception):
    """A verb could not be carried out. Its text says why, and what to do."""


def words_of(error: grpc.RpcError) -> str:
    """Return what a service said when it refused, for people."""
    details = getattr(error, "details", None)
    return str(details()) if callable(details) else str(error)


def status_of(error: grpc.RpcError) -> grpc.StatusCode:
    """Return the status that a call ended with."""
    code = getattr(error, "code", None)
    return code() if callable(code) else grpc.StatusCode.UNKNOWN
