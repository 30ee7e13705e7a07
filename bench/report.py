"""What the benchmark prints."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Report:
    """Collects rows and prints each as it comes."""

    peer_ms: float | None = None

    def row(self, what: str, figure: str, note: str = "") -> None:
        """Print one figure."""
        print(f"  {what:<46} {figure:>18}   {note}", flush=True)

    def times(self, what: str, seconds: Sequence[float], beside: str = "") -> None:
        """Print a median with its spread, and its ratio to the peer's unless *beside* has another."""
        ordered = sorted(seconds)
        median = statistics.median(ordered) * 1_000
        spread = f"min {ordered[0] * 1_000:.2f}, p99 {ordered[int(len(ordered) * 0.99)] * 1_000:.2f}"
        ratio = f"{median / self.peer_ms:.2f}x bwrap, " if self.peer_ms else ""
        ratio = f"{beside}, " if beside else ratio
        self.row(what, f"{median:.2f} ms", ratio + spread)
