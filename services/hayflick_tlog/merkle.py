"""The hashes of a transparency log: leaves, nodes, roots and proofs, after RFC 6962 and RFC 9162.

Pure. A *subtree* is complete: it has ``2**level`` leaves and starts at leaf
``index * 2**level``. Its hash never changes once the log has all its leaves,
which is why tiles can be kept for ever.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

HASH_BYTES = 32
EMPTY_ROOT = hashlib.sha256(b"").digest()
# Above any log there will be; a proof longer than this is not one.
MAX_PROOF_HASHES = 64

Subtrees = Callable[[int, int], bytes]
"""Returns the hash of the complete subtree at a level and an index."""


class BadProof(Exception):
    """A proof that does not prove what it is for."""


def leaf_hash(entry: bytes) -> bytes:
    """Return the hash of an entry as a leaf (RFC 6962, section 2.1)."""
    return hashlib.sha256(b"\0" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Return the hash of a node over its two children (RFC 6962, section 2.1)."""
    return hashlib.sha256(b"\1" + left + right).digest()


def root_of(hashes: Sequence[bytes]) -> bytes:
    """Return the hash of the tree whose leaves, or complete subtrees of one size, have *hashes*."""
    level = list(hashes)
    if not level:
        return EMPTY_ROOT
    while len(level) > 1:
        paired = [node_hash(level[at], level[at + 1]) for at in range(0, len(level) - 1, 2)]
        # The one left over rises as it is; RFC 6962 splits at the largest power of two.
        level = paired + level[2 * len(paired) :]
    return level[0]


def root(size: int, subtrees: Subtrees) -> bytes:
    """Return the root of the first *size* leaves."""
    return _hash_of(0, size, subtrees) if size else EMPTY_ROOT


def inclusion_proof(index: int, size: int, subtrees: Subtrees) -> list[bytes]:
    """Return the hashes that lead from leaf *index* to the root of *size* leaves (RFC 6962, section 2.1.1).

    Raises:
        ValueError: there is no such leaf in a tree of that size.
    """
    if not 0 <= index < size:
        raise ValueError(f"a tree of {size} leaves has no leaf {index}")
    path: list[bytes] = []
    start, end = 0, size
    while end - start > 1:
        middle = start + _split(end - start)
        if index < middle:
            path.append(_hash_of(middle, end, subtrees))
            end = middle
        else:
            path.append(_hash_of(start, middle, subtrees))
            start = middle
    return path[::-1]


def consistency_proof(old_size: int, new_size: int, subtrees: Subtrees) -> list[bytes]:
    """Return the hashes that prove one tree to be the beginning of another (RFC 6962, section 2.1.2).

    Raises:
        ValueError: the sizes are not 1 ≤ *old_size* ≤ *new_size*.
    """
    if not 1 <= old_size <= new_size:
        raise ValueError(f"there is no proof from a tree of {old_size} leaves to one of {new_size}")
    path: list[bytes] = []
    start, end, whole = 0, new_size, True
    while old_size != end:
        middle = start + _split(end - start)
        if old_size <= middle:
            path.append(_hash_of(middle, end, subtrees))
            end = middle
        else:
            path.append(_hash_of(start, middle, subtrees))
            start, whole = middle, False
    if not whole:
        path.append(_hash_of(start, end, subtrees))
    return path[::-1]


def check_inclusion(index: int, size: int, leaf: bytes, proof: Sequence[bytes], root_: bytes) -> None:
    """Return when *proof* shows that *leaf* is leaf *index* of the tree with *root_*.

    Raises:
        BadProof: it does not.
    """
    if not 0 <= index < size or not _well_formed([leaf, *proof, root_]):
        raise BadProof("it is not a proof for this tree")
    reached = leaf
    for sibling, on_the_left in _siblings(index, size - 1, proof):
        reached = node_hash(sibling, reached) if on_the_left else node_hash(reached, sibling)
    if reached != root_:
        raise BadProof("it leads to another root")


def check_consistency(
    old_size: int, new_size: int, old_root: bytes, new_root: bytes, proof: Sequence[bytes]
) -> None:
    """Return when *proof* shows that the one tree is the beginning of the other.

    Raises:
        BadProof: it does not.
    """
    if not 1 <= old_size <= new_size or not _well_formed([*proof, old_root, new_root]):
        raise BadProof("it is not a proof for these trees")
    if old_size == new_size:
        if proof or old_root != new_root:
            raise BadProof("trees of one size differ")
        return
    # The largest complete subtree at the old tree's end: where its level begins, the two trees agree.
    level = (old_size & -old_size).bit_length() - 1
    # A complete old tree is that subtree itself, and the proof leaves it out.
    path = [old_root, *proof] if old_size == 1 << level else list(proof)
    if not path:
        raise BadProof("it is too short")
    old = new = path[0]
    for sibling, on_the_left in _siblings((old_size - 1) >> level, (new_size - 1) >> level, path[1:]):
        if on_the_left:
            old, new = node_hash(sibling, old), node_hash(sibling, new)
        else:
            new = node_hash(new, sibling)
    if old != old_root or new != new_root:
        raise BadProof("it leads to another root")


def _siblings(node: int, last: int, proof: Sequence[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Yield each hash of *proof*, and whether it stands left of the way up (RFC 9162, section 2.1.3.2).

    Raises:
        BadProof: the way has another length.
    """
    for sibling in proof:
        if last == 0:
            raise BadProof("it is too long for this tree")
        on_the_left = bool(node & 1 or node == last)
        yield sibling, on_the_left
        while on_the_left and node and not node & 1:  # the last node of a level rises as it is
            node, last = node >> 1, last >> 1
        node, last = node >> 1, last >> 1
    if last:
        raise BadProof("it is too short for this tree")


def complete_subtrees(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield, left to right, the fewest complete subtrees that hold the leaves from *start* to before *end*.

    *start* must be where a complete subtree as large as the largest of them begins.
    """
    while start < end:
        level = (end - start).bit_length() - 1
        yield level, start >> level
        start += 1 << level


def _hash_of(start: int, end: int, subtrees: Subtrees) -> bytes:
    hashes = [subtrees(level, index) for level, index in complete_subtrees(start, end)]
    reached = hashes.pop()
    while hashes:
        reached = node_hash(hashes.pop(), reached)
    return reached


def _split(size: int) -> int:
    """Return the largest power of two below *size*."""
    return 1 << ((size - 1).bit_length() - 1)


def _well_formed(hashes: Sequence[bytes]) -> bool:
    return len(hashes) <= MAX_PROOF_HASHES + 2 and all(len(one) == HASH_BYTES for one in hashes)
