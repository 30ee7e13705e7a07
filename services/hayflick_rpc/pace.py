"""Pure: how long a sender lets a batch fill before it sends it.

A batch costs the sender and the logger the same however little is in it. Who
sends one event after the other, each once the one before is durable, must not
wait for company that never comes. Where several do so side by side, events come
while others are on their way; as long as that is seen, batches keep a distance
in which the next one fills.
"""

from __future__ import annotations

SPACING_SECONDS = 0.008
CROWD_SECONDS = 0.1


class Pace:
    """Times the batches of one sender. Instants are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self._sent_at = float("-inf")
        self._crowded_until = float("-inf")
        self._under_way = False

    def submitted(self, now: float) -> None:
        """Take note that an event came."""
        if self._under_way:
            self._crowded_until = now + CROWD_SECONDS

    def sent(self, now: float) -> None:
        """Take note that a batch was sent."""
        self._sent_at = now
        self._under_way = True

    def answered(self) -> None:
        """Take note that it was answered, or will not be."""
        self._under_way = False

    def wait_seconds(self, now: float) -> float:
        """Return how long the next batch should still fill."""
        return max(0.0, self._sent_at + SPACING_SECONDS - now) if now < self._crowded_until else 0.0
