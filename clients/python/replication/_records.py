"""What the services know of a worker, as read-only records."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import datetime

from replication._manifest import Manifest


class Stage(enum.StrEnum):
    """Where a worker is in its life."""

    STARTING = "starting"
    """It holds a slot of its contract while its sandbox is built."""
    RUNNING = "running"
    """Its init reported ready and beats."""
    QUARANTINED = "quarantined"
    """Frozen by the kernel, with all its descendants."""
    STOPPING = "stopping"
    """Told to end; some of its processes may still run."""
    ENDED = "ended"
    """Seen dead: none of its processes runs."""


class EndReason(enum.StrEnum):
    """Why a worker ended."""

    COMPLETED = "completed"
    """Its work was done."""
    TASK_ERROR = "task_error"
    """A task of its failed."""
    EXPIRED = "expired"
    """It reached the end of the life its contract allows."""
    KILLED = "killed"
    """Somebody stopped it, or an ancestor of its ended."""
    KILL_SWITCH = "kill_switch"
    """A kill switch over it was engaged."""
    HEARTBEAT_TIMEOUT = "heartbeat_timeout"
    """Its heartbeats stopped."""
    OOM_KILLED = "oom_killed"
    """The kernel killed one of its processes for want of memory."""
    CPU_EXCEEDED = "cpu_exceeded"
    """It used up the CPU time it was given."""
    LEASE_LOST = "lease_lost"
    """Its orchestrator lost the controller for longer than its lease."""
    NODE_LOST = "node_lost"
    """Its node went silent, and its lease has run out."""
    SIGNALED = "signaled"
    """A signal from outside Hayflick ended it."""
    LAUNCH_FAILED = "launch_failed"
    """Its sandbox could not be built, or its birth could not be recorded."""
    PROTOCOL_VIOLATION = "protocol_violation"
    """It broke the protocol of its channel."""
    OUTPUT_EXCEEDED = "output_exceeded"
    """A task of its printed more than its output limit."""
    WALL_TIME_EXCEEDED = "wall_time_exceeded"
    """A task of its ran past its deadline."""
    MEMORY_EXCEEDED = "memory_exceeded"
    """A task of its ran into its address-space limit."""


@dataclass(frozen=True)
class Usage:
    """What a worker used, read from its control groups.

    Attributes:
        memory_bytes: Memory in use, in bytes.
        memory_peak_bytes: The most memory it used at once, in bytes.
        cpu_seconds: CPU time of all its processes, the dead ones included.
        pids: Processes and threads alive.
    """

    memory_bytes: int
    memory_peak_bytes: int
    cpu_seconds: float
    pids: int


@dataclass(frozen=True)
class WorkerExit:
    """How a worker ended.

    Attributes:
        reason: Why; ``None`` when a newer service has a reason unknown here.
        detail: More about why, in the words of whoever ended it.
        exit_code: The exit code of its init or main task.
        signal: The signal that ended it, or 0.
        ended_at: When it was seen dead, in UTC.
    """

    reason: EndReason | None
    detail: str = ""
    exit_code: int = 0
    signal: int = 0
    ended_at: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class WorkerState:
    """A worker at one instant.

    Attributes:
        manifest: What it was born with.
        stage: Where it is in its life.
        created_at: When it was registered, in UTC.
        expires_at: When its life ends by contract, in UTC; ``None`` without an end.
        exit: How it ended; ``None`` while it lives.
    """

    manifest: Manifest
    stage: Stage
    created_at: datetime | None = None
    expires_at: datetime | None = None
    exit: WorkerExit | None = None

    @property
    def alive(self) -> bool:
        """Whether any process of it may still run."""
        return self.stage is not Stage.ENDED


@dataclass(frozen=True, kw_only=True)
class RegistryEntry(WorkerState):
    """A worker as the controller has it on record.

    Attributes:
        last_heartbeat: When the controller last heard of it, in UTC.
        root_id: The root of its family tree.
        node_id: The node that runs it.
        usage: What it used, as last heard.
        degraded_layers: Layers of the sandbox that its node lacks and its
            operator let go by name.
        isolation_grade: What its sandbox was measured to hold before it ran, "A", "B"
            or "C"; empty until its node told the controller.
    """

    last_heartbeat: datetime | None = None
    root_id: str = ""
    node_id: str = ""
    usage: Usage | None = None
    degraded_layers: tuple[str, ...] = ()
    isolation_grade: str = ""


@dataclass(frozen=True)
class Lineage:
    """A worker's family, the dead included.

    Attributes:
        ancestors: From the root down to its parent.
        worker: The worker itself.
        descendants: Parents before children.
    """

    ancestors: tuple[RegistryEntry, ...]
    worker: RegistryEntry
    descendants: tuple[RegistryEntry, ...]
