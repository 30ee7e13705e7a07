"""What follows from denials: counts, events, and a quarantine that needs no order.

A node freezes first and tells afterwards. Its report makes the controller turn
the freeze into a quarantine, and is repeated until an order shows that it did.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hayflick.v1.controller_pb2 import TripwireReport
from hayflick.v1.errors_pb2 import ErrorReason
from hayflick.v1.resources_pb2 import EndReason
from hayflick_orchestrator.denials import Budget, Class, Gap, Wire, class_name, class_of, to_wire
from hayflick_orchestrator.lifecycle import Ask
from hayflick_orchestrator.listeners import Listeners
from hayflick_orchestrator.sandboxes import SandboxError
from hayflick_rpc.errors import HayflickError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hayflick.v1.resources_pb2 import DenialCount
    from hayflick_orchestrator.denials import Trip
    from hayflick_orchestrator.records import Records
    from hayflick_orchestrator.sandboxes import Sandbox
    from hayflick_orchestrator.supervisor import Everyone, Supervisor
    from hayflick_orchestrator.workers import Worker
    from hayflick_sandbox.denials import Denial

# Events of one sandbox: these at once, then one a second with the count of
# those that were left out between.
EVENTS_AT_ONCE = 10
EVENTS_PER_SECOND = 1.0
# The last denials of each, for whoever looks closer.
RECENT = 32

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Ledger:
    """What is known of one sandbox's denials."""

    sandbox: Sandbox
    events: Budget
    worker: Worker | None = None
    wires: tuple[Wire, ...] = ()
    counts: Counter[Class] = field(default_factory=Counter)
    recent: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=RECENT))
    gap: Gap = field(default_factory=Gap)
    tell: asyncio.TimerHandle | None = None


