"""What comes of an order over several workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hayflick_orchestrator.workers import Worker


@dataclass(frozen=True, slots=True)
class Report:
    """What came of an order over several workers.

    Attributes:
        confirmed: Those of which it is certain.
        unconfirmed: Those of which it is not, yet.
        elapsed_seconds: Until the last of them was certain.
        ended: Those whose end this report alone tells the controller.
        unpopulated: Whether the kernel said of every control group that no process is left in it.
    """

    confirmed: tuple[str, ...]
    unconfirmed: tuple[str, ...]
    elapsed_seconds: float
    ended: tuple[Worker, ...] = ()
    unpopulated: bool = False
