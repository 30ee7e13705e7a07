"""One worker of this node: what was registered, the sandbox it is, and where it is in its life."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Protocol

from google.protobuf.duration_pb2 import Duration

from hayflick.v1.controller_pb2 import ContractTerms, WorkerBeat
from hayflick.v1.errors_pb2 import ErrorReason
from hayflick.v1.orchestrator_pb2 import Sandbox as SandboxMessage
from hayflick.v1.resources_pb2 import Attestation, EndReason, Exit, Manifest, NetworkPolicy, State, Usage
from hayflick.v1.resources_pb2 import Worker as WorkerMessage
from hayflick_orchestrator.lifecycle import Ask, Life
from hayflick_rpc import wire
from hayflick_rpc.clock import boot_seconds
from hayflick_rpc.errors import HayflickError
from hayflick_sandbox import cgroups

if TYPE_CHECKING:
    from collections.abc import Callable

    from hayflick_orchestrator.exits import Verdict
    from hayflick_orchestrator.sandboxes import Sandbox

_serials = itertools.count(1)


class Door(Protocol):
    """A way out of a sandbox that its licence gives."""

    def hold(self) -> None:
        """Let nothing more through, and lose nothing, until :meth:`release`."""

    def release(self) -> None:
        """Let through again."""

    async def narrow(self, network: NetworkPolicy) -> None:
        """Allow what *network* does, and no more; return once that is in force."""

    def close(self) -> None:
        """Shut it for good, and cut whoever is in it. Idempotent."""


class Birth:
    """A launch in progress. Its manifest is not believed until the controller registered it.

    Attributes:
        ask: The end asked for meanwhile; nothing of it may run afterwards.
        settled: Resolves when the launch is over, either way.
        registered: Whether the controller committed it.
        cgroup_path: Where its processes will be; empty until that is known.
        network: What is left of its network policy, when some was taken meanwhile.
        begin_boot: When it began, before the controller was asked, by the clock that nobody sets.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.worker_id = manifest.worker_id
        self.contract_id = manifest.contract_id
        self.parent_id = manifest.parent_id
        self.ask: Ask | None = None
        self.frozen = False
        self.registered = False
        self.cgroup_path = ""
        self.network: NetworkPolicy | None = None
        self.begin_boot = boot_seconds()
        self.settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def check(self) -> None:
        """Return when the launch may go on.

        Raises:
            HayflickError: KILL_SWITCH_ENGAGED, QUARANTINED or WORKER_NOT_RUNNING
                when an order came meanwhile.
        """
        if self.ask is not None:
            raise refusal_after(self.worker_id, self.ask.reason, State.STATE_STOPPING)
        if self.frozen:
            raise quarantined(self.parent_id)


