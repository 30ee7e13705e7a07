"""What a node found when it checked a sandbox from inside, and its signature over that. Pure.

``docs/containment.md`` publishes the signed form, so that an attestation can be
verified in any language, without any service: from :class:`Attestation` as GetWorker
shows it, or from the details of a ``worker_attested`` event of the audit log.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from hayflick.v1.resources_pb2 import Attestation, IsolationGrade
from hayflick_rpc import events

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hayflick_rpc.events import Json

PUBLIC_KEY_BYTES = 32
SIGNATURE_BYTES = 64
KEY_ID_CHARS = 16
SIGNATURE = "signature"

_PREFIX = "ISOLATION_GRADE_"


def grade_name(grade: IsolationGrade.ValueType) -> str:
    """Return "A", "B" or "C"; empty for a grade that is not measured, or not known here."""
    if not grade or grade not in IsolationGrade.values():
        return ""
    return IsolationGrade.Name(grade).removeprefix(_PREFIX)


def grade_of(name: str) -> IsolationGrade.ValueType:
    """Return the grade that :func:`grade_name` calls *name*.

    Raises:
        ValueError: there is none of that name.
    """
    return IsolationGrade.Value(f"{_PREFIX}{name or 'UNSPECIFIED'}")


def key_id(public_key: bytes) -> str:
    """Return what a node's key is called on record."""
    return hashlib.sha256(public_key).hexdigest()[:KEY_ID_CHARS]


def document(attestation: Attestation, worker_id: str) -> dict[str, Json]:
    """Return what is signed: all of *attestation* but its signature, and whose it is."""
    held: dict[str, Json] = {}
    failed: dict[str, Json] = {}
    for probe in attestation.probes:
        (held if probe.held else failed)[probe.name] = probe.seen
    return {
        "worker_id": worker_id,
        "grade": grade_name(attestation.grade),
        "held": held,
        "failed": failed,
        "kernel_release": attestation.kernel_release,
        "landlock_abi": attestation.landlock_abi,
        "seccomp_sha256": attestation.seccomp_sha256,
        "attest_time": attestation.attest_time.ToJsonString(),
        "key_id": attestation.key_id,
    }


def details(attestation: Attestation) -> dict[str, Json]:
    """Return *attestation* as the details of an event, whose worker_id is the event's own."""
    found = document(attestation, "")
    del found["worker_id"]
    return {**found, SIGNATURE: attestation.signature.hex()}


def sign(attestation: Attestation, worker_id: str, key: Ed25519PrivateKey) -> None:
    """Put *key*'s name and its signature on *attestation*."""
    attestation.key_id = key_id(key.public_key().public_bytes_raw())
    attestation.signature = key.sign(events.canonical(document(attestation, worker_id)))


def verify(attestation: Attestation, worker_id: str, public_key: bytes) -> bool:
    """Return whether *public_key* made the signature, over just these findings about this worker.

    Args:
        attestation: With its probes; a listing leaves them out.
        worker_id: The worker it is said to be about.
        public_key: 32 bytes, as the node's node_connected event has them in hexadecimal.
    """
    names = [probe.name for probe in attestation.probes]
    if len(set(names)) != len(names):
        return False  # the signed form could not tell which of two is meant
    try:
        signed = document(attestation, worker_id)
    except ValueError:
        return False  # no instant that RFC 3339 can write
    return _verify(signed, attestation.signature, public_key)


def verify_details(details_: Mapping[str, Json], worker_id: str, public_key: bytes) -> bool:
    """Return whether the details of a worker_attested event are what *public_key* signed.

    Args:
        details_: Of the event, as parsed from its JSON.
        worker_id: Of the event.
        public_key: As for :func:`verify`.
    """
    signed = {name: value for name, value in details_.items() if name != SIGNATURE}
    try:
        signature = bytes.fromhex(str(details_.get(SIGNATURE, "")))
    except ValueError:
        return False
    return _verify({**signed, "worker_id": worker_id}, signature, public_key)


def _verify(signed: dict[str, Json], signature: bytes, public_key: bytes) -> bool:
    if signed.get("key_id") != key_id(public_key):
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, events.canonical(signed))
    except (InvalidSignature, ValueError):
        return False
    return True
