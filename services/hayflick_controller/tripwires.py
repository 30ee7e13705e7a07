"""What a node reports of a tripwire, checked. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hayflick.v1.resources_pb2 import DenialClass
from hayflick_rpc import wire
from hayflick_rpc.errors import invalid_field

if TYPE_CHECKING:
    from hayflick.v1 import controller_pb2

CLASSES = len(DenialClass.DESCRIPTOR.values)


@dataclass(frozen=True, slots=True)
class Report:
    """That a tripwire gave way and its node froze workers by itself.

    Attributes:
        worker_id: The worker that tripped it.
        frozen_worker_id: The top of what is frozen: that worker, or an ancestor of it.
        tripwire: As the contract names it.
        denials: Those that did it: the classes' short names and how many.
    """

    worker_id: str
    frozen_worker_id: str
    tripwire: str
    denials: tuple[tuple[str, int], ...]

    @property
    def reason(self) -> str:
        """Why its workers are quarantined."""
        counts = ", ".join(f"{name} {count}" for name, count in self.denials)
        return f"tripwire {self.tripwire}: {counts or 'no denials'}"


def parse_report(report: controller_pb2.TripwireReport) -> Report:
    """Return *report* checked.

    Raises:
        HayflickError: INVALID_FIELD.
    """
    if len(report.denials) > CLASSES:
        raise invalid_field("tripped.denials", f"must be at most {CLASSES}")
    return Report(
        wire.require_id("tripped.worker_id", report.worker_id),
        wire.require_id("tripped.frozen_worker_id", report.frozen_worker_id),
        wire.require_id("tripped.tripwire", report.tripwire),
        tuple(
            (DenialClass.Name(denial.denial_class).removeprefix("DENIAL_CLASS_").lower(), denial.count)
            for denial in report.denials
            if denial.denial_class in DenialClass.values()
        ),
    )
