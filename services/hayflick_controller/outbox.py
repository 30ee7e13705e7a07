"""From the database to the logger: every event, in order, once, and told when it is durable.

Events are committed together with what they tell of, so neither can be without
the other. From here they go to the logger; a row is dropped once the logger has
acknowledged it. What a crash left behind is delivered first, under the source of
the boot that recorded it, so that the logger recognises what it already has.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from functools import partial

from hayflick.v1 import logger_pb2
from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_controller.store.protocol import Commit, Queued, Store, Tx, source_of
from hayflick_rpc.audit import AuditClient
from hayflick_rpc.channel import Dial, connect
from hayflick_rpc.errors import HayflickError

PAGE_EVENTS = 1_000
MAX_SUBMITTED_EVENTS = 8_000
"""How many events may wait in memory; the rest wait in the database."""
FLUSH_SECONDS = 3.0
RETRY_SECONDS = 0.2
BACKLOG_TIMEOUT_SECONDS = 60.0

log = logging.getLogger(__name__)


class Outbox:
    """Delivers what transactions recorded.

    Args:
        store: Where the events are; open.
        logger_address: The logger's ``unix:`` target.
        dial: Makes channels to it.
    """

    def __init__(self, store: Store, logger_address: str, dial: Dial = connect) -> None:
        self._store = store
        self._address = logger_address
        self._dial = dial
        self._boot = store.identity.boot
        self._client = AuditClient(
            logger_address,
            store.identity.source,
            on_acknowledged=self._acknowledged,
            max_pending_events=MAX_SUBMITTED_EVENTS + PAGE_EVENTS,
            dial=dial,
        )
        self._submitted = 0  # sequences of this boot
        self._committed = 0
        self._behind = False  # whether events wait in the database alone
        self._caught_up = False  # with what earlier boots left
        self._started = asyncio.Event()
        self._wake = asyncio.Event()
        self._drop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def up(self) -> bool:
        """Whether an event recorded now can be expected to be durable at once.

        Asked from the database's thread too, so it reads flags that are true
        at every instant, and compares no counters that are being moved.
        """
        return self._caught_up and self._client.connected and not self._behind

    async def start(self) -> None:
        """Begin to deliver; returns at once, logger or no logger."""
        self._tasks = [
            asyncio.create_task(self._deliver(), name="outbox"),
            asyncio.create_task(self._drop_delivered(), name="outbox's broom"),
        ]

    def feed(self, commit: Commit) -> None:
        """Take the events of *commit*; called in the order of commits."""
        for event in commit.events:
            self._committed = event.sequence
            if self._caught_up and event.sequence == self._submitted + 1:
                self._submit(event)
        self._behind = self._submitted < self._committed
        if self._behind:
            self._wake.set()

    async def durable(self, position: int, timeout_seconds: float) -> None:
        """Return once the event at *position* is on the logger's disk.

        Raises:
            HayflickError: AUDIT_UNAVAILABLE when that is not so in time.
        """
        queued = Queued(position, b"")
        if queued.boot != self._boot:
            await self._dropped(position, timeout_seconds)
            return
        try:
            await self._client.wait_acknowledged(queued.sequence, timeout_seconds)
        except HayflickError as error:
            raise unavailable(error.message) from error

    async def _dropped(self, position: int, timeout_seconds: float) -> None:
        """Wait for an event of an earlier start, or of another controller on the same database."""
        try:
            async with asyncio.timeout(timeout_seconds):
                while await self._store.transact(lambda tx: tx.waits(position)):  # noqa: ASYNC110
                    await asyncio.sleep(RETRY_SECONDS)  # nothing tells of another process
        except TimeoutError:
            raise unavailable("whoever recorded the decision has not delivered it") from None

    async def wait_up(self) -> None:
        """Return once the logger answers and has what earlier boots left."""
        await self._started.wait()
        while not self._client.connected:
            with contextlib.suppress(HayflickError):
                await self._client.wait_connected(BACKLOG_TIMEOUT_SECONDS)

    async def close(self) -> None:
        """Deliver what can be delivered within a few seconds; the rest stays in the database."""
        with contextlib.suppress(TimeoutError, HayflickError):
            if self._committed and self._client.connected:
                await self._client.wait_acknowledged(self._committed, FLUSH_SECONDS)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.close(flush_seconds=0)
        with contextlib.suppress(HayflickError):
            await self._drop_up_to(self._client.acknowledged)

    async def _deliver(self) -> None:
        await self._deliver_backlog()
        await self._client.start()
        self._caught_up = True
        self._started.set()
        while True:
            self._wake.clear()
            try:
                await self._submit_from_database()
            except HayflickError as error:
                log.error("cannot read the outbox: %s", error.message)  # noqa: TRY400 -- no traceback helps
                await asyncio.sleep(RETRY_SECONDS)
                continue
            await self._wake.wait()

    async def _submit_from_database(self) -> None:
        while self._client.pending_events < MAX_SUBMITTED_EVENTS:
            after = self._position(self._submitted)
            page = await self._store.transact(partial(_queued, after))
            for event in page:
                if event.sequence > self._submitted:  # feed() may have been faster
                    self._submit(event)
            self._behind = self._submitted < self._committed
            if len(page) < PAGE_EVENTS:
                return

    def _submit(self, event: Queued) -> None:
        if self._client.pending_events >= MAX_SUBMITTED_EVENTS + PAGE_EVENTS:
            return
        message = logger_pb2.Event.FromString(event.body)
        try:
            self._client.submit(event.sequence, message)
        except HayflickError as error:
            if error.reason == ErrorReason.ERROR_REASON_AUDIT_UNAVAILABLE:
                return
            # A fault of ours. The gap it would leave must be seen in the record.
            log.error("event %d cannot be recorded: %s", event.position, error.message)  # noqa: TRY400
            stand_in = logger_pb2.Event(event="audit", timestamp=message.timestamp)
            stand_in.details.update({"decision": "event_unrecordable", "error": error.message[:500]})
            self._client.submit(event.sequence, stand_in)
        self._submitted = event.sequence

    async def _deliver_backlog(self) -> None:
        """Deliver what earlier boots recorded and did not see acknowledged."""
        while True:
            try:
                page = await self._store.transact(lambda tx: tx.queued(0, PAGE_EVENTS))
                page = [event for event in page if event.boot < self._boot]
                if not page:
                    return
                page = [event for event in page if event.boot == page[0].boot]
                await self._deliver_page(page)
            except HayflickError as error:
                log.warning("events of an earlier start wait for the logger: %s", error.message)
                await asyncio.sleep(RETRY_SECONDS)

    async def deliver_left_over(self) -> None:
        """Deliver, in its name, what a controller on the same database that is gone left waiting.

        Should it return meanwhile and deliver the same, the logger knows each event by
        its source and sequence.

        Raises:
            HayflickError: SERVICE_UNAVAILABLE, AUDIT_UNAVAILABLE; they wait on.
        """
        for controller_id in await self._store.transact(lambda tx: tx.left_over()):
            while page := await self._store.transact(partial(_queued_of, controller_id)):
                log.warning("%d events of controller %s are delivered for it", len(page), controller_id)
                await self._deliver_page(page, controller_id)

    async def _deliver_page(self, page: list[Queued], controller_id: str = "") -> None:
        whose = controller_id or self._store.identity.controller_id
        client = AuditClient(self._address, source_of(whose, page[0].boot), dial=self._dial)
        await client.start()
        try:
            for event in page:
                client.submit(event.sequence, logger_pb2.Event.FromString(event.body))
            await client.wait_acknowledged(page[-1].sequence, BACKLOG_TIMEOUT_SECONDS)
        finally:
            await client.close(flush_seconds=0)
        await self._store.transact(lambda tx: tx.delivered(page[-1].position, whose))

    def _acknowledged(self, sequence: int) -> None:
        del sequence
        self._drop.set()
        if self._behind:
            self._wake.set()

    async def _drop_delivered(self) -> None:
        # Lazily: a row that is dropped late is at worst sent twice, and known.
        while True:
            await self._drop.wait()
            await asyncio.sleep(RETRY_SECONDS)
            self._drop.clear()
            with contextlib.suppress(HayflickError):
                await self._drop_up_to(self._client.acknowledged)

    async def _drop_up_to(self, sequence: int) -> None:
        if sequence:
            position = self._position(sequence)
            await self._store.transact(lambda tx: tx.delivered(position))

    def _position(self, sequence: int) -> int:
        return Queued.position_of(self._boot, sequence)


def _queued(after: int, tx: Tx) -> list[Queued]:
    return tx.queued(after, PAGE_EVENTS)


def _queued_of(controller_id: str, tx: Tx) -> list[Queued]:
    """Return a page of another controller's events, all of one boot."""
    page = tx.queued(0, PAGE_EVENTS, controller_id)
    return [event for event in page if event.boot == page[0].boot]


def not_recorded(message: str) -> HayflickError:
    """Return the error about a fact that is kept here and not yet durable in the log."""
    return HayflickError(
        ErrorReason.ERROR_REASON_AUDIT_UNAVAILABLE,
        f"kept, and not yet in the audit log; ask again with the same request_id: {message}",
        metadata={"service": "logger"},
        retry_after_seconds=1.0,
    )


def unavailable(message: str) -> HayflickError:
    """Return the refusal of a decision that could not be recorded."""
    return HayflickError(
        ErrorReason.ERROR_REASON_AUDIT_UNAVAILABLE,
        f"the decision could not be recorded, so it was not taken: {message}",
        metadata={"service": "logger"},
        retry_after_seconds=1.0,
    )
