"""What the controller's process is told."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

DATABASE_NAME = "controller.db"
MAX_SHARED_FLUSH_SECONDS = 7.0
"""Less than half of ``nodes.WRITE_SLACK_US``: one write that fails must not let leases run out."""
NAME_NAME = "controller.name"
CLOCK_NAME = "controller.clock"


@dataclass(frozen=True)
class Config:
    """Decides who may be born and who must end."""

    listen: str = field(metadata={"help": "where to serve, a unix:/// target"})
    data_dir: Path = field(metadata={"help": "directory of what the controller keeps, for this user alone"})
    logger: str = field(metadata={"help": "the logger's unix:/// target"})
    database: str | None = field(
        default=None,
        metadata={
            "help": "a postgresql:// URL without a password, to be shared by several controllers;"
            " default: a SQLite file in the data directory"
        },
    )
    lifeline_fd: int | None = field(
        default=None, metadata={"help": "descriptor whose end-of-file stops the service"}
    )
    lease_seconds: float = field(
        default=15.0, metadata={"help": "how long a node's workers may run without the controller"}
    )
    beat_interval_seconds: float = field(default=1.0, metadata={"help": "how often a node must beat"})
    audit_timeout_seconds: float = field(
        default=5.0, metadata={"help": "how long a decision may wait for the logger"}
    )
    flush_interval_seconds: float = field(
        default=5.0, metadata={"help": "how often heartbeats are written to the database"}
    )
    request_retention_seconds: float = field(
        default=86_400.0, metadata={"help": "how long a request_id is remembered"}
    )
    start_timeout_seconds: float = field(
        default=60.0, metadata={"help": "how long a worker may take from its registration to its first beat"}
    )
    drain_seconds: float = field(
        default=5.0, metadata={"help": "how long running calls may go on after the signal to stop"}
    )

    def __post_init__(self) -> None:
        """Refuse settings that cannot be meant.

        Raises:
            ValueError: naming the setting.
        """
        for name in (
            "lease_seconds",
            "beat_interval_seconds",
            "audit_timeout_seconds",
            "flush_interval_seconds",
            "request_retention_seconds",
            "start_timeout_seconds",
            "drain_seconds",
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: must be a positive number of seconds, not {value}")
        if self.database is not None:
            from hayflick_controller.store import postgres

            postgres.check(self.database)
            if self.flush_interval_seconds > MAX_SHARED_FLUSH_SECONDS:
                raise ValueError(
                    "flush_interval_seconds: must be at most"
                    f" {MAX_SHARED_FLUSH_SECONDS} with a shared database"
                )
        if self.beat_interval_seconds * 2 > self.lease_seconds:
            raise ValueError("lease_seconds: must be at least twice beat_interval_seconds")

    @property
    def database_file(self) -> Path:
        """The SQLite file."""
        return self.data_dir / DATABASE_NAME

    @property
    def name_file(self) -> Path:
        """Where the controller's name is kept when the database is not its own."""
        return self.data_dir / NAME_NAME

    @property
    def clock_file(self) -> Path:
        """Where the time is kept that the controller goes by in this boot of its machine."""
        return self.data_dir / CLOCK_NAME
