"""Signatures: the published form, and that nothing in a manifest can be changed."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from hayflick_controller import signing
from hayflick_controller.model import Manifest, NetworkPolicy, Resources

PAGE = Path(__file__).parents[3] / "docs" / "manifest.md"
SECRET = b"my-secret-key"


def vectors() -> list[dict[str, str]]:
    """Read the vectors that the documentation publishes."""
    block = re.search(r"```json\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    found: list[dict[str, str]] = json.loads(block[1])
    return found


def from_canonical(text: str) -> Manifest:
    """Read a manifest back from its canonical form."""
    document = json.loads(text)
    resources = document["resources"]
    resources["cpu_time_limit_us"] = resources.pop("cpu_time_limit_us")
    network = resources["network"]
    network["allowed_hosts"] = tuple(network["allowed_hosts"])
    resources["network"] = NetworkPolicy(**network)
    document["resources"] = Resources(**resources)
    document["issue_us"] = document.pop("issue_time_us")
    document["expire_us"] = document.pop("expire_time_us")
    return Manifest(**document)


MANIFEST = from_canonical(vectors()[1]["canonical"])


@pytest.mark.parametrize("vector", vectors(), ids=lambda vector: str(vector["what"]))
def test_published_vectors(vector: dict[str, str]) -> None:
    """The published canonical forms and signatures are the ones that are made."""
    manifest = from_canonical(vector["canonical"])
    secret = vector["secret"].encode()
    assert signing.canonical(manifest).decode() == vector["canonical"]
    assert signing.sign(manifest, secret).signature.hex() == vector["signature_hex"]
    by_hand = hmac.new(secret, vector["canonical"].encode(), hashlib.sha256).hexdigest()
    assert by_hand == vector["signature_hex"]


def test_a_signature_verifies() -> None:
    """A signed manifest verifies with its secret and with no other."""
    signed = signing.sign(MANIFEST, SECRET)
    assert signing.verify(signed, SECRET)
    assert not signing.verify(signed, b"another-secret")
    assert not signing.verify(MANIFEST, SECRET)


def _others(value: object) -> list[object]:
    match value:
        case bool():
            return [not value]
        case int():
            return [value + 1, max(0, value - 1)] if value else [1]
        case str():
            return [value + " ", value[:-1] or "x"]
        case None:
            return [0, 1]
        case tuple():
            return [(*value, "x"), value[1:] or ("x",), (*value[::-1], "")]
        case _:
            raise AssertionError(value)


@pytest.mark.parametrize("name", [field.name for field in fields(Manifest) if field.name != "signature"])
def test_every_field_is_covered(name: str) -> None:
    """Changing any field of a signed manifest makes its signature invalid."""
    signed = signing.sign(MANIFEST, SECRET)
    if name != "resources":
        for other in _others(getattr(signed, name)):
            assert not signing.verify(replace(signed, **{name: other}), SECRET)
        return
    for limit in fields(Resources):
        value = getattr(signed.resources, limit.name)
        changed = (
            [
                replace(value, **{part.name: other})
                for part in fields(NetworkPolicy)
                for other in _others(getattr(value, part.name))
            ]
            if isinstance(value, NetworkPolicy)
            else _others(value)
        )
        for other in changed:
            resources = replace(signed.resources, **{limit.name: other})
            assert not signing.verify(replace(signed, resources=resources), SECRET)


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
NUMBERS = st.integers(min_value=0, max_value=2**53 - 1)
RESOURCES = st.builds(
    Resources,
    **{field.name: NUMBERS for field in fields(Resources) if field.name != "network"}
    | {
        "cpu_time_limit_us": st.none() | NUMBERS,
        "network": st.builds(
            NetworkPolicy,
            st.booleans(),
            st.booleans(),
            st.booleans(),
            st.lists(TEXT).map(tuple),
            NUMBERS,
        ),
    },
)
MANIFESTS = st.builds(
    Manifest, TEXT, TEXT, TEXT, TEXT, NUMBERS, NUMBERS, TEXT, RESOURCES, NUMBERS, NUMBERS, TEXT
)


@given(MANIFESTS)
def test_the_form_is_rfc_8785(manifest: Manifest) -> None:
    """Whatever a manifest holds, its form is byte for byte what an RFC 8785 library writes."""
    octets = signing.canonical(manifest)
    assert octets == rfc8785.dumps(json.loads(octets))
    assert from_canonical(octets.decode()) == manifest


@given(st.characters(categories=["Cs"]))
def test_what_is_not_unicode_is_never_signed(surrogate: str) -> None:
    """A text that UTF-8 cannot write is refused when signing, and is never valid."""
    with pytest.raises(ValueError, match=r"\S"):
        signing.sign(replace(MANIFEST, parent_id=surrogate), SECRET)
    assert not signing.verify(replace(MANIFEST, parent_id=surrogate, signature=bytes(32)), SECRET)


@given(st.integers(min_value=2**53))
def test_inexact_numbers_are_never_signed(number: int) -> None:
    """A number that JSON cannot keep exact is refused when signing, and is never valid."""
    inexact = replace(MANIFEST, epoch=number)
    with pytest.raises(ValueError, match=r"\S"):
        signing.sign(inexact, SECRET)
    assert not signing.verify(replace(inexact, signature=bytes(32)), SECRET)


@given(st.text(), st.text())
def test_no_two_manifests_share_a_form(one: str, other: str) -> None:
    """Text cannot flow from one field into the next: different manifests are signed differently."""
    first = replace(MANIFEST, parent_id=one, worker_id=other)
    second = replace(MANIFEST, parent_id=other, worker_id=one)
    assert (signing.canonical(first) == signing.canonical(second)) == (one == other)
