"""How every decision is taken: once per request, with its event, and only when that is durable.

A decision and its event are committed together. The caller is answered when the
logger has the event on disk. When it does not answer in time, the decision is
undone in a transaction of its own, which is recorded too, and the caller is told
AUDIT_UNAVAILABLE; nobody ever saw the decision. What must act in any case (a kill)
acts, and is recorded when the logger returns.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from google.protobuf.message import Message

from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_controller.admission import Denial
from hayflick_controller.model import Answer
from hayflick_controller.outbox import Outbox, not_recorded, unavailable
from hayflick_controller.store.protocol import NO_NEEDS, Needs
from hayflick_rpc.errors import HayflickError

if TYPE_CHECKING:
    from hayflick_controller.clock import Clock
    from hayflick_controller.store import Store, Tx

T = TypeVar("T")
V = TypeVar("V")
M = TypeVar("M", bound=Message)

CLOSE_SECONDS = 1.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """What makes a request the same request: its id, its method, and a digest of its contents."""

    request_id: str
    method: str
    digest: str


@dataclass(frozen=True)
class Form(Generic[V, M]):
    """How what was decided becomes an answer, and how the answer is kept.

    Attributes:
        message: The type of the answer.
        give: Makes the answer.
        strip: Takes from a copy of the answer what need not be kept twice.
        restore: Fills what was kept up again, when the request is repeated.
    """

    message: type[M]
    give: Callable[[V], M]
    strip: Callable[[M], None] | None = None
    restore: Callable[[Tx, M], M] = lambda _, kept: kept


@dataclass(frozen=True, slots=True)
class _Taken(Generic[V, M]):
    value: V
    answer: M
    position: int


@dataclass(frozen=True, slots=True)
class _Denied:
    denial: Denial
    position: int


@dataclass(frozen=True, slots=True)
class _Repeated(Generic[M]):
    answer: M
    position: int


class Decisions:
    """Takes decisions.

    Args:
        store: Where they are kept.
        outbox: Tells when they are recorded.
        clock: The time.
        audit_timeout_seconds: How long to wait for the record.
    """

    def __init__(self, store: Store, outbox: Outbox, clock: Clock, audit_timeout_seconds: float) -> None:
        self._store = store
        self._outbox = outbox
        self._clock = clock
        self._timeout_seconds = audit_timeout_seconds
        self._running: set[asyncio.Task[Any]] = set()

    @property
    def audit_up(self) -> bool:
        """Whether the logger answers; without it nothing is decided but denials and containment."""
        return self._outbox.up

    @property
    def shared(self) -> bool:
        """Whether other controllers may decide on the same database."""
        return self._store.shared

    async def take(
        self,
        request: Request,
        decide: Callable[[Tx], V | Denial],
        form: Form[V, M],
        *,
        undo: Callable[[Tx, V], None] | None = None,
        durable: bool = False,
        needs: Needs = NO_NEEDS,
    ) -> M:
        """Decide *request* once; return its answer when the decision is recorded.

        Args:
            request: Repeated, it gets its first answer. Denials are not kept.
            decide: Runs in the transaction; records its event there. Raising
                changes nothing; a :class:`Denial` commits the event alone.
            form: Makes the answer.
            undo: Takes the decision back when it could not be recorded. ``None``
                for what reports a fact: the fact stays, the caller tries again.
            durable: Whether the decision must survive a power cut.
            needs: What *decide* is going to read.

        Raises:
            HayflickError: The denial; REQUEST_ID_REUSED; AUDIT_UNAVAILABLE; or
                what *decide* raised.
        """
        return await self.finish(self._take(request, decide, form, undo=undo, durable=durable, needs=needs))

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        """Await *work*, which goes on to its end also when its caller hangs up meanwhile."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._finished)
        return await asyncio.shield(task)

    async def record(self, fn: Callable[[Tx], T], *, durable: bool = False) -> T:
        """Commit *fn*, which acts whether or not its event can be recorded at once."""
        return await self._store.transact(fn, durable=durable)

    async def wait_recorded(self, position: int) -> bool:
        """Wait for the event at *position*; return whether it is durable."""
        if not self._outbox.up:
            return False
        try:
            await self._outbox.durable(position, self._timeout_seconds)
        except HayflickError:
            return False
        return True

    def check_repeated(self, tx: Tx, request: Request) -> Answer | None:
        """Return the answer to *request* when it was seen before.

        Raises:
            HayflickError: REQUEST_ID_REUSED when it had other contents then.
        """
        known = tx.answer(request.request_id)
        if known is not None and (known.method, known.digest) != (request.method, request.digest):
            raise HayflickError(
                ErrorReason.ERROR_REASON_REQUEST_ID_REUSED,
                "request_id: was used before, with other contents",
                metadata={"request_id": request.request_id, "field": "request_id"},
            )
        return known

    def remember(self, tx: Tx, request: Request, body: bytes | None) -> None:
        """Keep *body* as the answer to *request*; ``None``, or what was begun, while there is none yet."""
        tx.remember(
            Answer(request.request_id, request.method, request.digest, body, tx.position, self._clock())
        )

    async def close(self) -> None:
        """Let what is being decided end; what takes longer is in the database, for the next start."""
        running = set(self._running)
        if running:
            _, slow = await asyncio.wait(running, timeout=CLOSE_SECONDS)
            for task in slow:
                task.cancel()
            await asyncio.gather(*slow, return_exceptions=True)

    async def _take(
        self,
        request: Request,
        decide: Callable[[Tx], V | Denial],
        form: Form[V, M],
        *,
        undo: Callable[[Tx, V], None] | None,
        durable: bool,
        needs: Needs,
    ) -> M:
        def run(tx: Tx) -> _Taken[V, M] | _Repeated[M] | _Denied:
            known = self.check_repeated(tx, request)
            if known is not None:
                kept = form.message.FromString(known.body or b"")
                return _Repeated(form.restore(tx, kept), known.position)
            value = decide(tx)
            if isinstance(value, Denial):
                return _Denied(value, tx.position)
            if undo is not None and not self._outbox.up:
                raise unavailable("the logger does not answer")  # rolls back; a denial needs no logger
            answer = form.give(value)
            self.remember(tx, request, _kept(form, answer).SerializeToString())
            return _Taken(value, answer, tx.position)

        needs = replace(needs, request_id=request.request_id)
        outcome = await self._store.transact(run, durable=durable, needs=needs)
        if isinstance(outcome, _Denied):
            # Recorded before it is answered where that can be had, but nothing
            # is at stake: a denial stands without a logger.
            await self.wait_recorded(outcome.position)
            raise outcome.denial.error()
        error = await self._await_record(outcome.position)
        if error is not None:
            if undo is not None and isinstance(outcome, _Taken):
                await self._undo(request, outcome.value, undo)
            raise error if undo is not None else not_recorded("the logger does not answer")
        if isinstance(outcome, _Taken):
            return outcome.answer
        if undo is not None and not await self._stands(request, outcome.position):
            raise unavailable("the first attempt was undone: it could not be recorded in time")
        return outcome.answer

    async def _stands(self, request: Request, position: int) -> bool:
        """Return whether the answer that waited for *position* is still kept.

        A repeated request may outwait the first, whose timeout undoes what both asked
        for. Its event becomes durable all the same, followed by that of the undoing.
        """

        def run(tx: Tx) -> bool:
            known = tx.answer(request.request_id)
            return known is not None and known.position == position  # another is a later attempt's

        return await self._store.transact(run)

    async def _await_record(self, position: int) -> HayflickError | None:
        if not self._outbox.up:
            return unavailable("the logger does not answer")
        try:
            await self._outbox.durable(position, self._timeout_seconds)
        except HayflickError as error:
            return error
        return None

    async def _undo(self, request: Request, value: V, undo: Callable[[Tx, V], None]) -> None:
        def run(tx: Tx) -> None:
            undo(tx, value)
            tx.forget(request.request_id)

        log.warning("%s %s is undone: it could not be recorded", request.method, request.request_id)
        await self._store.transact(run)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # whoever hung up does not ask for it


def _kept(form: Form[V, M], answer: M) -> M:
    if form.strip is None:
        return answer
    kept = form.message()
    kept.CopyFrom(answer)
    form.strip(kept)
    return kept
