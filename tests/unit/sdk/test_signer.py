"""The signature that anyone who holds the secret can check."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from hayflick.v1 import resources_pb2
from replication import Manifest, ManifestSigner, ResourceSpec, _rpc, _wire
from replication.signer import canonical

SECRET = "correct horse"

MANIFEST = Manifest(
    worker_id="00112233aabbccdd",
    parent_id=None,
    depth=0,
    state_snapshot={"q": 'é "\\\n\u2028'},
    issued_at=datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC),
    resources=ResourceSpec(0.5, 256),
    contract_id="c",
    manifest_id="m",
    expires_at=datetime(2026, 1, 2, 3, 5, 5, 678901, tzinfo=UTC),
    key_id="k",
)


PAGE = Path(__file__).parents[3] / "docs" / "manifest.md"
VECTORS = json.loads(re.findall(r"```json\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[0])


def issued(vector: dict[str, str]) -> Manifest:
    """Return the manifest of a published vector, as it comes over the wire."""
    fields = json.loads(vector["canonical"])
    resources = fields["resources"]
    wire = resources_pb2.Manifest(
        **{name: value for name, value in fields.items() if not name.endswith("_us") and name != "resources"},
        resources=resources_pb2.Resources(
            **{name: value for name, value in resources.items() if name != "cpu_time_limit_us"}
        ),
        signature=bytes.fromhex(vector["signature_hex"]),
    )
    wire.issue_time.FromMicroseconds(fields["issue_time_us"])
    wire.expire_time.FromMicroseconds(fields["expire_time_us"])
    if resources["cpu_time_limit_us"] is not None:
        wire.resources.cpu_time_limit.FromMicroseconds(resources["cpu_time_limit_us"])
    return _wire.manifest_from_json(_rpc.to_json(wire))


@pytest.mark.parametrize("vector", VECTORS, ids=[vector["what"] for vector in VECTORS])
def test_the_published_vectors_hold_here(vector: dict[str, str]) -> None:
    """Canonical form and signature are those that the page on manifests publishes."""
    manifest = issued(vector)
    assert canonical(manifest).decode() == vector["canonical"]
    assert ManifestSigner(vector["secret"]).verify(manifest)


def test_what_a_secret_signed_it_verifies_and_another_does_not() -> None:
    """Signing and checking agree, and depend on the secret."""
    signed = ManifestSigner(SECRET).sign(MANIFEST)
    assert ManifestSigner(SECRET).verify(signed)
    assert not ManifestSigner(SECRET + "!").verify(signed)
    assert signed.signature == hmac.new(SECRET.encode(), canonical(MANIFEST), hashlib.sha256).hexdigest()


@pytest.mark.parametrize(
    "field",
    [field.name for field in dataclasses.fields(Manifest) if field.init and field.name != "signature"],
)
def test_every_field_is_under_the_signature(field: str) -> None:
    """Changing any field of a signed manifest breaks its signature."""
    others = {
        "parent_id": "p",
        "depth": 1,
        "epoch": 1,
        "state_snapshot": {},
        "issued_at": datetime(2026, 1, 2, tzinfo=UTC),
        "expires_at": datetime(2026, 1, 3, tzinfo=UTC),
        "resources": ResourceSpec(0.5, 257),
    }
    signed = ManifestSigner(SECRET).sign(MANIFEST)
    changed = dataclasses.replace(signed, **{field: others.get(field, "other")})  # type: ignore[arg-type]
    assert not ManifestSigner(SECRET).verify(changed)


@pytest.mark.parametrize("signature", ["", "zz", "00", "00" * 32, "é"])
def test_a_malformed_signature_is_false_and_no_error(signature: str) -> None:
    """Whatever stands where a signature should, the answer is no."""
    assert not ManifestSigner(SECRET).verify(dataclasses.replace(MANIFEST, signature=signature))


@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 2**53 - 1))
def test_the_canonical_form_is_rfc_8785(text: str, epoch: int) -> None:
    """The standard library, for our kinds of values, writes what RFC 8785 asks for."""
    octets = canonical(
        dataclasses.replace(MANIFEST, worker_id=text[:64], state_snapshot={text: text}, epoch=epoch)
    )
    assert rfc8785.dumps(json.loads(octets)) == octets


@pytest.mark.parametrize("secret", ["", "short", "        ", "x" * 1_025, None, b"bytes-are-no-text"])
def test_a_secret_that_cannot_sign_is_refused_by_name(secret: object) -> None:
    """Short, blank, long or not a string: a ValueError that names the field."""
    with pytest.raises(ValueError, match=r"^secret: "):
        ManifestSigner(secret)  # type: ignore[arg-type]


def test_the_secret_is_in_no_repr() -> None:
    """A signer in a log or traceback gives nothing away."""
    assert SECRET not in repr(ManifestSigner(SECRET))
