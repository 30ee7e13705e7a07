"""What nodes say of the sandboxes that they checked: verified, kept, and held against the contract.

The node compared the grade with the contract's floor already, before the worker ran.
Here it is compared once more, by who wrote the contract and with what the node signed:
a node that errs, or lies less well than it could, has its worker taken away.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hayflick.v1.resources_pb2 import Attestation
from hayflick_controller import ends, events
from hayflick_controller.model import EndReason
from hayflick_controller.terms import IsolationGrade
from hayflick_rpc import attestation

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hayflick_controller.clock import Clock
    from hayflick_controller.links import Link
    from hayflick_controller.model import Worker
    from hayflick_controller.store import Tx

MAX_ATTESTATION_BYTES = 32 * 1024

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Told:
    """One node's word about one worker, verified or not."""

    worker_id: str
    grade: IsolationGrade
    valid: bool
    body: bytes

    @property
    def summary(self) -> bytes:
        """The same without its checks, which are many."""
        message = Attestation.FromString(self.body)
        message.ClearField("probes")
        return message.SerializeToString()


class Attestations:
    """Those that were heard and not yet written."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._heard: dict[str, Told] = {}

    @property
    def waiting(self) -> bool:
        """Whether any is still to be written."""
        return bool(self._heard)

    def hear(self, link: Link, worker_id: str, message: Attestation) -> None:
        """Take what the node at the other end of *link* says of a worker of its own."""
        small = message.ByteSize() <= MAX_ATTESTATION_BYTES
        valid = small and attestation.verify(message, worker_id, link.attestation_public_key)
        if not valid:
            log.warning("node %s attests worker %s and cannot be verified", link.node_id, worker_id)
        try:
            grade = IsolationGrade(message.grade) if valid else IsolationGrade.UNSPECIFIED
        except ValueError:
            grade = IsolationGrade.UNSPECIFIED  # of a later version; here it means nothing
        body = message.SerializeToString() if valid else b""
        self._heard[worker_id] = Told(worker_id, grade, valid, body)

    def take(self) -> dict[str, Told]:
        """Return what waits, to be written; give it back to :meth:`keep` when it could not be."""
        heard, self._heard = self._heard, {}
        return heard

    def keep(self, told: dict[str, Told]) -> None:
        """Take back what could not be written; what was heard since is newer."""
        self._heard = {**told, **self._heard}

    def settle(self, tx: Tx, told: dict[str, Told], started: Iterable[str]) -> bool:
        """Write what was *told*, and begin to end who runs in less than its contract demands.

        Args:
            tx: The transaction.
            told: By worker.
            started: Workers that were just heard of as running, attested or not.

        Returns:
            Whether anybody must end.
        """
        condemned = False
        for worker_id in dict.fromkeys((*told, *started)):
            worker = tx.worker(worker_id)
            if worker is None or not worker.live:
                continue
            word = told.get(worker_id)
            if word is not None and word.valid and worker.attestation != (summary := word.summary):
                worker = replace(worker, attestation=summary)
                tx.attest(worker, word.body)
            contract = tx.contract(worker.contract_id)
            demanded = contract.policy.terms.min_grade(worker.depth) if contract else IsolationGrade.C
            cause = _cause(worker, word, demanded)
            if cause:
                tx.record(events.isolation_refused(worker, cause, demanded.name, self._clock()))
                ends.stop(tx, [worker], EndReason.KILLED, f"isolation: {cause}")
                condemned = True
        return condemned


def _cause(worker: Worker, word: Told | None, demanded: IsolationGrade) -> str:
    """Return why *worker* must not go on, or nothing."""
    if word is not None and not word.valid:
        return "signature"
    if word is None:
        # A node that says nothing is good enough for a contract that asks for nothing.
        return "" if worker.attestation or not demanded else "absent"
    return "grade" if word.grade < max(demanded, IsolationGrade.C) else ""
