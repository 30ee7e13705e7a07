"""Receipts of kills: what was ended and how that was seen, signed. Pure but for the key's file.

The document is RFC 8785 JSON; docs/failure.md describes it, and how to check one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hayflick.v1 import controller_pb2
from hayflick_controller.clock import rfc3339
from hayflick_rpc import events, keyfile, wire
from hayflick_rpc.attestation import key_id

if TYPE_CHECKING:
    from hayflick_controller.model import Latch, Worker
    from hayflick_rpc.events import Json

KEY_NAME = "receipts.key"


class Signer:
    """Signs receipts with a key of the controller's own.

    Args:
        key: The private key.
    """

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key = key.public_key().public_bytes_raw()
        self.key_id = key_id(self.public_key)

    @classmethod
    def load(cls, directory: Path) -> Signer:
        """Return the signer whose key lies in *directory*, made when there is none.

        Raises:
            OSError: the key cannot be read or written, or others may read it.
            ValueError: the file holds no Ed25519 key.
        """
        path = directory / KEY_NAME
        if not path.exists():
            keyfile.store(path, Ed25519PrivateKey.generate())
        return cls(keyfile.load(path))

    def sign(self, document: Json) -> controller_pb2.KillReceipt:
        """Return *document* as a signed receipt."""
        text = events.canonical(document)
        return controller_pb2.KillReceipt(
            document_json=text.decode(),
            key_id=self.key_id,
            signature=self._key.sign(text),
            public_key=self.public_key,
        )


class Issuer:
    """Issues the receipts of one controller."""

    def __init__(self, signer: Signer, controller_id: str) -> None:
        self._signer = signer
        self._controller_id = controller_id

    def issue(
        self,
        latch: Latch,
        targets: Sequence[Worker],
        response: controller_pb2.EngageKillSwitchResponse,
        issue_us: int,
    ) -> controller_pb2.KillReceipt:
        """Return the receipt of a kill; see :func:`document`."""
        return self._signer.sign(document(self._controller_id, latch, targets, response, issue_us))


def digest(receipt: controller_pb2.KillReceipt) -> str:
    """Return what the audit log names *receipt* by: the SHA-256 of its document."""
    return hashlib.sha256(receipt.document_json.encode()).hexdigest()


def document(
    controller_id: str,
    latch: Latch,
    targets: Sequence[Worker],
    response: controller_pb2.EngageKillSwitchResponse,
    issue_us: int,
) -> dict[str, Json]:
    """Return what a receipt says of a kill that is over, or out of time.

    A worker is listed as dead only when its node saw its pid namespace empty. One
    whose node is silent is listed as not confirmed, also after the end of the lease.
    """
    unconfirmed = frozenset(response.unconfirmed_worker_ids)
    return {
        "kind": "kill",
        "version": 1,
        "controller_id": controller_id,
        "scope": latch.scope.key,
        "epoch": latch.epoch,
        "reason": latch.reason,
        "engage_time": rfc3339(latch.change_us),
        "issue_time": rfc3339(issue_us),
        "elapsed_seconds": _round(wire.seconds(response.elapsed)),
        "running": response.active_before,
        "dead": [
            {"worker_id": worker.worker_id, "contract_id": worker.contract_id, "node_id": worker.node_id}
            for worker in targets
            if worker.worker_id not in unconfirmed
        ],
        "unconfirmed": [
            {"worker_id": worker.worker_id, "contract_id": worker.contract_id, "node_id": worker.node_id}
            for worker in targets
            if worker.worker_id in unconfirmed
        ],
        "nodes": [
            {
                "node_id": node.node_id,
                "confirmed": node.confirmed_count,
                "last_death_seconds": _round(wire.seconds(node.last_death)),
                "unpopulated": node.unpopulated,
                "elapsed_seconds": _round(wire.seconds(node.elapsed)),
                "error": node.error,
            }
            for node in response.nodes
        ],
    }


def _round(value: float) -> float:
    return round(value, 6)
