"""What happens around every call, as one ordered list."""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import grpc
from google.protobuf import descriptor_pool

from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_rpc import access, fields
from hayflick_rpc.errors import HayflickError, invalid_field
from hayflick_rpc.status import to_status

if TYPE_CHECKING:
    from google.protobuf.descriptor import Descriptor

# In quotes: only the stubs of older grpcio know these classes as generic.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Details: TypeAlias = grpc.HandlerCallDetails
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Continuation: TypeAlias = "Callable[[Details], Awaitable[Handler | None]]"
Behaviour: TypeAlias = Callable[..., Any]

log = logging.getLogger(__name__)


def chain(role: access.Role = access.Role.LOCAL) -> list[grpc.aio.ServerInterceptor]:
    """Return the interceptors of a service whose callers are in *role*, outermost first."""
    return [
        ErrorInterceptor(),  # outermost: whatever follows may raise HayflickError
        AccessInterceptor(role),
        *([FieldsInterceptor()] if role is access.Role.WORKER else []),
    ]


class _TooMany:
    """Stands for a message that was not parsed."""


class FieldsInterceptor(grpc.aio.ServerInterceptor):
    """Refuses requests of very many values before they are parsed; see :mod:`hayflick_rpc.fields`.

    Streams of requests pass: what is left of those has no field that repeats.
    """

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: Details
    ) -> Handler | None:
        """Have the bytes looked at first."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        message, parse, behaviour = (
            _input_of(handler_call_details.method),
            handler.request_deserializer,
            _behaviour(handler),
        )

        def deserialize(data: bytes) -> object:
            if not fields.has_few(data, message):
                return _TooMany()
            return data if parse is None else parse(data)

        def require(request: object) -> None:
            if isinstance(request, _TooMany):
                raise invalid_field("request", f"has more than {fields.MAX_FIELDS} values")

        if handler.response_streaming:

            async def stream(request: object, context: Context) -> AsyncIterator[Any]:
                require(request)
                async for response in behaviour(request, context):
                    yield response

            return _rebuild(handler, stream, deserialize)

        async def unary(request: object, context: Context) -> Any:  # noqa: ANN401 -- any message
            require(request)
            return await behaviour(request, context)

        return _rebuild(handler, unary, deserialize)


def _input_of(method: str) -> Descriptor | None:
    """Return the type of what *method* takes, ``/package.Service/Method``."""
    service, _, name = method.strip("/").partition("/")
    try:
        found = descriptor_pool.Default().FindServiceByName(service).FindMethodByName(name)
    except KeyError:
        return None
    return found.input_type if found is not None else None


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Refuses methods that the table does not give to the caller's role."""

    def __init__(self, role: access.Role) -> None:
        self._role = role

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: Details
    ) -> Handler | None:
        """Pass the call on, or answer it with CALLER_NOT_ALLOWED."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or access.allowed(method, self._role):
            return handler  # None is gRPC's own way to say UNIMPLEMENTED

        async def refuse(request: object, context: Context) -> NoReturn:
            del request, context
            raise HayflickError(
                ErrorReason.ERROR_REASON_CALLER_NOT_ALLOWED,
                f"a {self._role.value} caller may not call {method}",
                metadata={"method": method},
            )

        return _rebuild(handler, refuse)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns exceptions into statuses: ours with their reason, others without a word of theirs."""

    def __init__(self) -> None:
        # A method's handler and who may call it never change, so each is wrapped once.
        self._wrapped: dict[str, Handler] = {}

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: Details
    ) -> Handler | None:
        """Wrap the handler so that no exception leaves it bare."""
        method = handler_call_details.method
        if (wrapped := self._wrapped.get(method)) is not None:
            return wrapped
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        self._wrapped[method] = _wrap(handler, method)
        return self._wrapped[method]


def _wrap(handler: Handler, method: str) -> Handler:
    behaviour = _behaviour(handler)

    if handler.response_streaming:

        async def stream(request: object, context: Context) -> AsyncIterator[Any]:
            try:
                async for response in behaviour(request, context):
                    yield response
            except Exception as error:  # noqa: BLE001 -- the one place where all of them end
                await _abort(context, error, method)

        return _rebuild(handler, stream)

    async def unary(request: object, context: Context) -> Any:  # noqa: ANN401 -- any message
        try:
            return await behaviour(request, context)
        except Exception as error:  # noqa: BLE001 -- the one place where all of them end
            await _abort(context, error, method)

    return _rebuild(handler, unary)


async def _abort(context: Context, error: Exception, method: str) -> NoReturn:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, HayflickError):
        error_id = secrets.token_hex(8)
        log.error("%s failed, error_id %s", method, error_id, exc_info=error)
        error = HayflickError(
            ErrorReason.ERROR_REASON_INTERNAL,
            f"a fault of Hayflick's own; its log says more under error_id {error_id}",
            metadata={"error_id": error_id},
        )
    await context.abort_with_status(to_status(error))
    raise AssertionError("abort_with_status always raises")


def _behaviour(handler: Handler) -> Behaviour:
    kinds = (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
    return next(kind for kind in kinds if kind is not None)


def _rebuild(
    handler: Handler, behaviour: Behaviour, deserialize: Callable[[bytes], object] | None = None
) -> Handler:
    makers = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    make = makers[handler.request_streaming, handler.response_streaming]
    rebuilt: Handler = make(
        behaviour,
        request_deserializer=deserialize or handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
    return rebuilt
