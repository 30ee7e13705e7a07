"""The one error that a Hayflick service raises on purpose.

Knows no gRPC, so that the pure parts of every service may raise it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from hayflick.v1.errors_pb2 import ErrorReason

_PREFIX = "ERROR_REASON_"


class HayflickError(Exception):
    """A refusal with a stable reason.

    Attributes:
        reason: Why, for programs; a value of ``hayflick.v1.ErrorReason``.
        message: Why, and what to do, for people. Never parsed by anyone.
        metadata: The facts that the reason names, as text.
        retry_after_seconds: When trying again can help; ``None`` when unknown.
    """

    def __init__(
        self,
        reason: ErrorReason.ValueType,
        message: str,
        *,
        metadata: Mapping[str, str] = MappingProxyType({}),
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata)
        self.retry_after_seconds = retry_after_seconds

    @property
    def reason_name(self) -> str:
        """The reason as it stands in ``google.rpc.ErrorInfo``, without prefix."""
        return reason_name(self.reason)

    def __repr__(self) -> str:
        return f"HayflickError({self.reason_name}, {self.message!r}, metadata={self.metadata!r})"


def reason_name(reason: ErrorReason.ValueType) -> str:
    """Return the name of *reason* as the wire carries it, without prefix."""
    return ErrorReason.Name(reason).removeprefix(_PREFIX)


def reason_from_name(name: str) -> ErrorReason.ValueType:
    """Return the reason that the wire calls *name*.

    A name that a newer service made up maps to UNSPECIFIED, so that an older
    client still sees the status code.
    """
    try:
        return ErrorReason.Value(_PREFIX + name)
    except ValueError:
        return ErrorReason.ERROR_REASON_UNSPECIFIED


def invalid_field(field: str, message: str) -> HayflickError:
    """Return the error for a *field* of a request that is not valid."""
    return HayflickError(
        ErrorReason.ERROR_REASON_INVALID_FIELD, f"{field}: {message}", metadata={"field": field}
    )
