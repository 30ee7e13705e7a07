"""What a worker may use and reach."""

# ruff: noqa: TRY004 -- users are promised one kind of error for every bad value

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from replication import _checks

BYTES_PER_MB = 1024 * 1024
# The controller's own bounds: what it has on record must be readable here.
MAX_CPUS = 1024.0
MAX_MEMORY_MB = (2**53 - 1) / BYTES_PER_MB
MAX_PIDS = 4_194_304
MAX_OPEN_FILES = 1_073_741_816
MAX_CPU_TIME_SECONDS = 366 * 86_400.0
MAX_ALLOWED_HOSTS = 64
MAX_HOST_CHARS = 261  # "*.", the longest name, ":65535"


@dataclass(frozen=True)
class NetworkPolicy:
    """What a worker may reach beyond its sandbox; all else is unreachable.

    Attributes:
        allow_controller: Whether the worker may call its own line to replicate
            and to drive its descendants.
        allow_external: Whether it may reach the outside network. Refused with
            :class:`~replication.errors.LimitNotEnforceable` where the node
            cannot provide that safely.
        allow_loopback: Whether the sandbox's own loopback interface is up.
        allowed_hosts: Hosts that it may reach through a proxy outside its sandbox,
            64 at most, each ``"name"``, ``"name:port"`` or ``"*.name:port"`` in
            lower case; without a port, 443 and 80.
        egress_limit_mb: What may cross that proxy, both ways together, in MiB;
            ``None`` for no limit.

    Raises:
        ValueError: A value is out of range; the message begins with the field.
    """

    allow_controller: bool = True
    allow_external: bool = False
    allow_loopback: bool = False
    allowed_hosts: Sequence[str] = ()
    egress_limit_mb: float | None = None

    def __post_init__(self) -> None:
        for name in ("allow_controller", "allow_external", "allow_loopback"):
            _checks.flag(name, getattr(self, name))
        if isinstance(self.allowed_hosts, str) or not isinstance(self.allowed_hosts, Sequence):
            raise ValueError(f"allowed_hosts: must be a list, not {self.allowed_hosts!r}")
        if len(self.allowed_hosts) > MAX_ALLOWED_HOSTS:
            raise ValueError(f"allowed_hosts: at most {MAX_ALLOWED_HOSTS} are allowed")
        for host in self.allowed_hosts:
            _checks.text("allowed_hosts", host, MAX_HOST_CHARS, min_chars=1)
        object.__setattr__(self, "allowed_hosts", tuple(self.allowed_hosts))
        if self.egress_limit_mb is not None:
            whole_bytes("egress_limit_mb", self.egress_limit_mb, 1 / BYTES_PER_MB, MAX_MEMORY_MB)


@dataclass(frozen=True)
class ResourceSpec:
    """What a worker may use. Every limit is enforced by the kernel.

    A limit that is ``None`` is the node's default, never "unlimited", but for
    ``cpu_time_limit_seconds``, without which only ``cpu_limit`` holds.

    Attributes:
        cpu_limit: CPU bandwidth in CPUs, from 0.01 to 1,024; 0.5 is half a CPU.
            Rounded to thousandths.
        memory_limit_mb: Memory of all the worker's processes and private files
            together, in MiB; at least 16.
        network_policy: What it may reach.
        pids_limit: Processes and threads at once.
        open_files_limit: Open file descriptors per process.
        file_size_limit_mb: Size of the largest file it may write, in MiB.
        workspace_limit_mb: Size of its private workspace, in MiB.
        tmp_limit_mb: Size of its private ``/tmp``, in MiB.
        cpu_time_limit_seconds: CPU time that each of its processes may use.
        output_limit_mb: What each task may print, standard output and error
            together, in MiB.

    Raises:
        ValueError: A value is out of range; the message begins with the field.
    """

    cpu_limit: float
    memory_limit_mb: float
    network_policy: NetworkPolicy = field(default_factory=NetworkPolicy)
    pids_limit: int | None = field(default=None, kw_only=True)
    open_files_limit: int | None = field(default=None, kw_only=True)
    file_size_limit_mb: float | None = field(default=None, kw_only=True)
    workspace_limit_mb: float | None = field(default=None, kw_only=True)
    tmp_limit_mb: float | None = field(default=None, kw_only=True)
    cpu_time_limit_seconds: float | None = field(default=None, kw_only=True)
    output_limit_mb: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _checks.number("cpu_limit", self.cpu_limit, 0.01, MAX_CPUS)
        whole_bytes("memory_limit_mb", self.memory_limit_mb, 16, MAX_MEMORY_MB)
        if not isinstance(self.network_policy, NetworkPolicy):
            raise ValueError(f"network_policy: must be a NetworkPolicy, not {self.network_policy!r}")
        if self.pids_limit is not None:
            _checks.integer("pids_limit", self.pids_limit, 1, MAX_PIDS)
        if self.open_files_limit is not None:
            _checks.integer("open_files_limit", self.open_files_limit, 1, MAX_OPEN_FILES)
        for name in ("file_size_limit_mb", "workspace_limit_mb", "tmp_limit_mb", "output_limit_mb"):
            if (size := getattr(self, name)) is not None:
                whole_bytes(name, size, 1 / BYTES_PER_MB, MAX_MEMORY_MB)
        if self.cpu_time_limit_seconds is not None:
            _checks.number(
                "cpu_time_limit_seconds", self.cpu_time_limit_seconds, 0.000001, MAX_CPU_TIME_SECONDS
            )


def whole_bytes(name: str, megabytes: object, minimum: float, maximum: float) -> None:
    """Refuse a size in MiB that is out of range, or no whole number of bytes, which no limit can be.

    Raises:
        ValueError: The message begins with *name*.
    """
    size = _checks.number(name, megabytes, minimum, maximum) * BYTES_PER_MB
    if size != int(size):
        raise ValueError(f"{name}: {megabytes!r} MiB is not a whole number of bytes")
