"""Attestations: signed by the node, verifiable by anyone, and by no other key over no other words."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from hayflick.v1.errors_pb2 import ErrorReason
from hayflick.v1.resources_pb2 import ISOLATION_GRADE_A, ISOLATION_GRADE_B, Attestation, ProbeResult
from hayflick_orchestrator.attestation import Attestor
from hayflick_rpc import attestation, events
from hayflick_rpc.errors import HayflickError
from hayflick_sandbox import grades, landlock
from hayflick_sandbox.messages import Finding

NOW = datetime(2026, 1, 2, 3, 4, 5, 678_000, tzinfo=UTC)
# A key that everyone knows: RFC 8032, section 7.1, test 1.
SECRET = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
PUBLIC = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
CANONICAL = (
    b'{"attest_time":"2026-01-02T03:04:05.678Z","failed":{"landlock-files":"EPERM"},"grade":"B",'
    b'"held":{"clone3":"ENOSYS"},"kernel_release":"6.18.0","key_id":"21fe31dfa154a261","landlock_abi":7,'
    b'"seccomp_sha256":"00ff","worker_id":"w-1"}'
)
SIGNATURE = (
    "e512cd755cc49e14ba66a963dc1f47c5cd65e22c0443f2f7f1eb59dab6390be0"
    "67cea09c8343521453eacf26df444c01ab229a295dabe42fef3ba2e312fbcb07"
)


def known() -> Attestation:
    """Return a small attestation, signed with the known key."""
    message = Attestation(
        grade=ISOLATION_GRADE_B,
        probes=[
            ProbeResult(name="clone3", held=True, seen="ENOSYS"),
            ProbeResult(name="landlock-files", held=False, seen="EPERM"),
        ],
        kernel_release="6.18.0",
        landlock_abi=7,
        seccomp_sha256="00ff",
    )
    message.attest_time.FromDatetime(NOW)
    attestation.sign(message, "w-1", Ed25519PrivateKey.from_private_bytes(SECRET))
    return message


def test_a_known_attestation_has_a_known_form() -> None:
    """The signed bytes and the signature are those that docs/containment.md publishes."""
    message = known()
    assert events.canonical(attestation.document(message, "w-1")) == CANONICAL
    assert message.key_id == hashlib.sha256(PUBLIC).hexdigest()[:16]
    assert message.signature.hex() == SIGNATURE
    assert attestation.verify(message, "w-1", PUBLIC)


@given(st.data())
def test_a_changed_byte_is_seen(data: st.DataObject) -> None:
    """With any one byte of the message changed, it verifies only where it still says the same."""
    raw = bytearray(known().SerializeToString())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    try:
        changed = Attestation.FromString(bytes(raw))
    except Exception:  # noqa: BLE001 -- not even a message, in whichever way protobuf says so
        return
    verified = attestation.verify(changed, "w-1", PUBLIC)
    # Bytes can also turn into fields that nobody knows; then it says what it said before.
    assert verified == (changed.signature == known().signature and _says(changed) == _says(known()))


def _says(message: Attestation) -> Any:
    try:
        return attestation.document(message, "w-1")
    except ValueError:
        return None  # a time that is none


@pytest.mark.parametrize(
    "change",
    [
        {"grade": ISOLATION_GRADE_A},
        {"kernel_release": "6.18.1"},
        {"landlock_abi": 6},
        {"seccomp_sha256": "00fe"},
        {"key_id": "0" * 16},
        {"signature": bytes(64)},
        {"signature": b""},
    ],
)
def test_a_changed_field_is_seen(change: dict[str, Any]) -> None:
    """No field can be changed, left out or put in the place of another."""
    message = known()
    for name, value in change.items():
        setattr(message, name, value)
    assert not attestation.verify(message, "w-1", PUBLIC)


def test_checks_can_be_neither_dropped_nor_turned_nor_doubled() -> None:
    """A check that is left out, that holds where it did not, or that is there twice, is seen."""
    dropped, turned, doubled = known(), known(), known()
    del dropped.probes[1]
    turned.probes[1].held = True
    doubled.probes.add().CopyFrom(doubled.probes[0])
    assert not any(attestation.verify(one, "w-1", PUBLIC) for one in (dropped, turned, doubled))


def test_it_is_about_one_worker_and_by_one_node() -> None:
    """Neither another worker's name nor another node's key goes with a signature."""
    other = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    assert not attestation.verify(known(), "w-2", PUBLIC)
    assert not attestation.verify(known(), "w-1", other)
    assert not attestation.verify(known(), "w-1", b"short")


def test_the_event_verifies_by_itself() -> None:
    """The details of a worker_attested event, read from its JSON, verify without any service."""
    details = json.loads(json.dumps(attestation.details(known())))
    assert attestation.verify_details(details, "w-1", PUBLIC)
    assert not attestation.verify_details(details, "w-2", PUBLIC)
    for name in details:
        assert not attestation.verify_details({**details, name: "0"}, "w-1", PUBLIC), name
        assert not attestation.verify_details(
            {key: value for key, value in details.items() if key != name}, "w-1", PUBLIC
        ), name


def findings(*failed: str) -> list[Finding]:
    """Return what would be found of a sandbox in which just *failed* do not hold."""
    asked = grades.criteria(landlock.abi())
    return [Finding(check.name, check.name not in failed, "seen") for check in asked]


def test_a_node_signs_what_it_found() -> None:
    """A node's attestation says the grade, all findings, the kernel and the filters, and verifies."""
    attestor = Attestor({False: "f" * 64, True: "e" * 64})
    attested = attestor.attest("w", findings("own-host-user"), NOW, inet=True)
    assert attestation.verify(attested.message, "w", attestor.public_key)
    assert attested.message.grade == ISOLATION_GRADE_B
    assert attested.message.seccomp_sha256 == "e" * 64
    assert [probe.name for probe in attested.message.probes if not probe.held] == ["own-host-user"]
    assert len(attestor.public_key) == attestation.PUBLIC_KEY_BYTES
    assert Attestor({}).public_key != attestor.public_key


@pytest.mark.parametrize(
    ("failed", "floor", "refused"),
    [
        ((), "A", None),
        (("own-host-user",), "B", None),
        (("own-host-user",), "A", ("B", "A", "own-host-user")),
        (("landlock-files", "rlimits"), "A", ("C", "A", "rlimits")),
        (("clone3",), "", ("", "C", "clone3")),
        (("clone3", "rlimits"), "B", ("", "B", "clone3")),
    ],
)
def test_floors(failed: tuple[str, ...], floor: str, refused: tuple[str, str, str] | None) -> None:
    """What holds less than its floor is refused, naming the check; without a floor, C is one."""
    attestor = Attestor({})
    if refused is None:
        attestor.require(findings(*failed), floor)
        return
    with pytest.raises(HayflickError) as caught:
        attestor.require(findings(*failed), floor)
    assert caught.value.reason == ErrorReason.ERROR_REASON_ISOLATION_INSUFFICIENT
    assert caught.value.metadata == dict(zip(("grade", "min_grade", "probe"), refused, strict=True))
