"""The last output of a sandbox's tasks, kept for whoever must find out what it did: no I/O."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

# Of one sandbox, all its tasks together: what a thousand sandboxes cost is bounded too.
MAX_BYTES = 64 * 1024
# Output that arrives byte by byte, by turns, must not cost more to keep than it is.
MAX_PIECES = 256


@dataclass(slots=True)
class Piece:
    """Consecutive output of one task on one stream."""

    task_id: str
    stream: str
    data: bytearray


class Transcript:
    """The newest :data:`MAX_BYTES` of what a sandbox's tasks printed, in the order it was read.

    Attributes:
        dropped_bytes: How much older output is not kept any more.
    """

    def __init__(self, max_bytes: int = MAX_BYTES, max_pieces: int = MAX_PIECES) -> None:
        self._max_bytes = max_bytes
        self._max_pieces = max_pieces
        self._pieces: deque[Piece] = deque()
        self._bytes = 0
        self.dropped_bytes = 0

    def add(self, task_id: str, stream: str, data: bytes) -> None:
        """Note that a task printed *data*."""
        over = len(data) - self._max_bytes
        if over >= 0:  # a flood: nothing older has room, and moving it about would cost
            self.dropped_bytes += over + self._bytes
            self._pieces.clear()
            self._bytes = 0
            data = data[over:]
        last = self._pieces[-1] if self._pieces else None
        if last is not None and last.task_id == task_id and last.stream == stream:
            last.data += data
        else:
            self._pieces.append(Piece(task_id, stream, bytearray(data)))
        self._bytes += len(data)
        self._trim()

    def _trim(self) -> None:
        while self._bytes > self._max_bytes or len(self._pieces) > self._max_pieces:
            first = self._pieces[0]
            over = self._bytes - self._max_bytes
            if len(self._pieces) <= self._max_pieces and len(first.data) > over:
                del first.data[:over]
                gone = over
            else:
                self._pieces.popleft()
                gone = len(first.data)
            self._bytes -= gone
            self.dropped_bytes += gone

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """What is kept, oldest first."""
        return tuple(self._pieces)
