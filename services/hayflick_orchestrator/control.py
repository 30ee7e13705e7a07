"""The control stream of a Python task: the payload in, the result out, calls both ways.

The task's end is in the hands of whatever code runs in the sandbox, so nothing
that comes from it is trusted: one wrong frame is a violation, which ends the
task and harms nobody else.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_orchestrator.gates import Gate
from hayflick_rpc.errors import HayflickError
from hayflick_sandbox import frames

if TYPE_CHECKING:
    import socket

READ_BYTES = 256 * 1024
# A frame of which more is here counts as large. Of each worker one large frame is taken
# at a time: what it has half sent, in however many tasks, fills no memory of ours.
LARGE_FRAME_BYTES = 1024 * 1024
# What a result may hold; the rest of a frame is room for its header.
MAX_VALUE_BYTES = 16 * 1024 * 1024
MAX_TYPE_CHARS = 256
MAX_MESSAGE_CHARS = 64 * 1024
MAX_TRACEBACK_CHARS = 256 * 1024
# Calls of one task that are in progress; while there are more, its stream is
# not read, so a task that floods calls slows itself.
MAX_CALLS_AT_ONCE = 16

Json = dict[str, Any]
Emit = Callable[[Json], Awaitable[None]]
Dispatch = Callable[[str, Json, Emit], Awaitable[Json]]

log = logging.getLogger(__name__)


class Violation(Exception):
    """The task broke the protocol of its control stream."""


@dataclass(frozen=True, slots=True)
class Raised:
    """An exception of a task, as data."""

    type: str
    message: str
    traceback: str


class ControlStream:
    """The orchestrator's end of one task's control stream.

    Args:
        sock: Ours from now on.
        dispatch: What answers calls; without it there are none.
        gate: Shut while the worker is quarantined.
        large: Held while a large frame comes in; one for all tasks of a worker.

    Attributes:
        value: The result as JSON text, once it came.
        raised: The exception, once it came.
    """

    def __init__(
        self,
        sock: socket.socket,
        dispatch: Dispatch | None,
        gate: Gate | None = None,
        large: asyncio.Lock | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._sock.setblocking(False)
        self._dispatch = dispatch
        self._gate = gate or Gate()
        self._large = large or asyncio.Lock()
        self._holds_large = False
        self._decoder = frames.Decoder(frames.MAX_FRAME_BYTES)
        self._writing = asyncio.Lock()
        self._room = asyncio.Semaphore(MAX_CALLS_AT_ONCE)
        self._calls: set[asyncio.Task[None]] = set()
        self.value: str | None = None
        self.raised: Raised | None = None

    @property
    def settled(self) -> bool:
        """Whether the task said how it ended."""
        return self.value is not None or self.raised is not None

    async def run(self, info: Mapping[str, object], payload: bytes) -> None:
        """Hand the task its payload, then serve it until it hangs up.

        Raises:
            Violation: it said something that no task of ours says.
        """
        try:
            await self._send({"type": "start", "info": dict(info)}, payload)
            while data := await self._loop.sock_recv(self._sock, READ_BYTES):
                await self._gate.passage()
                for header, body in self._decoder.feed(data):
                    await self._gate.passage()
                    self._end_large()
                    await self._take(header, body)
                if self._decoder.pending_bytes > LARGE_FRAME_BYTES and not self._holds_large:
                    await self._large.acquire()
                    self._holds_large = True
        except frames.FrameError as error:
            raise Violation(str(error)) from error
        except OSError:
            return  # the task is gone; how, its init tells
        finally:
            self._end_large()
            for call in self._calls:
                call.cancel()
            await asyncio.gather(*self._calls, return_exceptions=True)

    def _end_large(self) -> None:
        if self._holds_large:
            self._holds_large = False
            self._large.release()

    async def _send(self, header: Json, body: bytes = b"") -> None:
        frame = frames.encode(header, body)
        async with self._writing:
            await self._gate.passage()
            await self._loop.sock_sendall(self._sock, frame)

    async def _take(self, header: Json, body: bytes) -> None:
        match header:
            case {"type": "result"} if not self.settled:
                if len(body) > MAX_VALUE_BYTES:
                    raise Violation(f"a result of {len(body)} bytes")
                try:
                    self.value = body.decode()
                except UnicodeDecodeError:
                    raise Violation("a result that is not UTF-8") from None
            case {"type": "exception", "exception": {"type": str(kind), "message": str(message), **rest}} if (
                not self.settled
            ):
                traceback = rest.get("traceback", "")
                if not isinstance(traceback, str):
                    raise Violation("an exception whose traceback is not text")
                self.raised = Raised(
                    _text(kind, MAX_TYPE_CHARS),
                    _text(message, MAX_MESSAGE_CHARS),
                    _text(traceback, MAX_TRACEBACK_CHARS),
                )
            case {"type": "call", "id": int(number), "method": str(method), "request": dict(request)} if (
                self._dispatch is not None and not isinstance(number, bool)
            ):
                await self._room.acquire()
                call = asyncio.create_task(self._serve(number, method, request))
                self._calls.add(call)
                call.add_done_callback(self._served)
            case _:
                raise Violation("a frame that no task may send now")

    def _served(self, call: asyncio.Task[None]) -> None:
        self._calls.discard(call)
        self._room.release()

    async def _serve(self, number: int, method: str, request: Json) -> None:
        async def emit(event: Json) -> None:
            await self._send({"type": "event", "id": number, "event": event})

        assert self._dispatch is not None
        # Taken from the stream before the gate was shut is not acted upon yet.
        await self._gate.passage()
        try:
            try:
                reply: Json = {
                    "type": "reply",
                    "id": number,
                    "response": await self._dispatch(method, request, emit),
                }
            except HayflickError as refusal:
                reply = _refusal(number, refusal)
            except (OSError, frames.FrameError):
                raise
            except Exception as error:
                error_id = secrets.token_hex(8)
                log.error(  # noqa: TRY400 -- with its traceback, as exc_info
                    "call of %r by a worker failed, error_id %s", method[:64], error_id, exc_info=error
                )
                reply = _refusal(
                    number,
                    HayflickError(
                        ErrorReason.ERROR_REASON_INTERNAL,
                        f"a fault of Hayflick's own; its log says more under error_id {error_id}",
                        metadata={"error_id": error_id},
                    ),
                )
            await self._send(reply)
        except OSError:
            return  # the task is gone and needs no answer

    def close(self) -> None:
        """Hang up."""
        self._sock.close()


def _refusal(number: int, refusal: HayflickError) -> Json:
    frame: Json = {
        "type": "error",
        "id": number,
        "reason": refusal.reason_name,
        "message": refusal.message,
        "metadata": refusal.metadata,
    }
    if refusal.retry_after_seconds is not None:
        frame["retry_after_seconds"] = refusal.retry_after_seconds
    return frame


def _text(text: str, limit: int) -> str:
    # JSON can smuggle in lone surrogates, which no protobuf string takes.
    return text[:limit].encode("utf-8", "replace").decode()
