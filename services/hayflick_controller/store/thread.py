"""The database's thread: takes what waits together, and gives the outcomes back together.

Under load several transactions wait while one runs. Taking them as one batch
costs one wake-up of either side instead of one for each, and lets the database
commit them together.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

STACK_BYTES = 16 * 1024 * 1024
"""The database's thread evaluates CEL, which is recursive; its stack must not depend on ulimit."""
MAX_BATCH = 64
"""How many transactions may wait for one another's commit."""

_stack_lock = threading.Lock()

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Job:
    """Something to be done on the thread, and what came of it.

    Attributes:
        work: What to do; the thread's owner knows how.
        durable: Whether it must survive a power cut.
        needs: What it is going to read; the thread's owner knows how that is said.
        future: Of whoever waits, on the event loop.
        value: What it returned.
        error: What it raised.
        told: What to call on the event loop before its waiter goes on.
    """

    work: Callable[..., Any]
    durable: bool
    needs: Any
    future: asyncio.Future[Any]
    value: Any = None
    error: BaseException | None = None
    told: Callable[[], None] | None = None


Run = Callable[[list[Job]], None]


class Thread:
    """One thread that runs batches of jobs, in the order in which they were asked for.

    Args:
        run: Runs a batch on the thread and fills in what came of each job.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: asyncio.Future[None] | None = None

    def start(self) -> None:
        """Start it, for the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._ended = self._loop.create_future()
        # A daemon: a service that dies without closing its store must not hang on it.
        thread = threading.Thread(target=self._work, name="database", daemon=True)
        with _stack_lock:
            previous = threading.stack_size(STACK_BYTES)
            try:
                thread.start()
            finally:
                threading.stack_size(previous)

    def submit(
        self, work: Callable[..., Any], *, durable: bool = False, needs: object = None
    ) -> asyncio.Future[Any]:
        """Queue *work*; the future holds what it returns or raises. Cancelled in time, it is not begun.

        Raises:
            RuntimeError: The thread does not run.
        """
        if self._loop is None:
            raise RuntimeError("the store is not open")
        job = Job(work, durable, needs, self._loop.create_future())
        self._queue.put(job)
        return job.future

    async def stop(self) -> None:
        """End the thread when what was asked for before is done."""
        if self._loop is not None:
            assert self._ended is not None
            self._loop = None
            self._queue.put(None)
            await self._ended

    def _work(self) -> None:
        assert self._ended is not None
        loop = self._ended.get_loop()
        batch: list[Job] = []
        job = self._queue.get()
        while job is not None:
            batch.append(job)
            try:
                if len(batch) < MAX_BATCH:
                    job = self._queue.get_nowait()
                    continue
            except queue.Empty:
                pass
            self._do(batch, loop)
            batch = []
            job = self._queue.get()
        self._do(batch, loop)
        loop.call_soon_threadsafe(self._ended.set_result, None)

    def _do(self, batch: list[Job], loop: asyncio.AbstractEventLoop) -> None:
        # Nobody waits for the cancelled any more, and nothing of theirs has begun.
        wanted = [job for job in batch if not job.future.cancelled()]
        if wanted:
            self._run(wanted)
            loop.call_soon_threadsafe(deliver, wanted)


def deliver(batch: list[Job]) -> None:
    """Tell what came of each job to its follower and to whoever waits; on the event loop."""
    for job in batch:
        if job.told is not None:
            try:
                job.told()
            except Exception:
                log.exception("whoever follows the commits failed")
        if job.future.done():
            continue
        if job.error is not None:
            job.future.set_exception(job.error)
        else:
            job.future.set_result(job.value)
