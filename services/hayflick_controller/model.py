"""The nouns of the controller, as frozen values.

Times are whole microseconds since the Unix epoch (``*_us``), lengths of time
whole microseconds too, sizes bytes. Microseconds stay exact in JSON numbers,
in SQL integers and on the wire until the year 2255.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace

from hayflick_controller.terms import NO_TERMS, Terms

MAX_EXACT_INTEGER = 2**53 - 1
"""The largest integer that every JSON reader keeps exact (RFC 8785, section 3.2.2.3)."""


class State(enum.StrEnum):
    """Where a worker is in its life; all but ENDED hold a slot."""

    STARTING = "starting"
    RUNNING = "running"
    QUARANTINED = "quarantined"
    STOPPING = "stopping"
    ENDED = "ended"


class EndReason(enum.StrEnum):
    """Why a worker ended, in the words of the audit log."""

    COMPLETED = "completed"
    TASK_ERROR = "task_error"
    EXPIRED = "expired"
    KILLED = "killed"
    KILL_SWITCH = "kill_switch"
    HEARTBEAT_TIMEOUT = "heartbeat_timeout"
    OOM_KILLED = "oom_killed"
    CPU_EXCEEDED = "cpu_exceeded"
    LEASE_LOST = "lease_lost"
    NODE_LOST = "node_lost"
    SIGNALED = "signaled"
    LAUNCH_FAILED = "launch_failed"
    PROTOCOL_VIOLATION = "protocol_violation"
    OUTPUT_EXCEEDED = "output_exceeded"
    WALL_TIME_EXCEEDED = "wall_time_exceeded"
    MEMORY_EXCEEDED = "memory_exceeded"


class ManifestStatus(enum.StrEnum):
    """What became of a manifest; RESERVED alone holds a slot."""

    RESERVED = "reserved"
    REGISTERED = "registered"
    RETURNED = "returned"


class ScopeKind(enum.StrEnum):
    """What a latch lies over."""

    EVERYTHING = "everything"
    CONTRACT = "contract"
    WORKER = "worker"
    QUARANTINE = "quarantine"


@dataclass(frozen=True, slots=True)
class Scope:
    """Which workers a latch is about: all, a contract's, or a worker with its descendants.

    A quarantine is a latch too, over a worker and its descendants: it forbids
    births as a kill switch does, but freezes instead of killing.
    """

    kind: ScopeKind
    id: str = ""

    @property
    def key(self) -> str:
        """The scope as one word: how it is stored and how denials name it."""
        return f"{self.kind}/{self.id}" if self.id else self.kind.value

    @classmethod
    def from_key(cls, key: str) -> Scope:
        """Return the scope that :attr:`key` names."""
        kind, _, id_ = key.partition("/")
        return cls(ScopeKind(kind), id_)


EVERYTHING = Scope(ScopeKind.EVERYTHING)


@dataclass(frozen=True, slots=True)
class Latch:
    """A kill switch or a quarantine, engaged or not.

    ``epoch`` rises by one at each change, so that a manifest issued before one
    can be told from a manifest issued after it.
    """

    scope: Scope
    engaged: bool = False
    epoch: int = 0
    reason: str = ""
    change_us: int = 0


@dataclass(frozen=True, slots=True)
class NetworkPolicy:
    """What a worker may reach; nothing by default."""

    allow_controller: bool = False
    allow_external: bool = False
    allow_loopback: bool = False
    allowed_hosts: tuple[str, ...] = ()
    egress_limit_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Resources:
    """What a worker may use; 0 in an optional limit means the node's default."""

    cpu_millis: int
    memory_limit_bytes: int
    pids_limit: int = 0
    open_files_limit: int = 0
    file_size_limit_bytes: int = 0
    workspace_limit_bytes: int = 0
    tmp_limit_bytes: int = 0
    cpu_time_limit_us: int | None = None
    network: NetworkPolicy = NetworkPolicy()
    output_limit_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """What a worker used, as its node read it from its control groups."""

    memory_bytes: int = 0
    memory_peak_bytes: int = 0
    cpu_us: int = 0
    pids: int = 0


@dataclass(frozen=True, slots=True)
class Predicate:
    """A Python function that denies a birth when it is true; never unpickled here."""

    pickled: bytes = field(repr=False)
    python_version: str
    timeout_us: int


