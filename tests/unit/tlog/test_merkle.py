"""Hashes, roots and proofs of a tree, against the definitions of RFC 6962 written out plainly."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hayflick_tlog.edge import Edge
from hayflick_tlog.merkle import (
    BadProof,
    check_consistency,
    check_inclusion,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    root,
    root_of,
)

LEAVES = [leaf_hash(b"entry %d" % number) for number in range(600)]
sizes = st.integers(1, 70) | st.integers(1, len(LEAVES)) | st.sampled_from([255, 256, 257, 511, 512, 513])


def tree_head(leaves: Sequence[bytes]) -> bytes:
    """Return MTH of RFC 6962, section 2.1, as it is defined there."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    return hashlib.sha256(b"\1" + tree_head(leaves[:split]) + tree_head(leaves[split:])).digest()


def subtrees(level: int, index: int) -> bytes:
    """Return the hash of a complete subtree over LEAVES."""
    return tree_head(LEAVES[index << level : (index + 1) << level])


@given(size=st.just(0) | sizes)
def test_a_root_is_what_the_definition_says(size: int) -> None:
    """From subtrees, from hashes, and grown leaf by leaf, the root is that of the definition."""
    expected = tree_head(LEAVES[:size])
    assert root(size, subtrees) == root_of(LEAVES[:size]) == expected
    assert Edge().grown(LEAVES[:size])[0].root == expected


def test_the_known_answers_hold() -> None:
    """Hashes are the ones that other implementations publish."""
    assert leaf_hash(b"").hex() == "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"
    assert root(0, subtrees).hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@given(size=sizes, data=st.data())
def test_every_entry_can_be_proved(size: int, data: st.DataObject) -> None:
    """The proof of any entry leads to the root, and no other leaf, place, size or root passes with it."""
    index = data.draw(st.integers(0, size - 1))
    proof = inclusion_proof(index, size, subtrees)
    head = tree_head(LEAVES[:size])
    check_inclusion(index, size, LEAVES[index], proof, head)
    other = data.draw(st.integers(0, size - 1).filter(lambda at: at != index)) if size > 1 else size
    for changed in (
        (other, size, LEAVES[index], proof, head),
        (index, size, leaf_hash(b"another"), proof, head),
        (index, size, LEAVES[index], [*proof, head], head),
        (index, size, LEAVES[index], proof, leaf_hash(b"another")),
        (index, size, LEAVES[index], [*proof[:-1], b"short"], head),
    ):
        with pytest.raises(BadProof):
            check_inclusion(*changed)


@given(size=sizes, data=st.data())
def test_every_older_tree_can_be_proved_to_be_the_beginning(size: int, data: st.DataObject) -> None:
    """The proof between two sizes holds for their roots and for no others."""
    old = data.draw(st.integers(1, size))
    proof = consistency_proof(old, size, subtrees)
    old_root, new_root = tree_head(LEAVES[:old]), tree_head(LEAVES[:size])
    check_consistency(old, size, old_root, new_root, proof)
    forged = leaf_hash(b"another")
    for roots in ((forged, new_root), (old_root, forged)):
        with pytest.raises(BadProof):
            check_consistency(old, size, *roots, proof)
    with pytest.raises(BadProof):
        check_consistency(old, size, old_root, new_root, [*proof, forged])


@given(size=sizes, data=st.data())
def test_a_changed_history_is_never_consistent(size: int, data: st.DataObject) -> None:
    """No proof connects a tree with one in which an older entry was changed."""
    old = data.draw(st.integers(1, size))
    victim = data.draw(st.integers(0, old - 1))
    changed = [*LEAVES[:victim], leaf_hash(b"rewritten"), *LEAVES[victim + 1 : size]]

    def over_changed(level: int, index: int) -> bytes:
        return tree_head(changed[index << level : (index + 1) << level])

    proof = consistency_proof(old, size, over_changed)
    with pytest.raises(BadProof):
        check_consistency(old, size, tree_head(LEAVES[:old]), tree_head(changed), proof)


@settings(max_examples=50)
@given(parts=st.lists(st.integers(1, 300), max_size=4))
def test_an_edge_grows_the_same_however_it_is_fed(parts: list[int]) -> None:
    """In one go or in parts, the edge and the tiles that became whole are the same."""
    leaves = [leaf_hash(b"%d" % number) for number in range(sum(parts))]
    edge, tiles, at = Edge(), [], 0
    for part in parts:
        edge, whole = edge.grown(leaves[at : at + part])
        tiles += whole
        at += part
    assert (edge, tiles) == Edge().grown(leaves)
    assert [tile.index for tile, _ in tiles if tile.level == 0] == list(range(len(leaves) // 256))


def test_an_edge_makes_tiles_of_every_level() -> None:
    """After 256 times 256 leaves the first tile of level 1 is whole, with the roots of those below it."""
    leaves = [leaf_hash(b"%d" % number) for number in range(256 * 256)]
    _, tiles = Edge().grown(leaves)
    (above,) = [data for tile, data in tiles if tile.level == 1]
    below = [data for tile, data in tiles if tile.level == 0]
    assert len(below) == 256
    assert above[:32] == root_of(leaves[:256])
    assert above[-32:] == root_of(leaves[-256:])
