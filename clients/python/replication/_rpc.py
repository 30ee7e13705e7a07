"""Calls to the services: channels, deadlines, retries, and what their errors become."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from google.protobuf.json_format import MessageToDict, ParseDict
from google.rpc import error_details_pb2, status_pb2

from replication import _error_table
from replication.errors import HayflickError, ServiceUnavailable

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from replication._embedded import Endpoint
    from replication._wire import Json

    RequestT = TypeVar("RequestT", bound=Message)
    ResponseT = TypeVar("ResponseT", bound=Message)
    MessageT = TypeVar("MessageT", bound=Message)

DOMAIN = "hayflick"
MAX_MESSAGE_BYTES = 24 * 1024 * 1024
CALL_SECONDS = 30.0

# UNAVAILABLE says that nothing was done, and what changes anything carries a
# request_id besides: trying again is safe. RunTask has none, and PutFile is a
# stream that cannot be read twice; they are left out.
_RETRIED = {
    "name": [{"service": f"hayflick.v1.{name}Service"} for name in ("Controller", "Orchestrator", "Logger")],
    "retryPolicy": {
        "maxAttempts": 4,
        "initialBackoff": "0.1s",
        "maxBackoff": "1s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    },
}
_NOT_RETRIED = {
    "name": [
        {"service": "hayflick.v1.OrchestratorService", "method": method} for method in ("RunTask", "PutFile")
    ]
}

_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),
    ("grpc.service_config", json.dumps({"methodConfig": [_RETRIED, _NOT_RETRIED]})),
)


class Connection:
    """A channel to one service."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.channel = grpc.insecure_channel(endpoint.address, options=_OPTIONS)
        self._pid = os.getpid()
        self._closed = False

    def call(
        self,
        method: grpc.UnaryUnaryMultiCallable[RequestT, ResponseT],
        request: RequestT,
        timeout_seconds: float = CALL_SECONDS,
    ) -> ResponseT:
        """Call *method* and return its answer.

        Raises:
            HayflickError: As the table says.
        """
        self._require_usable()
        try:
            return method(request, timeout=timeout_seconds)
        except grpc.RpcError as error:
            raise self._translated(error) from None

    def upload(
        self, method: grpc.StreamUnaryMultiCallable[RequestT, ResponseT], requests: Iterator[RequestT]
    ) -> ResponseT:
        """Send *requests* to *method* and return its answer.

        Raises:
            HayflickError: As the table says.
            Exception: What *requests* raises; the stream ends where it did.
        """
        self._require_usable()
        failures: list[Exception] = []

        def guarded() -> Iterator[RequestT]:
            # In a thread of gRPC's, which only logs what is raised there.
            try:
                yield from requests
            except Exception as error:  # noqa: BLE001 -- raised below, to whom it belongs
                failures.append(error)

        call: Any = method.future(guarded())
        try:
            answer: ResponseT = call.result()
        except grpc.RpcError as error:
            if failures:
                raise failures[0] from None
            raise self._translated(error) from None
        finally:
            call.cancel()
        return answer

    @contextlib.contextmanager
    def stream(
        self, method: grpc.UnaryStreamMultiCallable[RequestT, ResponseT], request: RequestT
    ) -> Iterator[Iterator[ResponseT]]:
        """Call *method* and hand over its stream; leaving the block hangs up.

        Raises:
            HayflickError: As the table says, while the stream is read.
        """
        self._require_usable()
        call: Any = method(request)
        try:
            yield call
        except grpc.RpcError as error:
            raise self._translated(error) from None
        finally:
            call.cancel()

    def _translated(self, error: grpc.RpcError) -> HayflickError:
        translated = from_rpc_error(error)
        if isinstance(translated, ServiceUnavailable) and not translated.details:
            return ServiceUnavailable(
                f"the {self.endpoint.name} at {self.endpoint.address} does not answer: {translated}",
                reason=translated.reason,
                details={"service": self.endpoint.name},
            )
        return translated

    def close(self) -> None:
        """Hang up for good: the services are about to stop."""
        self._closed = True
        self.channel.close()

    def _require_usable(self) -> None:
        if self._closed:
            raise ServiceUnavailable(
                f"the {self.endpoint.name} at {self.endpoint.address} was stopped with its services"
            )
        # gRPC's threads do not survive a fork; a call would hang for ever.
        if os.getpid() != self._pid:
            raise ServiceUnavailable(
                f"this {self.endpoint.name} was made before this process was forked: make one here"
            )


_connections: dict[str, Connection] = {}
_lock = threading.Lock()


def connect(endpoint: Endpoint) -> Connection:
    """Return a connection to *endpoint*, shared with all who use the same address."""
    with _lock:
        connection = _connections.get(endpoint.address)
        if connection is None:
            connection = _connections[endpoint.address] = Connection(endpoint)
            if endpoint.runtime is not None:
                endpoint.runtime.before_close(functools.partial(_disconnect, endpoint.address))
        return connection


def _disconnect(address: str) -> None:
    with _lock:
        _connections.pop(address).close()


def _forget() -> None:
    global _lock  # noqa: PLW0603 -- another thread of the parent may hold it for ever
    _lock = threading.Lock()
    _connections.clear()


os.register_at_fork(after_in_child=_forget)


def request_id() -> str:
    """Return a name for a request, so that repeating it does nothing more."""
    return secrets.token_hex(16)


def from_json(value: Json, message: MessageT) -> MessageT:
    """Return *message*, filled from proto3 JSON."""
    return ParseDict(dict(value), message)


def to_json(message: Message) -> dict[str, Any]:
    """Return *message* as proto3 JSON."""
    return MessageToDict(message)


def from_rpc_error(error: grpc.RpcError) -> HayflickError:
    """Return what *error*, from a call or a stream, is in this package's terms."""
    call: Any = error  # every error of a call is a grpc.Call too; its type does not say so
    code, message = call.code(), call.details() or ""
    info = error_details_pb2.ErrorInfo()
    retry_after_seconds: float | None = None
    for detail in _details(call):
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            detail.Unpack(info)
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            retry_after_seconds = retry.retry_delay.ToNanoseconds() / 1_000_000_000
    reason = info.reason if info.domain == DOMAIN else ""
    return _error_table.error(
        reason,
        message or code.name,
        dict(info.metadata) if reason else {},
        retry_after_seconds=retry_after_seconds,
        code=code.name,
    )


def _details(error: grpc.Call) -> Iterator[Any]:
    """Yield the details of a rich status; see https://google.aip.dev/193."""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            yield from status_pb2.Status.FromString(value).details
