"""Family trees as paths."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hayflick_controller import lineage

ids = st.text("0123456789abcdef", min_size=1, max_size=4)
trails = st.lists(ids, min_size=1, max_size=6)


def path(trail: list[str]) -> str:
    """Make the path of the last of *trail*."""
    made = ""
    for worker_id in trail:
        made = lineage.path_of(made, worker_id)
    return made


@given(trails)
def test_a_path_holds_its_members(trail: list[str]) -> None:
    """A path names every worker from the root down, and the last one's ancestors."""
    assert lineage.members(path(trail)) == tuple(trail)
    assert lineage.ancestors(path(trail)) == tuple(trail[:-1])


@given(trails, trails)
def test_a_subtree_is_a_range(trail: list[str], other: list[str]) -> None:
    """A path lies in another's range exactly when it is that worker's or a descendant's."""
    first, end = lineage.subtree_range(path(trail))
    inside = other[: len(trail)] == trail
    assert (first <= path(other) < end) == inside
    assert lineage.covers(path(trail), path(other)) == inside
