"""Signed notes, checkpoints and proofs as text."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from hayflick_tlog.checkpoint import Checkpoint
from hayflick_tlog.merkle import BadProof, leaf_hash, root_of
from hayflick_tlog.note import BadNote, Signer, Verifier
from hayflick_tlog.proof import Proof

SIGNER = Signer("example.com/log", Ed25519PrivateKey.from_private_bytes(b"\7" * 32))


def test_a_key_reads_back() -> None:
    """A verifier key is one line that names its owner and checks itself."""
    assert Verifier.parse(str(SIGNER.verifier)) == SIGNER.verifier


@pytest.mark.parametrize("text", ["", "name", "name+00000000+AAAA", "na me+0+A", str(SIGNER.verifier)[:-4]])
def test_other_text_is_no_key(text: str) -> None:
    """A key with another hash, algorithm or length is refused."""
    with pytest.raises(BadNote):
        Verifier.parse(text)


def test_a_key_that_states_another_hash_is_refused() -> None:
    """The hash in a key is over its name too: a renamed key does not parse."""
    with pytest.raises(BadNote, match="hash"):
        Verifier.parse(str(SIGNER.verifier).replace("example.com/log", "example.com/other"))


@given(place=st.integers(0, 10_000), change=st.integers(1, 127))
def test_no_character_of_a_note_can_change(place: int, change: int) -> None:
    """Whatever is changed in the text or in the signature, the note no longer opens."""
    note = SIGNER.sign("example.com/log\n7\nabc\n")
    place %= len(note)
    changed = note[:place] + chr(ord(note[place]) ^ change) + note[place + 1 :]
    with pytest.raises(BadNote):
        SIGNER.verifier.open(changed)


def test_signatures_of_others_are_passed_over() -> None:
    """A note that others signed too opens with our key, in whatever order."""
    other = Signer("example.com/witness", Ed25519PrivateKey.generate())
    text = "example.com/log\n7\nabc\n"
    mine, theirs = (signer.sign(text).rpartition("\n\n")[2] for signer in (SIGNER, other))
    assert SIGNER.verifier.open(f"{text}\n{theirs}{mine}") == text
    with pytest.raises(BadNote, match="not signed by"):
        SIGNER.verifier.open(f"{text}\n{theirs}")


def test_a_checkpoint_reads_back() -> None:
    """A checkpoint states origin, size and root, and opens with its log's key alone."""
    checkpoint = Checkpoint("example.com/log", 42, leaf_hash(b"x"))
    note = checkpoint.sign(SIGNER)
    assert Checkpoint.open(note, SIGNER.verifier) == checkpoint
    with pytest.raises(BadNote):
        Checkpoint.open(note, Signer("example.com/log", Ed25519PrivateKey.generate()).verifier)


@pytest.mark.parametrize(
    "text", ["example.com/log\n-1\nAAAA\n", "example.com/log\n01\nAAAA\n", "other\n1\n\n"]
)
def test_a_note_that_is_no_checkpoint_is_refused(text: str) -> None:
    """A size that is no number, a root that is no hash, another log's origin: none of them opens."""
    with pytest.raises(BadNote):
        Checkpoint.open(SIGNER.sign(text), SIGNER.verifier)


def test_a_kept_proof_proves_its_entry_and_no_other() -> None:
    """A proof reads back from its text, holds for its entry, and fails for another."""
    leaves = [leaf_hash(b"a"), leaf_hash(b"b")]
    note = Checkpoint("example.com/log", 2, root_of(leaves)).sign(SIGNER)
    proof = Proof.parse(str(Proof(1, (leaves[0],), note)))
    assert proof.verify(b"b", SIGNER.verifier).size == 2
    with pytest.raises(BadProof):
        proof.verify(b"c", SIGNER.verifier)
    with pytest.raises(BadProof):
        Proof.parse("c2sp.org/tlog-proof@v1\nindex x\n\n" + note)
