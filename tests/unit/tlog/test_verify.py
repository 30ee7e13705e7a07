"""Verifying a whole log from its files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hayflick_tlog.checkpoint import Checkpoint
from hayflick_tlog.edge import Edge
from hayflick_tlog.merkle import leaf_hash
from hayflick_tlog.note import BadNote, Signer
from hayflick_tlog.tiles import WIDTH, Tile, join_bundle
from hayflick_tlog.verify import entries_of, verify_log

if TYPE_CHECKING:
    from collections.abc import Callable

SIGNER = Signer("example.com/log", Ed25519PrivateKey.from_private_bytes(b"\7" * 32))
ENTRIES = [b"entry %d" % number for number in range(700)]
Files = dict[str, bytes]


def published(entries: list[bytes]) -> tuple[Files, str]:
    """Return the files and the checkpoint of a log of *entries*."""
    edge, whole = Edge().grown(map(leaf_hash, entries))
    files = {tile.path: data for tile, data in (*whole, *edge.partial())}
    for start in range(0, len(entries), WIDTH):
        some = entries[start : start + WIDTH]
        files[Tile(None, start // WIDTH, len(some)).path] = join_bundle(some)
    return files, Checkpoint(SIGNER.name, edge.size, edge.root).sign(SIGNER)


def reader(files: Files) -> Callable[[str], bytes]:
    """Return a function that reads *files*."""

    def read(path: str) -> bytes:
        try:
            return files[path]
        except KeyError:
            raise FileNotFoundError(2, "no such tile", path) from None

    return read


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 512, 700])
def test_an_intact_log_is_intact(count: int) -> None:
    """Whatever its size, a log that nobody touched verifies, and shows each entry at its place."""
    files, note = published(ENTRIES[:count])
    seen: list[tuple[int, bytes]] = []
    finding = verify_log(reader(files), note, SIGNER.verifier, on_entry=lambda *pair: seen.append(pair))
    assert (finding.intact, finding.checkpoint.size) == (True, count)
    assert seen == list(enumerate(ENTRIES[:count])) == list(entries_of(reader(files), count))


@pytest.mark.parametrize("victim", [0, 255, 256, 300, 511, 512, 699])
def test_a_changed_entry_is_named(victim: int) -> None:
    """A flipped bit in an entry is found, and the entry is the one that is named."""
    files, note = published(ENTRIES)
    path = Tile(None, victim // WIDTH, min(WIDTH, 700 - victim // WIDTH * WIDTH)).path
    files[path] = files[path].replace(b"entry %d" % victim, b"entrx %d" % victim, 1)
    finding = verify_log(reader(files), note, SIGNER.verifier)
    assert (finding.intact, finding.first_bad_index) == (False, victim)


@pytest.mark.parametrize("victim", [5, 300, 650])
def test_an_entry_that_was_changed_with_its_tile_is_found(victim: int) -> None:
    """Who changes the hash too is betrayed by the tile above or the signed root."""
    files, note = published(ENTRIES)
    forged = [*ENTRIES]
    forged[victim] = b"forged"
    other, _ = published(forged)
    index, width = victim // WIDTH, min(WIDTH, 700 - victim // WIDTH * WIDTH)
    for level in (None, 0):
        files[Tile(level, index, width).path] = other[Tile(level, index, width).path]
    finding = verify_log(reader(files), note, SIGNER.verifier)
    assert not finding.intact
    assert finding.first_bad_index == index * WIDTH  # as near as the tiles can tell


def test_a_log_that_was_written_anew_is_not_the_one_that_was_signed() -> None:
    """A whole other log under the old checkpoint does not verify."""
    _, note = published(ENTRIES)
    files, _ = published([b"rewritten", *ENTRIES[1:]])
    assert not verify_log(reader(files), note, SIGNER.verifier).intact


def test_a_missing_bundle_is_named() -> None:
    """Entries that are no longer there are bad from the first on."""
    files, note = published(ENTRIES)
    del files[Tile(None, 1).path]
    finding = verify_log(reader(files), note, SIGNER.verifier)
    assert (finding.intact, finding.first_bad_index) == (False, 256)


def test_a_damaged_tile_is_told_from_a_damaged_entry() -> None:
    """When only the hash tile was changed, the entries are said to be intact, and the damage too."""
    files, note = published(ENTRIES)
    path = Tile(0, 1).path
    files[path] = b"\0" + files[path][1:]
    finding = verify_log(reader(files), note, SIGNER.verifier)
    assert finding.intact
    assert "tile of entry 256" in finding.detail


@pytest.mark.parametrize("count", [512, 700])
def test_a_damaged_higher_tile_is_found(count: int) -> None:
    """A tile of roots, from which others make proofs, is compared too, whole or partial."""
    files, note = published(ENTRIES[:count])
    path = Tile(1, 0, count // WIDTH).path
    assert verify_log(reader(files), note, SIGNER.verifier).detail == ""
    files[path] = files[path][:-1] + bytes([files[path][-1] ^ 1])
    finding = verify_log(reader(files), note, SIGNER.verifier)
    assert (finding.intact, path in finding.detail) == (True, True)


def test_a_wider_partial_tile_serves_an_older_checkpoint() -> None:
    """A log that grew still verifies against a checkpoint from when its last tile was narrower."""
    _, note = published(ENTRIES[:600])
    files, _ = published(ENTRIES)
    assert verify_log(reader(files), note, SIGNER.verifier).intact


def test_another_key_verifies_nothing() -> None:
    """A checkpoint that the key did not sign is refused before anything is read."""
    _, note = published(ENTRIES[:3])
    other = Signer(SIGNER.name, Ed25519PrivateKey.generate())
    with pytest.raises(BadNote):
        verify_log(reader({}), note, other.verifier)
