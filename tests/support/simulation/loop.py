"""An event loop whose time passes only when nobody has anything left to do, and a database without a thread.

With both, a run is the same each time: no thread and no clock of the machine has a say in it.
"""

from __future__ import annotations

import asyncio
import selectors
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hayflick_controller.store.thread import MAX_BATCH, Job, Run, Thread, deliver

BOOT_SECONDS = 1_000.0
EPOCH_SECONDS = 1_700_000_000.0


class Stuck(Exception):
    """Everybody waits for somebody else."""


@dataclass
class Time:
    """The clocks of a machine.

    Attributes:
        seconds: Since it started; never set, only passing.
        step_seconds: By how much somebody set its wall clock.
    """

    seconds: float = BOOT_SECONDS
    step_seconds: float = 0.0

    def boot(self) -> float:
        """Return what CLOCK_BOOTTIME shows."""
        return self.seconds

    def wall(self) -> float:
        """Return what the wall clock shows."""
        return EPOCH_SECONDS + self.seconds + self.step_seconds


class _Jump(selectors.DefaultSelector):
    """Instead of waiting for a timer, lets its time come."""

    def __init__(self, time: Time) -> None:
        super().__init__()
        self._time = time

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if not events and timeout is None:
            raise Stuck
        if not events and timeout:
            self._time.seconds += timeout
        return events


class SimulatedLoop(asyncio.SelectorEventLoop):
    """Runs in *time*. What would go to a thread is done at once."""

    def __init__(self, time: Time) -> None:
        super().__init__(_Jump(time))
        self._simulated = time

    def time(self) -> float:
        """Return the loop's time, which is the machine's."""
        return self._simulated.seconds

    def run_in_executor(  # type: ignore[override] -- a future either way
        self, executor: object, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        """Call *func* now."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 -- it is for whoever awaits the future
            future.set_exception(error)
        return future


class InlineThread(Thread):
    """Runs the store's batches as callbacks of the loop: a commit in one, its news in a later one.

    A crash may come between any two callbacks. After :meth:`die` nothing reaches the database.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._jobs: deque[Job] = deque()
        self._open = False
        self._dead = False

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._open = True

    def submit(
        self, work: Callable[..., Any], *, durable: bool = False, needs: object = None
    ) -> asyncio.Future[Any]:
        if self._loop is None:
            raise RuntimeError("the store is not open")
        job = Job(work, durable, needs, self._loop.create_future())
        if self._dead:
            job.future.cancel()
        else:
            self._jobs.append(job)
            self._loop.call_soon(self._turn)
        return job.future

    async def stop(self) -> None:
        while self._jobs:  # noqa: ASYNC110 -- each turn of the loop runs some
            await asyncio.sleep(0)
        self._loop = None

    def die(self) -> None:
        """Be killed: what was committed stays, what was not never will be."""
        self._dead = True
        self._jobs.clear()

    def _turn(self) -> None:
        batch = [self._jobs.popleft() for _ in range(min(len(self._jobs), MAX_BATCH))]
        wanted = [job for job in batch if not job.future.cancelled()]
        if wanted and self._loop is not None:
            self._run(wanted)
            self._loop.call_soon(self._tell, wanted)

    def _tell(self, batch: list[Job]) -> None:
        if not self._dead:
            deliver(batch)