@dataclass(slots=True)
class Worker:
    """A worker whose sandbox is ready, until nothing of it is left.

    Attributes:
        record: As the controller registered it, with its manifest.
        terms: What its contract has this node hold it to.
        attestation: What was found of its sandbox before it ran, with every check.
        attestation_told: Whether the controller was told of it on the present stream.
        verdict: Resolves when it is dead, with why.
        ended: Resolves when nothing of it is left and the controller knows.
        own_freeze: Whether a freeze was ordered for it, not only for an ancestor.
        thawed_monotonic: When it was last let out of quarantine.
        told_by_result: Whether the result of an order tells the controller of its end.
        doors: Its ways out, by name; closed when it is dead.
    """

    record: WorkerMessage
    terms: ContractTerms
    attestation: Attestation
    sandbox: Sandbox
    cpu_limit_seconds: float | None
    serial: int
    life: Life
    usage: Usage
    verdict: asyncio.Future[Exit]
    ended: asyncio.Future[WorkerMessage]
    own_freeze: bool = False
    thawed_monotonic: float = 0.0
    told_by_result: bool = False
    doors: dict[str, Door] = field(default_factory=dict)
    attestation_told: bool = False
    heard_monotonic: float = 0.0
    read_monotonic: float | None = None
    metered_monotonic: float | None = None
    beat_event_monotonic: float | None = None
    main_task: asyncio.Task[None] | None = None
    cancel_expiry: Callable[[], None] | None = None
    expire_boot: float | None = None
    on_end: Callable[[], None] | None = None

    @classmethod
    def of(
        cls, record: WorkerMessage, terms: ContractTerms, attestation: Attestation, sandbox: Sandbox
    ) -> Worker:
        """Return the worker registered as *record* under *terms* that runs in *sandbox*, found to be so."""
        # Listings carry it without the checks, which are many.
        record.attestation.CopyFrom(attestation)
        record.attestation.ClearField("probes")
        loop = asyncio.get_running_loop()
        resources = record.resources
        limit = wire.seconds(resources.cpu_time_limit) if resources.HasField("cpu_time_limit") else None
        return cls(
            record=record,
            terms=terms,
            attestation=attestation,
            sandbox=sandbox,
            cpu_limit_seconds=limit,
            serial=next(_serials),
            life=Life(),
            usage=Usage(),
            verdict=loop.create_future(),
            ended=loop.create_future(),
        )

    def expire_from(self, begin_boot: float) -> None:
        """Fix when its life by contract ends, where it does, given when its birth began here.

        Both instants on record are the controller's, whose wall clock may be another than
        ours, also on one machine: somebody set it since one of us started. Only their
        distance means anything here, and the birth began before the first of them.
        """
        if self.record.HasField("expire_time"):
            life = wire.instant(self.record.expire_time) - wire.instant(self.record.create_time)
            self.expire_boot = begin_boot + life.total_seconds()

    @property
    def worker_id(self) -> str:
        """Its identity."""
        return self.record.worker_id

    @property
    def contract_id(self) -> str:
        """Its contract."""
        return self.record.contract_id

    @property
    def parent_id(self) -> str:
        """Its parent, or empty for a root."""
        return self.record.parent_id

    @property
    def cgroup_path(self) -> str:
        """Where its processes are."""
        return self.sandbox.cgroup_path

    @property
    def held(self) -> bool:
        """Whether its channels are cut: it is quarantined, or about to be."""
        return not self.sandbox.gate.is_open

    @property
    def may_call(self) -> bool:
        """Whether its policy lets it replicate and drive its descendants."""
        return self.record.resources.network.allow_controller

    def message(self) -> WorkerMessage:
        """Return the worker as the wire carries it, as it is now."""
        message = WorkerMessage()
        message.CopyFrom(self.record)
        message.state = self.life.state
        message.usage.CopyFrom(self.usage)
        message.last_heartbeat_time.CopyFrom(wire.timestamp(self.sandbox.last_beat_time))
        if self.verdict.done():
            message.exit.CopyFrom(self.verdict.result())
        return message

    def sandbox_message(self) -> SandboxMessage:
        """Return the worker as seen from outside."""
        return SandboxMessage(
            worker=self.message(),
            host_pid=self.sandbox.pid or 0,
            host_uid=self.sandbox.uid,
            cgroup_path=self.cgroup_path,
            ready_time=wire.timestamp(self.sandbox.ready_time) if self.sandbox.ready_time else None,
            build_time=wire.duration(self.sandbox.build_seconds),
        )

    def beat(self) -> WorkerBeat:
        """Return its sign of life, the first on a stream with what was found of its sandbox."""
        told, self.attestation_told = self.attestation_told, True
        return WorkerBeat(
            worker_id=self.worker_id,
            state=self.life.state,
            usage=self.usage,
            beat_time=wire.timestamp(self.sandbox.last_beat_time),
            attestation=None if told else self.attestation,
        )

    def expired(self) -> bool:
        """Return whether its contract allows it no more life."""
        return self.expire_boot is not None and self.expire_boot <= boot_seconds()

    def require_running(self) -> None:
        """Return when a task may be started.

        Raises:
            HayflickError: WORKER_EXPIRED, KILL_SWITCH_ENGAGED, QUARANTINED or
                WORKER_NOT_RUNNING.
        """
        if self.life.accepts_tasks and not self.held and not self.expired():
            return
        if self.verdict.done():
            raise refusal_after(self.worker_id, self.verdict.result().reason, self.life.state)
        if self.life.ask is not None:
            raise refusal_after(self.worker_id, self.life.ask.reason, self.life.state)
        if self.expired():
            raise refusal_after(self.worker_id, EndReason.END_REASON_EXPIRED, self.life.state)
        if self.held or self.life.state == State.STATE_QUARANTINED:
            raise quarantined(self.worker_id)
        raise refusal_after(self.worker_id, EndReason.END_REASON_UNSPECIFIED, self.life.state)


