"""What one worker may do and use, as frozen values that check themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

MIB = 1024 * 1024
# RFC 8785 and JavaScript carry integers exactly up to here; nothing real is larger.
MAX_INTEGER = 2**53 - 1
# It travels to init in one packet.
MAX_ENVIRONMENT_BYTES = 32 * 1024

_RANGES: dict[str, tuple[int, int]] = {
    "memory_bytes": (16 * MIB, MAX_INTEGER),
    "cpu_millis": (10, 1_024_000),
    "pids": (1, 1_000_000),
    "open_files": (16, 1_000_000),
    "file_size_bytes": (0, MAX_INTEGER),
    "workspace_bytes": (0, MAX_INTEGER),
    "tmp_bytes": (0, MAX_INTEGER),
    "stack_bytes": (64 * 1024, 1024 * MIB),
    "io_read_bytes_per_second": (MIB, MAX_INTEGER),
    "io_reads_per_second": (10, 1_000_000_000),
    "cpu_time_seconds": (1, MAX_INTEGER),
}


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a worker may use. Every limit is enforced by the kernel, those of io where it can.

    Attributes:
        memory_bytes: All its processes and private file systems together.
        cpu_millis: CPU bandwidth, in thousandths of one CPU.
        pids: Processes and threads at once, its init not counted.
        open_files: Descriptors per process.
        file_size_bytes: The largest file it may write.
        workspace_bytes: Its private ``/workspace``.
        tmp_bytes: Its private ``/tmp``, and ``/dev/shm`` likewise.
        stack_bytes: Stack of each process.
        io_read_bytes_per_second: From each disk behind what it is shown read-only,
            where the host has the controller; nothing of its own lies on a disk.
        io_reads_per_second: The same, in operations.
        cpu_time_seconds: CPU time of each process; ``None`` for no limit.
    """

    memory_bytes: int = 256 * MIB
    cpu_millis: int = 1_000
    pids: int = 128
    open_files: int = 256
    file_size_bytes: int = 1024 * MIB
    workspace_bytes: int = 256 * MIB
    tmp_bytes: int = 64 * MIB
    stack_bytes: int = 8 * MIB
    cpu_time_seconds: int | None = None
    io_read_bytes_per_second: int = 128 * MIB
    io_reads_per_second: int = 4_000

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: naming the field and its range.
        """
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is None and name == "cpu_time_seconds":
                continue
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"{name}: must be an integer from {low} to {high}, not {value!r}")


_HOSTNAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Policy:
    """The confinement of one worker.

    Attributes:
        limits: How much it may use.
        loopback: Whether its own loopback interface is up.
        hostname: What it sees as the name of its machine.
        environment: Variables beside the sandbox's own few; nothing is inherited.
        worker_service: Whether a door to its own WorkerService is opened.
        proxy: Whether a door to the allow-list proxy is opened, on a loopback that serves nothing else.
        external: Whether its network namespace is made for somebody to connect it to the world.
    """

    limits: Limits = field(default_factory=Limits)
    loopback: bool = False
    hostname: str = "worker"
    environment: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    worker_service: bool = False
    proxy: bool = False
    external: bool = False

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: naming the field.
        """
        for name in ("loopback", "worker_service", "proxy", "external"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name}: must be true or false, not {getattr(self, name)!r}")
        if not isinstance(self.hostname, str) or not _HOSTNAME.fullmatch(self.hostname):
            raise ValueError(f"hostname: {self.hostname!r} is not a host name of at most 63 characters")
        for name, value in self.environment.items():
            if not isinstance(name, str) or not _VARIABLE.fullmatch(name):
                raise ValueError(f"environment: {name!r} is not a variable's name")
            if not isinstance(value, str) or "\0" in value:
                raise ValueError(f"environment: the value of {name} is not a string without NUL")
        size = len(json.dumps(dict(self.environment)))
        if size > MAX_ENVIRONMENT_BYTES:
            raise ValueError(f"environment: {size} bytes as JSON are over {MAX_ENVIRONMENT_BYTES}")

    @property
    def inet(self) -> bool:
        """Whether it may make AF_INET sockets at all."""
        return self.loopback or self.proxy or self.external

    def to_json(self) -> dict[str, Any]:
        """Return the policy as JSON values, for :meth:`from_json`."""
        return {
            "limits": {name: getattr(self.limits, name) for name in Limits.__slots__},
            "loopback": self.loopback,
            "hostname": self.hostname,
            "environment": dict(self.environment),
            "worker_service": self.worker_service,
            "proxy": self.proxy,
            "external": self.external,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Policy:
        """Return the policy that :meth:`to_json` wrote.

        Raises:
            ValueError, TypeError: it is not one.
        """
        return cls(**{**values, "limits": Limits(**values["limits"])})
