"""The orchestrator's settings."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from hayflick_sandbox.identities import parse_range


@dataclass(frozen=True)
class Config:
    """Runs workers in sandboxes on one node."""

    listen: str = field(metadata={"help": "where clients call: unix:///absolute/path"})
    controller: str = field(metadata={"help": "the controller's address: unix:///absolute/path"})
    logger: str = field(metadata={"help": "the logger's address: unix:///absolute/path"})
    node_id: str = field(metadata={"help": "this node's name, unique among live nodes"})
    data_dir: Path = field(
        metadata={"help": "a directory for the node's own files: evidence, and events that the logger lacks"}
    )
    allow_degraded: tuple[str, ...] = field(
        default=(), metadata={"help": "sandbox layers to do without when missing, by name, comma-separated"}
    )
    uid_range: str = field(
        default="", metadata={"help": "FIRST-LAST of the host uids for workers; root's choice alone"}
    )
    ready_timeout_seconds: float = field(
        default=10.0, metadata={"help": "how long a sandbox may take to be ready"}
    )
    heartbeat_timeout_seconds: float = field(
        default=10.0, metadata={"help": "how long a worker's init may be silent"}
    )
    launches_at_once: int = field(default=16, metadata={"help": "sandboxes built at the same time"})
    drain_seconds: float = field(
        default=5.0, metadata={"help": "how long running calls may go on at the end"}
    )
    evidence_total_bytes: int = field(
        default=256 * 1024 * 1024,
        metadata={"help": "what bundles of evidence may have in all; oldest go first"},
    )
    census_seconds: float = field(
        default=5.0, metadata={"help": "how often what was declared is compared with what the kernel shows"}
    )
    lifeline_fd: int | None = field(
        default=None, metadata={"help": "a descriptor whose end-of-file means: stop"}
    )

    def __post_init__(self) -> None:
        """Check what the types cannot.

        Raises:
            ValueError: naming the setting.
        """
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", self.node_id, re.ASCII) or self.node_id in (".", ".."):
            raise ValueError("node_id: must be 1 to 64 characters of [A-Za-z0-9_.-]")
        for name in ("ready_timeout_seconds", "heartbeat_timeout_seconds", "drain_seconds", "census_seconds"):
            value = getattr(self, name)
            if not math.isfinite(value) or not 0 < value <= 3_600:
                raise ValueError(f"{name}: must be above 0 and at most 3600")
        if not 1024 * 1024 <= self.evidence_total_bytes <= 1024**4:
            raise ValueError("evidence_total_bytes: must be from 1 MiB to 1 TiB")
        if self.uid_range:
            try:
                parse_range(self.uid_range)
            except ValueError as error:
                raise ValueError(f"uid_range: {error}") from None
        if not 1 <= self.launches_at_once <= 256:
            raise ValueError("launches_at_once: must be from 1 to 256")
