"""The logger's settings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

MIN_SEGMENT_BYTES = 64 * 1024


@dataclass(frozen=True)
class Config:
    """Keeps the record: appends, lists, follows and verifies events."""

    listen: str = field(metadata={"help": "where clients call: unix:///absolute/path"})
    data_dir: Path = field(metadata={"help": "the record's directory, for this user alone"})
    max_segment_bytes: int = field(
        default=8 * 1024 * 1024, metadata={"help": "size at which a write-ahead file is full"}
    )
    origin: str = field(
        default="",
        metadata={"help": "the log's public name, such as example.com/audit, when it is made; else made up"},
    )
    max_metrics: int = field(
        default=1_000_000, metadata={"help": "metric samples kept; the oldest give way to new ones"}
    )
    check_all_on_start: bool = field(
        default=True,
        metadata={"help": "verify every entry before serving, not just the newest"},
    )
    drain_seconds: float = field(
        default=2.0, metadata={"help": "how long senders may go on with their last words at the end"}
    )
    lifeline_fd: int | None = field(
        default=None, metadata={"help": "a descriptor whose end-of-file means: stop"}
    )

    def __post_init__(self) -> None:
        """Check what the types cannot.

        Raises:
            ValueError: naming the setting.
        """
        if not MIN_SEGMENT_BYTES <= self.max_segment_bytes <= 2**40:
            raise ValueError(f"max_segment_bytes: must be from {MIN_SEGMENT_BYTES} to {2**40}")
        if not 1_000 <= self.max_metrics <= 10**9:
            raise ValueError("max_metrics: must be from 1,000 to 1,000,000,000")
        if not math.isfinite(self.drain_seconds) or not 0 <= self.drain_seconds <= 3_600:
            raise ValueError("drain_seconds: must be from 0 to 3600")
