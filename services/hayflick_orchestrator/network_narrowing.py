"""Network licences taken from workers that live here, or are about to."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from hayflick.v1.resources_pb2 import NetworkPolicy

if TYPE_CHECKING:
    from hayflick_orchestrator.supervisor import Everyone
    from hayflick_orchestrator.workers import Worker

log = logging.getLogger(__name__)


async def narrow(population: Everyone, worker_id: str, network: NetworkPolicy) -> None:
    """Leave a worker no more than *network*; return once that is in force.

    One that is being born will be born with that; one that does not live here
    reaches nothing anyway.
    """
    for birth in population.births:
        if birth.worker_id == worker_id:
            birth.network = network
    worker = population.get(worker_id)
    if worker is not None:
        await _apply(worker, network)


async def _apply(worker: Worker, network: NetworkPolicy) -> None:
    # First what our own answers go by, then what holds without us.
    worker.record.resources.network.CopyFrom(network)
    for door in tuple(worker.doors.values()):
        # The newest word: an order that came later may have been carried out meanwhile.
        left = NetworkPolicy()
        left.CopyFrom(worker.record.resources.network)
        await door.narrow(left)
    log.info("worker %s has a narrower network policy", worker.worker_id)
