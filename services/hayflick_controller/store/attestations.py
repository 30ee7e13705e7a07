"""What was found inside the workers' sandboxes, with every check; workers keep the rest of it."""

from __future__ import annotations

from sqlalchemy import bindparam, insert, select, update

from hayflick_controller.model import Worker
from hayflick_controller.store import schema
from hayflick_controller.store.part import Part

attestations, workers = schema.attestations, schema.workers

ATTESTATION = select(attestations.c.body).where(attestations.c.worker_id == bindparam("worker_id"))
ADD_ATTESTATION = insert(attestations)
CHANGE_ATTESTATION = (
    update(attestations)
    .where(attestations.c.worker_id == bindparam("key"))
    .values(body=bindparam("new_body"))
)
ATTEST = (
    update(workers)
    .where(workers.c.worker_id == bindparam("key"))
    .values(attestation=bindparam("new_attestation"))
)


class Attestations(Part):
    """See :class:`~hayflick_controller.store.protocol.Tx`."""

    def attest(self, worker: Worker, body: bytes) -> None:  # noqa: D102
        name = worker.worker_id
        self._known.workers.pop(name, None)
        if not self._driver.run(CHANGE_ATTESTATION, {"key": name, "new_body": body}):
            self._driver.run(ADD_ATTESTATION, {"worker_id": name, "body": body})
        self._driver.run(ATTEST, {"key": name, "new_attestation": worker.attestation})
        self._changed[name] = worker

    def attestation(self, worker_id: str) -> bytes:  # noqa: D102
        row = self._driver.one(ATTESTATION, {"worker_id": worker_id})
        return b"" if row is None else bytes(row.body)
