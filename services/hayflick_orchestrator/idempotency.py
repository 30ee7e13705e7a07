"""A request repeated with the same request_id does nothing more and gets the same answer.

In memory only: what a request here leads to are workers of this node, and they
end with it.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, TypeVar

from google.protobuf.message import Message

from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_rpc.errors import HayflickError
from hayflick_rpc.wire import require_request_id

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

MAX_ANSWERS = 10_000
# An answer can hold a manifest with a snapshot of a megabyte.
MAX_ANSWER_BYTES = 64 * 1024 * 1024

T = TypeVar("T", bound=Message)


class Once:
    """Runs each request once and remembers the answers of those that succeeded."""

    def __init__(self, max_answers: int = MAX_ANSWERS, max_answer_bytes: int = MAX_ANSWER_BYTES) -> None:
        self._max_answers = max_answers
        self._max_answer_bytes = max_answer_bytes
        self._answer_bytes = 0
        self._known: OrderedDict[tuple[str, str], tuple[bytes, asyncio.Task[Any]]] = OrderedDict()

    async def run(
        self, method: str, request_id: str, request: Message, work: Callable[[], Coroutine[Any, Any, T]]
    ) -> T:
        """Return the answer to *request*, running *work* only if nobody did.

        The work goes on when its caller hangs up, so that nothing stays half
        done; whoever repeats the request meets it and waits for the same end.

        Raises:
            HayflickError: INVALID_FIELD for a bad id; REQUEST_ID_REUSED when it
                came before with other contents; whatever *work* raises, which
                is not remembered.
        """
        key = (method, require_request_id(request_id))
        digest = hashlib.sha256(request.SerializeToString(deterministic=True)).digest()
        known = self._known.get(key)
        if known is None:
            task = asyncio.create_task(work(), name=f"{method} {request_id}")
            self._known[key] = (digest, task)
            task.add_done_callback(lambda done: self._settle(key, done))
        else:
            before, task = known
            if before != digest:
                raise HayflickError(
                    ErrorReason.ERROR_REASON_REQUEST_ID_REUSED,
                    f"request_id {request_id} came before with other contents",
                    metadata={"request_id": request_id},
                )
        answer: T = await asyncio.shield(task)
        return answer

    def _settle(self, key: tuple[str, str], task: asyncio.Task[Any]) -> None:
        if task.cancelled() or task.exception() is not None:
            self._known.pop(key, None)
            return
        self._answer_bytes += task.result().ByteSize()
        for oldest, (_, before) in tuple(self._known.items()):
            if len(self._known) <= self._max_answers and self._answer_bytes <= self._max_answer_bytes:
                break
            # Work in progress is not forgotten; it is counted when it is done.
            if before.done() and oldest != key:
                self._answer_bytes -= before.result().ByteSize()
                del self._known[oldest]

    async def settled(self) -> None:
        """Return when no work is in progress."""
        running: list[Awaitable[Any]] = [task for _, task in self._known.values() if not task.done()]
        await asyncio.gather(*running, return_exceptions=True)
