"""The lease: how long a node may go on without hearing from the controller.

Pure: the caller brings the clock, and it must be a monotonic one, so that
setting the wall clock neither ends workers nor lets them outlive their lease.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# Beats that wait for an acknowledgement; far more than a lease can hold.
MAX_UNACKNOWLEDGED_BEATS = 1_024
HEAD_START_SECONDS = 0.5
"""How long before its lease ends a node begins to end its workers, so that they are dead when it does."""
MAX_HEAD_START = 0.1
"""Of a short lease, the head start is no more than this part."""


@dataclass(slots=True)
class Lease:
    """A promise to stop, renewed by each acknowledgement.

    It runs from when the acknowledged beat was *sent*, never from when the
    acknowledgement came: the controller counts from when the beat arrived,
    which is later, so the node always stops before the controller takes it
    for lost.

    Attributes:
        length_seconds: How long it lasts from each renewal.
    """

    length_seconds: float
    _renewed_at: float
    _sent_at: dict[int, float] = field(default_factory=dict)

    def sent(self, sequence: int, now: float) -> None:
        """Note that the beat *sequence* leaves at *now*."""
        self._sent_at[sequence] = now
        while len(self._sent_at) > MAX_UNACKNOWLEDGED_BEATS:
            del self._sent_at[min(self._sent_at)]

    def acknowledged(self, sequence: int) -> None:
        """Renew from when the beat *sequence* left; one never sent renews nothing."""
        at = self._sent_at.get(sequence)
        if at is None:
            return
        self._renewed_at = max(self._renewed_at, at)
        for older in [other for other in self._sent_at if other <= sequence]:
            del self._sent_at[older]

    def welcomed(self, hello_at: float, length_seconds: float) -> None:
        """Begin anew on a new stream whose hello left at *hello_at*."""
        self.length_seconds = length_seconds
        self._renewed_at = max(self._renewed_at, hello_at)
        self._sent_at.clear()

    def remaining_seconds(self, now: float) -> float:
        """Return for how long workers may still run; with zero or less they must be ended now.

        That is a head start before the lease itself is over: dying takes time.
        """
        head_start_seconds = min(HEAD_START_SECONDS, self.length_seconds * MAX_HEAD_START)
        return self._renewed_at + self.length_seconds - head_start_seconds - now