def refusal_after(
    worker_id: str, reason: EndReason.ValueType, state: State.ValueType = State.STATE_ENDED
) -> HayflickError:
    """Return why nothing can be asked of a worker that ended, or will, for *reason*."""
    if reason == EndReason.END_REASON_EXPIRED:
        return HayflickError(
            ErrorReason.ERROR_REASON_WORKER_EXPIRED,
            f"worker {worker_id}: its life is over by contract",
            metadata={"worker_id": worker_id},
        )
    if reason == EndReason.END_REASON_KILL_SWITCH:
        return HayflickError(
            ErrorReason.ERROR_REASON_KILL_SWITCH_ENGAGED,
            f"worker {worker_id}: a kill switch over it was engaged",
            metadata={"worker_id": worker_id},
        )
    words = EndReason.Name(reason).removeprefix("END_REASON_").lower()
    return HayflickError(
        ErrorReason.ERROR_REASON_WORKER_NOT_RUNNING,
        f"worker {worker_id} does not run",
        metadata={
            "worker_id": worker_id,
            "state": State.Name(state).removeprefix("STATE_").lower(),
            "end_reason": words if reason else "",
        },
    )


def quarantined(worker_id: str) -> HayflickError:
    """Return the refusal for a worker that is frozen."""
    return HayflickError(
        ErrorReason.ERROR_REASON_QUARANTINED,
        f"worker {worker_id} is quarantined",
        metadata={"worker_id": worker_id},
    )


def worker_unknown(worker_id: str) -> HayflickError:
    """Return the refusal for a worker that this node does not know."""
    return HayflickError(
        ErrorReason.ERROR_REASON_WORKER_UNKNOWN,
        f"this node has no worker {worker_id}",
        metadata={"worker_id": worker_id},
    )


def usage_message(read: cgroups.Usage, before: Usage) -> Usage:
    """Return what was *read* for the wire; a figure that is missing, or fell, keeps its value *before*.

    Memory and processes may fall; peaks and CPU time may not, and read as zero
    once a control group is gone.
    """
    cpu_seconds = max(read.cpu_seconds or 0.0, wire.seconds(before.cpu_time))
    return Usage(
        memory_bytes=before.memory_bytes if read.memory_bytes is None else read.memory_bytes,
        memory_peak_bytes=max(read.memory_peak_bytes or 0, before.memory_peak_bytes),
        cpu_time=wire.duration(cpu_seconds) if cpu_seconds else Duration(),
        pids=before.pids if read.pids is None else read.pids,
    )


NOTHING_READ = cgroups.Usage(None, None, None, None)


def final_usage(read: cgroups.Usage, before: Usage, cpu_seconds: float, max_rss_bytes: int) -> Usage:
    """Return what an ended worker used in all.

    Where no control group counted, what the kernel told the parent of its init
    stands in: CPU time of all that it waited for, and the largest of their
    resident sets (getrusage(2)).
    """
    usage = usage_message(read, before)
    if read.cpu_seconds is None and not wire.seconds(usage.cpu_time):
        usage.cpu_time.CopyFrom(wire.duration(cpu_seconds))
    if read.memory_peak_bytes is None and not usage.memory_peak_bytes:
        usage.memory_peak_bytes = max_rss_bytes
    usage.ClearField("pids")
    usage.ClearField("memory_bytes")
    return usage


def exit_message(verdict: Verdict, end_time: datetime) -> Exit:
    """Return *verdict* for the wire."""
    return Exit(
        reason=verdict.reason,
        detail=verdict.detail,
        exit_code=verdict.exit_code,
        signal=verdict.signal,
        end_time=wire.timestamp(end_time),
    )