@dataclass(frozen=True, slots=True)
class StopCondition:
    """A rule over the population: either a CEL expression or a Python predicate."""

    name: str
    description: str = ""
    cel: str = ""
    predicate: Predicate | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    """What a contract allows. Never changes once the contract is created."""

    max_depth: int
    max_replicas: int
    cooldown_us: int = 0
    expiration_us: int | None = None
    manifest_ttl_us: int = 60_000_000
    display_name: str = ""
    stop_conditions: tuple[StopCondition, ...] = ()
    terms: Terms = NO_TERMS

    @property
    def has_predicates(self) -> bool:
        """Whether a birth under it must ask a node to evaluate Python."""
        return any(condition.predicate is not None for condition in self.stop_conditions)


@dataclass(frozen=True, slots=True)
class Contract:
    """A policy with its key and its population.

    ``population_version`` rises whenever something changes that a stop
    condition can see, so that a verdict can be told from a stale one.
    """

    contract_id: str
    policy: Policy
    key_id: str
    create_us: int
    active_count: int = 0
    reserved_count: int = 0
    population_version: int = 0


@dataclass(frozen=True, slots=True)
class Key:
    """A key that signs manifests, without its secret.

    Attributes:
        key_id: Its name.
        contract_id: Whose manifests it signs.
        create_us: When it was made.
        retire_us: When another took its place.
        revoke_us: When it was revoked; what it signed is refused from then on.
    """

    key_id: str
    contract_id: str
    create_us: int
    retire_us: int | None = None
    revoke_us: int | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """The signed permission for one birth."""

    manifest_id: str
    contract_id: str
    worker_id: str
    parent_id: str
    depth: int
    epoch: int
    state_snapshot_json: str = field(repr=False)
    resources: Resources
    issue_us: int
    expire_us: int
    key_id: str
    signature: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class Exit:
    """How a worker ended."""

    reason: EndReason
    end_us: int
    detail: str = ""
    exit_code: int = 0
    signal: int = 0


@dataclass(frozen=True, slots=True)
class Silence:
    """Why a worker counts as dead that nobody saw die: its node was silent for longer than its lease.

    Attributes:
        silent_us: How long ago the lease was last renewed, by the clock of whoever records it.
        lease_us: The lease; the node itself ends its workers when it is over.
    """

    silent_us: int
    lease_us: int


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker as recorded.

    ``path`` is its lineage; see :mod:`~hayflick_controller.lineage`. ``attestation`` is what
    its node found of its sandbox, as on the wire and without the checks; empty until told.
    """

    worker_id: str
    contract_id: str
    parent_id: str
    root_id: str
    path: str
    depth: int
    node_id: str
    state: State
    create_us: int
    expire_us: int | None
    last_heartbeat_us: int
    manifest: Manifest
    usage: Usage = Usage()
    degraded_layers: tuple[str, ...] = ()
    stop_reason: EndReason | None = None
    stop_detail: str = ""
    exit: Exit | None = None
    attestation: bytes = field(default=b"", repr=False)
    network: NetworkPolicy | None = None
    """What is left of its network policy, once some of it was taken from it."""

    @property
    def resources(self) -> Resources:
        """What it may use now; its manifest says what it was born with."""
        if self.network is None:
            return self.manifest.resources
        return replace(self.manifest.resources, network=self.network)

    @property
    def live(self) -> bool:
        """Whether it holds a slot."""
        return self.state is not State.ENDED


@dataclass(frozen=True, slots=True)
class Node:
    """A node as recorded: its live session is known by its digest alone."""

    node_id: str
    session_digest: str
    address: str
    python_version: str
    connect_us: int
    last_ack_us: int
    connected: bool = True
    controller_id: str = ""
    """Which controller it last connected to; several may share one database."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something for the audit log."""

    event: str
    timestamp_us: int
    contract_id: str = ""
    worker_id: str = ""
    parent_id: str = ""
    root_id: str = ""
    details: dict[str, str | int | float | bool | list[str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request was answered with, kept so that repeating it changes nothing.

    ``body`` is ``None``, or what was begun, while the request is still being carried out.
    ``position`` is the event that must be durable before the answer is given.
    """

    request_id: str
    method: str
    digest: str
    body: bytes | None
    position: int
    create_us: int
