"""Receipts of kills: what was ended and how that was seen, signed. Pure but for the key's file.

The document is RFC 8785 JSON; docs/failure.md describes it, and how to check one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from hayflick.v1 import controller_pb2
from hayflick_controller.clock import rfc3339
from hayflick_rpc import wire

if TYPE_CHECKING:
    from hayflick_controller.model import Latch, Worker

KEY_NAME = "receipts.key"
KEY_ID_CHARS = 16


class Signer:
    """Signs receipts with a key of the controller's own.

    Args:
        key: The private key.
    """

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        self.key_id = hashlib.sha256(self.public_key).hexdigest()[:KEY_ID_CHARS]

    @classmethod
    def load(cls, directory: Path) -> Signer:
        """Return the signer whose key lies in *directory*, made when there is none.

        Raises:
            OSError: the key cannot be read or written, or others may read it.
            ValueError: the file holds no Ed25519 key.
        """
        path = directory / KEY_NAME
        if not path.exists():
            _make(path)
        if path.stat().st_mode & 0o077:
            raise OSError(1, "others may read the key that signs receipts; make it mode 0600", str(path))
        key = load_pem_private_key(path.read_bytes(), password=None)
        if not isinstance(key, Ed25519PrivateKey):
            raise ValueError(f"{path}: is no Ed25519 key")  # noqa: TRY004 -- a value, not a type, to the user
        return cls(key)

    def sign(self, document: Mapping[str, object]) -> controller_pb2.KillReceipt:
        """Return *document* as a signed receipt."""
        text = rfc8785.dumps(dict(document))  # type: ignore[arg-type]
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
) -> dict[str, object]:
    """Return what a receipt says of a kill that is over, or out of time.

    A worker is listed as dead only when its node saw its pid namespace empty, or
    when its node's lease had run out; otherwise it is listed as not confirmed.
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


def _make(path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    data = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    fresh = path.with_name(path.name + ".new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    fresh.rename(path)