class Tripwires:
    """Watches every sandbox of the node.

    Args:
        records: Where events go.
        node_id: The node's name.
        listening: Whether this node's sandboxes have listeners.

    Attributes:
        on_report: Told of each new report.
    """

    def __init__(self, records: Records, node_id: str, *, listening: bool) -> None:
        self._records = records
        self._node_id = node_id
        self._listening = listening
        self._loop = asyncio.get_running_loop()
        self._listeners = Listeners(self._denied)
        self._ledgers: dict[str, _Ledger] = {}
        self._reports: dict[str, TripwireReport] = {}
        self._supervisor: Supervisor | None = None
        self._population: Everyone | None = None
        self.on_report: Callable[[TripwireReport], None] = lambda _: None

    def serve(self, supervisor: Supervisor, population: Everyone) -> None:
        """Take those who can freeze; before any worker is adopted."""
        self._supervisor, self._population = supervisor, population

    # Sandboxes

    def watch(self, sandbox: Sandbox) -> None:
        """Answer for a sandbox that is ready, before anything runs in it.

        Raises:
            SandboxError: it handed over no listener although this node asks for one.
        """
        listener = sandbox.descriptors.pop("tripwire", None)
        events = Budget(EVENTS_PER_SECOND, EVENTS_AT_ONCE, time.monotonic())
        if listener is None:
            if self._listening:
                raise SandboxError("tripwire", 0, "init handed over no listener")
        else:
            self._listeners.watch(sandbox, listener)
        self._ledgers[sandbox.launch_id] = _Ledger(sandbox, events)

    def adopt(self, worker: Worker) -> None:
        """Note whose sandbox it is, and what its contract's tripwires are."""
        ledger = self._ledgers[worker.sandbox.launch_id]
        ledger.worker = worker
        ledger.wires = tuple(map(Wire, worker.terms.tripwires))

    def forget(self, sandbox: Sandbox) -> None:
        """Let go of a sandbox that is dead; what was left out of the record is told now."""
        self._listeners.forget(sandbox)
        ledger = self._ledgers.pop(sandbox.launch_id, None)
        if ledger is None:
            return
        self._tell_gap(ledger)
        if ledger.worker is not None:
            self._reports.pop(ledger.worker.worker_id, None)

    def close(self) -> None:
        """Let go of all."""
        self._listeners.close()
        for ledger in tuple(self._ledgers.values()):
            self.forget(ledger.sandbox)

    # Denials

    def count(self, worker: Worker, denial_class: Class, count: int = 1) -> None:
        """Count denials that were no call, such as what a census found; their event is the caller's."""
        ledger = self._ledgers.get(worker.sandbox.launch_id)
        if ledger is not None:
            self._add(ledger, denial_class, count)

    def counts(self, worker: Worker) -> list[DenialCount]:
        """Return how often a worker was refused, by class."""
        ledger = self._ledgers.get(worker.sandbox.launch_id)
        return [] if ledger is None else to_wire(ledger.counts)

    def recent(self, worker: Worker) -> list[dict[str, Any]]:
        """Return the last denials of a worker, oldest first, as their events say them."""
        ledger = self._ledgers.get(worker.sandbox.launch_id)
        return [] if ledger is None else list(ledger.recent)

    def _denied(self, sandbox: Sandbox, denial: Denial) -> None:
        ledger = self._ledgers[sandbox.launch_id]
        denial_class = class_of(denial.denial_class)
        details: dict[str, Any] = {
            "class": denial.denial_class,
            "call": denial.call,
            "arguments": dict(denial.arguments),
            "errno": denial.error,
        }
        ledger.recent.append(details)
        now = time.monotonic()
        if ledger.events.take(now):
            self._tell(ledger, details)
        else:
            ledger.gap.add(denial_class)
            if ledger.tell is None:
                wait = ledger.events.wait_seconds(now)
                ledger.tell = self._loop.call_later(wait, self._tell_gap, ledger)
        self._add(ledger, denial_class, 1)

    def _tell(self, ledger: _Ledger, details: Mapping[str, Any]) -> None:
        details = {"node_id": self._node_id, **details}
        if ledger.gap:
            details["left_out"] = ledger.gap.close()
        if ledger.worker is not None:
            self._records.denial(ledger.worker.record, details)
        else:
            # A predicate, or a worker's sandbox before its worker has one: no name but its place.
            self._records.denial(None, {"sandbox": ledger.sandbox.cgroup_path, **details})

    def _tell_gap(self, ledger: _Ledger) -> None:
        if ledger.tell is not None:
            ledger.tell.cancel()
            ledger.tell = None
        if ledger.gap:
            ledger.events.take(time.monotonic())
            self._tell(ledger, {})

    # Tripwires

    def _add(self, ledger: _Ledger, denial_class: Class, count: int) -> None:
        ledger.counts[denial_class] += count
        now = time.monotonic()
        for wire in ledger.wires:
            for _ in range(count):
                if (trip := wire.note(denial_class, now)) is not None and ledger.worker is not None:
                    self._trip(ledger.worker, trip)

    def _trip(self, worker: Worker, trip: Trip) -> None:
        assert self._supervisor is not None
        top = self._top(worker) if trip.whole_family else worker
        if top.worker_id in self._reports or top.life.ending:
            return  # one quarantine is enough, and an end is more
        report = TripwireReport(
            worker_id=worker.worker_id,
            frozen_worker_id=top.worker_id,
            tripwire=trip.name,
            denials=trip.counts(),
        )
        self._reports[top.worker_id] = report
        self._supervisor.spawn(self._freeze(top, worker, trip, report), f"tripwire of {top.worker_id}")

    def _top(self, worker: Worker) -> Worker:
        assert self._population is not None
        return (worker, *self._population.ancestors(worker.worker_id))[-1]

    async def _freeze(self, top: Worker, worker: Worker, trip: Trip, report: TripwireReport) -> None:
        assert self._supervisor is not None
        outcome = "frozen"
        try:
            frozen = await self._supervisor.freeze(top.worker_id)
            if frozen.unconfirmed:
                outcome = "freezing"  # ordered, and not confirmed in time
        except HayflickError as error:
            if error.reason == ErrorReason.ERROR_REASON_WORKER_UNKNOWN:
                return  # it ended meanwhile
            # What cannot be frozen must not run on either.
            outcome = "killed"
            text = f"tripwire {trip.name}: {error.message}"
            self._supervisor.ask_end(top, Ask(EndReason.END_REASON_KILLED, text[:256]))
        self._records.tripwire(
            worker.record,
            {
                "node_id": self._node_id,
                "tripwire": trip.name,
                "frozen_worker_id": top.worker_id,
                "denials": {class_name(one): count for one, count in sorted(trip.denials.items())},
                "outcome": outcome,
            },
        )
        if top.worker_id in self._reports:
            self.on_report(report)

    def reports(self) -> tuple[TripwireReport, ...]:
        """Return those that no order of the controller has answered yet."""
        return tuple(self._reports.values())

    def ordered(self, worker_id: str) -> None:
        """Note that the controller gave an order about a worker: it knows."""
        self._reports.pop(worker_id, None)
