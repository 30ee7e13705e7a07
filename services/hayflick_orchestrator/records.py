"""What the orchestrator puts on record: events of its workers, and what they use."""

from __future__ import annotations

import logging
from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

from hayflick.v1.logger_pb2 import Event, MetricSample
from hayflick.v1.resources_pb2 import Worker
from hayflick_rpc import attestation, wire
from hayflick_rpc.errors import HayflickError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hayflick.v1.resources_pb2 import Attestation, Usage

RECORD_TIMEOUT_SECONDS = 5.0
_ROOM = {"heartbeat": 0.25, "egress": 0.5}
"""Up to which fullness a kind of event is kept: what says least, or can be many, gives way first."""

log = logging.getLogger(__name__)


class Audit(Protocol):
    """The part of ``hayflick_rpc.audit.AuditClient`` that is used here."""

    async def record(self, event: Event, timeout_seconds: float) -> int:
        """Queue an event; return when it is durable."""

    def enqueue(self, event: Event) -> int:
        """Queue an event."""

    def emit_metric(self, sample: MetricSample) -> None:
        """Queue a sample."""


class Records:
    """Words for what happens on this node.

    Args:
        audit: Takes them.
        fullness: Tells how full the place is where they wait for the logger, from 0 to 1.
    """

    def __init__(self, audit: Audit, fullness: Callable[[], float] = lambda: 0.0) -> None:
        self._audit = audit
        self._fullness = fullness
        self._lost: Counter[str] = Counter()

    async def worker_started(
        self,
        worker: Worker,
        attested: Attestation,
        *,
        host_pid: int,
        host_uid: int,
        build_seconds: float,
    ) -> None:
        """Record durably what was found of *worker*'s sandbox, and that it runs.

        The two are queued together, so the first costs no waiting of its own.

        Raises:
            HayflickError: AUDIT_UNAVAILABLE.
        """
        details: dict[str, Any] = {
            "depth": worker.depth,
            "node_id": worker.node_id,
            "host_pid": host_pid,
            "host_uid": host_uid,
            "build_seconds": round(build_seconds, 6),
        }
        if worker.degraded_layers:
            details["degraded_layers"] = list(worker.degraded_layers)
        self._audit.enqueue(_event("worker_attested", worker, attestation.details(attested)))
        await self._audit.record(_event("worker_started", worker, details), RECORD_TIMEOUT_SECONDS)

    def birth_refused(self, worker: Worker, decision: str, details: Mapping[str, Any]) -> None:
        """Note that this node did not carry out a birth that the controller had allowed."""
        self._note(_event("audit", worker, {"decision": decision, "node_id": worker.node_id, **details}))

    def isolation_insufficient(self, worker: Worker, attested: Attestation, min_grade: str) -> None:
        """Note that *worker* never ran, and what was found of the sandbox it would have had."""
        details = {**attestation.details(attested), "min_grade": min_grade}
        self._note(_event("isolation_insufficient", worker, details))

    def heartbeat(self, worker: Worker) -> None:
        """Note that *worker* was heard."""
        self._note(_event("heartbeat", worker, {"node_id": worker.node_id}))

    def task_started(self, worker: Worker, task_id: str, kind: str) -> None:
        """Note that a task of *worker* began."""
        self._note(_event("task_started", worker, {"task_id": task_id, "kind": kind}))

    def task_finished(
        self,
        worker: Worker,
        task_id: str,
        *,
        outcome: str,
        reason: str,
        cpu_seconds: float,
        elapsed_seconds: float,
    ) -> None:
        """Note how a task of *worker* ended; never what it said."""
        details: dict[str, Any] = {
            "task_id": task_id,
            "outcome": outcome,
            "cpu_seconds": round(cpu_seconds, 6),
            "elapsed_seconds": round(elapsed_seconds, 6),
        }
        if reason:
            details["reason"] = reason[:512]
        self._note(_event("task_finished", worker, details))

    def file(self, name: str, worker: Worker, *, path: str, size_bytes: int, sha256: str) -> None:
        """Note that a file went into or out of *worker*; never what is in it."""
        self._note(_event(name, worker, {"path": path, "size_bytes": size_bytes, "sha256": sha256}))

    async def evidence_captured(self, worker: Worker, details: Mapping[str, Any]) -> None:
        """Record durably that a bundle is kept, so that whoever reads it finds its hash on record."""
        try:
            await self._audit.record(_event("evidence_captured", worker, details), RECORD_TIMEOUT_SECONDS)
        except HayflickError as error:
            # Queued all the same, unless there was no room for it.
            log.warning("the evidence of %s is not on record yet: %s", worker.worker_id, error)

    def evidence_failed(self, worker: Worker, details: Mapping[str, Any]) -> None:
        """Note that evidence could not be captured, and why."""
        self._note(_event("evidence_failed", worker, details))

    def egress(self, worker: Worker, details: Mapping[str, Any]) -> None:
        """Note a connection of *worker* through the proxy, or one that it was refused."""
        self._note(_event("egress", worker, {"node_id": worker.node_id, **details}))

    def census_drift(self, worker: Worker | None, details: Mapping[str, Any]) -> None:
        """Note what the kernel shows and nobody declared, or the other way round."""
        if worker is None:
            self.node("census_drift", str(details["node_id"]), details)
        else:
            self._note(_event("census_drift", worker, details))

    def denial(self, worker: Worker | None, details: Mapping[str, Any]) -> None:
        """Note that a sandbox was refused what only an attack asks for; ``None`` for one of no worker."""
        self._note(_event("denial", worker or Worker(), details))

    def tripwire(self, worker: Worker, details: Mapping[str, Any]) -> None:
        """Note that a tripwire gave way, and what was done about it."""
        self._note(_event("tripwire", worker, details))

    def node(self, name: str, node_id: str, details: Mapping[str, Any]) -> None:
        """Note something about the node itself."""
        event = Event(event=name, timestamp=wire.timestamp(datetime.now(UTC)))
        event.details.update({"node_id": node_id, **details})
        self._note(event)

    def usage(self, worker: Worker, usage: Usage) -> None:
        """Note what *worker* uses."""
        now = wire.timestamp(datetime.now(UTC))
        for name, value in (
            ("memory_bytes", usage.memory_bytes),
            ("memory_peak_bytes", usage.memory_peak_bytes),
            ("cpu_seconds", wire.seconds(usage.cpu_time)),
            ("pids", usage.pids),
        ):
            self._audit.emit_metric(
                MetricSample(
                    name=name,
                    value=float(value),
                    timestamp=now,
                    contract_id=worker.contract_id,
                    worker_id=worker.worker_id,
                )
            )

    def _note(self, event: Event) -> None:
        # These say what was seen, not what was decided, so no decision waits for them.
        if self._fullness() >= _ROOM.get(event.event, 1.0):
            self._lose(event, "too many wait for the logger")
            return
        try:
            self._audit.enqueue(event)
        except HayflickError as error:
            self._lose(event, error.message)

    def _lose(self, event: Event, why: str) -> None:
        if not self._lost[event.event]:  # said once an outage and kind; the record will say how many
            log.warning("events %s are not recorded from now on: %s", event.event, why)
        self._lost[event.event] += 1

    def tell_lost(self, node_id: str) -> None:
        """Put on record how many events were left out, once there is room for all kinds again."""
        if not self._lost or self._fullness() >= min(_ROOM.values()):
            return
        event = Event(event="events_lost", timestamp=wire.timestamp(datetime.now(UTC)))
        event.details.update({"node_id": node_id, "counts": dict(self._lost)})
        try:
            self._audit.enqueue(event)
        except HayflickError as error:
            log.warning("how many events were lost is not on record yet: %s", error.message)
        else:
            self._lost.clear()


def _event(name: str, worker: Worker, details: Mapping[str, Any]) -> Event:
    event = Event(
        event=name,
        timestamp=wire.timestamp(datetime.now(UTC)),
        contract_id=worker.contract_id,
        worker_id=worker.worker_id,
        parent_id=worker.parent_id,
        root_id=worker.root_id,
    )
    event.details.update(dict(details))
    return event
