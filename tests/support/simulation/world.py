"""The real controller on a real SQLite file, between a record and nodes that a test holds.

What is not real is around it: time (:mod:`simulation.loop`), the logger's end of
the wire (:mod:`simulation.record`) and the nodes (:mod:`simulation.node`). It is
called as gRPC calls it, through its servicer, with messages.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from hayflick.v1 import controller_pb2 as pb
from hayflick.v1 import resources_pb2
from hayflick_controller.config import Config
from hayflick_controller.controller import Controller
from hayflick_controller.servicer import ControllerServicer
from hayflick_controller.store.database import sqlite_database
from hayflick_controller.store.protocol import Tx
from hayflick_controller.store.sql import SqlStore
from hayflick_rpc.clock import SteadyClock
from hayflick_rpc.errors import HayflickError
from simulation.loop import InlineThread, SimulatedLoop, Time
from simulation.node import BEAT_SECONDS, LEASE_SECONDS, Node
from simulation.record import Record

T = TypeVar("T")

SETTLE_SECONDS = 0.001
"""Longer than anything takes that needs no time, shorter than anything that waits."""
START_TIMEOUT_SECONDS = 20.0
AUDIT_TIMEOUT_SECONDS = 5.0
NODES = ("north", "south")


class World:
    """One controller and what is around it. Close it.

    Attributes:
        time: The machine's clocks.
        record: What the logger has.
        nodes: By name; they outlive the controller.
        start_seconds: When the controller last started.
    """

    def __init__(self) -> None:
        self.time = Time()
        self.record = Record()
        self.nodes = {name: Node(name, self.time) for name in NODES}
        self.start_seconds = 0.0
        self._numbers = itertools.count(1)
        self._directory = tempfile.TemporaryDirectory(prefix="hf-")
        self._runner = asyncio.Runner(loop_factory=lambda: SimulatedLoop(self.time))
        self._made: list[InlineThread] = []

    def request_id(self) -> str:
        """Return a request_id that no other request of this world has."""
        return f"request-{next(self._numbers)}"

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run *work* and whatever it sets off."""

        async def settled() -> T:
            try:
                return await work
            finally:
                await asyncio.sleep(SETTLE_SECONDS)

        return self._runner.run(settled())

    def run_for(self, work: Coroutine[Any, Any, None]) -> None:
        """Run *work* and not a turn longer."""
        self._runner.run(work)

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.run(asyncio.sleep(seconds))

    async def start(self) -> None:
        """Start the controller, on what an earlier start left."""
        data_dir = Path(self._directory.name) / "controller"
        config = Config(
            listen="unix:///nowhere",
            data_dir=data_dir,
            logger="unix:///nowhere-either",
            lease_seconds=LEASE_SECONDS,
            beat_interval_seconds=BEAT_SECONDS,
            audit_timeout_seconds=AUDIT_TIMEOUT_SECONDS,
            start_timeout_seconds=START_TIMEOUT_SECONDS,
        )
        self.start_seconds = self.time.seconds
        self.store = SqlStore(sqlite_database(config.database_file), self._make_thread)
        clock = SteadyClock(self.time.wall, self.time.boot)
        self.controller = await Controller.start(config, clock, self.store, self.record.dial)
        self.servicer = ControllerServicer(self.controller)

    def crash(self) -> None:
        """Kill the controller: nothing of it reaches its disk or the logger from this moment on.

        Its nodes lose their streams.
        """
        self._made[-1].die()
        self.record.cut()

        async def unwind() -> None:
            me = asyncio.current_task()
            while tasks := [task for task in asyncio.all_tasks() if task is not me]:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        self._runner.run(unwind())
        self.record.cut()
        self.store._close()
        for node in self.nodes.values():
            node.cut()

    async def call(self, request: Any) -> Any:
        """Make the call that *request* is for, as gRPC would."""
        method = request.DESCRIPTOR.name.removesuffix("Request")
        return await getattr(self.servicer, method)(request, None)

    async def call_all(self, requests: list[Any]) -> list[Any]:
        """Make calls at the same moment; return what each is answered or refused with."""
        return await asyncio.gather(*map(self.call, requests), return_exceptions=True)

    async def try_call(self, request: Any, turns: int | None = None) -> Any:
        """Make a call; return its answer or its refusal.

        Args:
            request: The call.
            turns: After how many turns of the loop to hang up, and to make it again at once.
        """
        task = asyncio.ensure_future(self.call(request))
        if turns is not None:
            for _ in range(turns):
                await asyncio.sleep(0)
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                task = asyncio.ensure_future(self.call(request))
        try:
            return await task
        except HayflickError as refusal:
            return refusal

    async def call_once(self, request: Any, turns: int) -> None:
        """Make a call and leave it alone after so many turns of the loop."""
        task = asyncio.ensure_future(self.call(request))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        for _ in range(turns):
            await asyncio.sleep(0)

    def read(self, query: Callable[[Tx], T]) -> T:
        """Ask the controller's database."""
        return self.run(self.store.transact(query))

    def workers(self) -> dict[str, resources_pb2.Worker]:
        """Return every worker that the controller knows."""
        page = self.run(self.call(pb.ListWorkersRequest(page_size=1_000)))
        assert not page.next_page_token
        return {worker.worker_id: worker for worker in page.workers}

    def close(self) -> None:
        """End everything."""
        self.crash()
        self._runner.close()
        self._directory.cleanup()

    def _make_thread(self, run: Callable[[Any], None]) -> InlineThread:
        self._made.append(InlineThread(run))
        return self._made[-1]
