"""One worker as the proxy knows it: what it may reach, what it used, what it has open."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hayflick_rpc import hosts

# Denials of one worker that are told: so many at once, and so many a second; the rest are counted.
DENIALS_AT_ONCE = 10
DENIALS_PER_SECOND = 1.0

Tell = Callable[[dict[str, Any]], None]


@dataclass(eq=False, slots=True)
class Connection:
    """One connection of a worker.

    Attributes:
        verdict: Why it was cut; empty while nobody did.
        timer: Ends it when nothing passes.
    """

    task: asyncio.Task[None]
    host: str | hosts.Address = ""
    port: int = 0
    address: hosts.Address | None = None
    sent_bytes: int = 0
    received_bytes: int = 0
    verdict: str = ""
    timer: asyncio.Timeout | None = None
    started: float = field(default_factory=time.monotonic)

    def cut(self, verdict: str) -> None:
        """End it."""
        self.verdict = self.verdict or verdict
        self.task.cancel()


class Allowance:
    """What one worker may do, and did.

    Args:
        rules: The hosts it may reach.
        limit_bytes: What may cross in all; ``None`` for no limit.
        tell: Takes an event.
    """

    def __init__(self, rules: tuple[hosts.Rule, ...], limit_bytes: int | None, tell: Tell) -> None:
        self.rules = rules
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self.connections: set[Connection] = set()
        self.flowing = asyncio.Event()
        self.flowing.set()
        self._tell = tell
        self._suppressed = 0
        self._tokens = float(DENIALS_AT_ONCE)
        self._filled = time.monotonic()

    def take(self, count: int) -> int:
        """Return how many of *count* bytes may still cross, and count those as crossed."""
        if self.limit_bytes is not None:
            count = max(0, min(count, self.limit_bytes - self.used_bytes))
        self.used_bytes += count
        return count

    @property
    def exhausted(self) -> bool:
        """Whether not one byte more may cross."""
        return self.limit_bytes is not None and self.used_bytes >= self.limit_bytes

    def narrow(self, rules: tuple[hosts.Rule, ...], limit_bytes: int | None) -> None:
        """Allow this and no more, also to what is open already."""
        self.rules, self.limit_bytes = rules, limit_bytes
        for connection in self.connections:
            if connection.address is None:
                # Still being made: whoever makes it asks the new rules, or is too late.
                connection.cut("narrowed")
            elif hosts.refusal(rules, connection.host, connection.port) or not hosts.may_dial(
                rules, connection.address, connection.port
            ):
                connection.cut("narrowed")
        if self.exhausted:
            self.cut_all("budget")

    def cut_all(self, verdict: str) -> None:
        """End every connection."""
        for connection in self.connections:
            connection.cut(verdict)

    def hold(self) -> None:
        """Let nothing pass."""
        self.flowing.clear()
        for connection in self.connections:
            if connection.timer is not None:
                connection.timer.reschedule(None)

    def denied(self, connection: Connection, verdict: str) -> None:
        """Tell of a connection that was refused, or count it."""
        now = time.monotonic()
        self._tokens = min(DENIALS_AT_ONCE, self._tokens + (now - self._filled) * DENIALS_PER_SECOND)
        self._filled = now
        if self._tokens < 1:
            self._suppressed += 1
            return
        self._tokens -= 1
        self.told(connection, verdict)

    def told(self, connection: Connection, verdict: str) -> None:
        """Tell of a connection that is over, and of how many were not told of."""
        event: dict[str, Any] = {
            "host": str(connection.host),
            "port": connection.port,
            "verdict": verdict,
            "bytes_out": connection.sent_bytes,
            "bytes_in": connection.received_bytes,
            "seconds": round(time.monotonic() - connection.started, 6),
        }
        if connection.address is not None:
            event["address"] = str(connection.address)
        if self._suppressed:
            event["suppressed"], self._suppressed = self._suppressed, 0
        self._tell(event)
