"""Paths of tiles, and bundles of entries."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hayflick_tlog.tiles import MAX_INDEX, BadTile, Tile, join_bundle, parse_path, split_bundle, split_tile


@pytest.mark.parametrize(
    ("tile", "path"),
    [
        (Tile(0, 0), "tile/0/000"),
        (Tile(0, 1_234_067), "tile/0/x001/x234/067"),
        (Tile(3, 7, 12), "tile/3/007.p/12"),
        (Tile(None, 273, 112), "tile/entries/273.p/112"),
        (Tile(None, 1_000), "tile/entries/x001/000"),
    ],
)
def test_a_path_is_spelt_as_the_specification_has_it(tile: Tile, path: str) -> None:
    """Each tile has the path that C2SP tlog-tiles gives it, and the path names it."""
    assert tile.path == path
    assert parse_path(path) == tile


@given(level=st.none() | st.integers(0, 5), index=st.integers(0, MAX_INDEX), width=st.integers(1, 256))
def test_every_path_reads_back(level: int | None, index: int, width: int) -> None:
    """Whatever the tile, its path names it again."""
    assert parse_path(Tile(level, index, width).path) == Tile(level, index, width)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "tile/0/0",
        "tile/6/000",
        "tile/0/x000/001",
        "tile/0/001.p/0",
        "tile/0/001.p/256",
        "tile/0/001.p/01",
        "tile/0/../../etc/passwd",
        "tile/0/000\n",
        "/tile/0/000",
        "tile/0/x001/x000/x000/x000/x000/000",
    ],
)
def test_other_paths_name_nothing(path: str) -> None:
    """A second spelling, a way out of the directory, or garbage is refused."""
    with pytest.raises(BadTile):
        parse_path(path)


@given(entries=st.lists(st.binary(max_size=300), max_size=20), cut=st.integers(1, 40))
def test_a_bundle_reads_back_and_a_cut_one_does_not(entries: list[bytes], cut: int) -> None:
    """A bundle holds exactly its entries; with bytes missing or behind them it is refused."""
    data = join_bundle(entries)
    assert split_bundle(data, len(entries)) == entries
    with pytest.raises(BadTile):
        split_bundle(data + b"\0" * cut, len(entries))
    if entries:
        with pytest.raises(BadTile):
            split_bundle(data[: -min(cut, len(data))], len(entries))


def test_a_tile_of_another_width_is_refused() -> None:
    """A tile has 32 bytes for each hash it is said to hold."""
    assert split_tile(b"a" * 32 + b"b" * 32, 2) == [b"a" * 32, b"b" * 32]
    with pytest.raises(BadTile):
        split_tile(b"a" * 63, 2)
