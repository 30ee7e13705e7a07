"""What the census makes of what was declared and what the kernel shows."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hypothesis import given
from hypothesis import strategies as st

from hayflick_orchestrator.census import Drift, Observed, PidNamespace, Place, Sightings, compare

LEAF = "self"
HOST = PidNamespace(1, 1)


@dataclass(frozen=True)
class World:
    """A node where all is as declared."""

    places: tuple[Place, ...]
    observed: Observed


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Draw a node with a lineage tree of workers, a few processes in each."""
    paths = ["contract/0"]
    for number in range(1, draw(st.integers(1, 8))):
        paths.append(f"{draw(st.sampled_from(paths))}/{number}")
    if draw(st.booleans()):
        paths.append("predicates/p")
    rootless = draw(st.booleans())
    places: list[Place] = []
    groups: dict[str, frozenset[int]] = {"": frozenset()}
    namespaces = dict.fromkeys(range(1, 20), HOST)
    pid = 1_000
    for path in paths:
        count = draw(st.integers(1, 4))
        pids = frozenset(range(pid, pid + count))
        places.append(Place(path, f"w{path}", init_pid=pid, settled=True))
        prefix = ""
        for part in path.split("/"):
            prefix = f"{prefix}/{part}" if prefix else part
            groups.setdefault(prefix, frozenset())
        groups[f"{path}/{LEAF}"] = pids
        for one in pids:
            # Rootless, init's own namespace is not shown, nor that of a task forked from it.
            shown = not rootless or (one != pid and draw(st.booleans()))
            namespaces[one] = PidNamespace(10_000 + pid if shown else None, 2 if rootless else None)
        pid += count
    leaves = {path: pids for path, pids in groups.items() if path.endswith(f"/{LEAF}")}
    limits = {"pids": leaves, "memory": leaves} if draw(st.booleans()) else {}
    return World(tuple(places), Observed(groups, limits, namespaces))


def kinds(drifts: set[Drift]) -> set[tuple[str, int]]:
    """Return what was found, of which process."""
    return {(drift.kind, drift.pid) for drift in drifts}


@given(worlds(), st.data())
def test_all_as_declared(world: World, data: st.DataObject) -> None:
    """Where all is as declared there is no drift, nor where births and ends are seen half-way."""
    assert compare(world.places, world.observed, LEAF) == set()
    passing = tuple(replace(place, settled=data.draw(st.booleans())) for place in world.places)
    groups = {
        path: pids if data.draw(st.booleans()) else frozenset[int]()
        for path, pids in world.observed.groups.items()
        if all(f"{place.path}/{LEAF}" != path or place.settled for place in passing)
        or data.draw(st.booleans())
    }
    whole = {f"{place.path}/{LEAF}": place for place in passing if place.settled}
    groups |= {path: world.observed.groups[path] for path in whole}
    half_way = replace(
        world.observed,
        groups=groups,
        limits={},
        # An ending place's processes go one by one.
    )
    assert compare(passing, half_way, LEAF) == set()


@given(worlds(), st.data())
def test_a_process_of_the_host_in_a_group(world: World, data: st.DataObject) -> None:
    """A process of another pid namespace in a worker's group is a stray, whose it is and where."""
    place = data.draw(st.sampled_from(world.places))
    path = f"{place.path}/{LEAF}"
    groups = {**world.observed.groups, path: world.observed.groups[path] | {7}}
    limits = {name: {**one, path: one[path] | {7}} for name, one in world.observed.limits.items()}
    namespaces = {**world.observed.namespaces, 7: HOST}
    found = compare(world.places, Observed(groups, limits, namespaces), LEAF)
    assert found == {Drift("stray_process", path, 7, place.worker_id)}


@given(worlds(), st.data())
def test_a_process_where_none_may_be(world: World, data: st.DataObject) -> None:
    """A process in a group that is no worker's own is a stray."""
    path = data.draw(st.sampled_from([one for one in world.observed.groups if not one.endswith(f"/{LEAF}")]))
    groups = {**world.observed.groups, path: frozenset({7})}
    assert kinds(compare(world.places, replace(world.observed, groups=groups), LEAF)) == {
        ("stray_process", 7)
    }


@given(worlds(), st.data())
def test_a_group_of_nobody(world: World, data: st.DataObject) -> None:
    """A group that no place explains is told of once, with all that is below it."""
    above = data.draw(st.sampled_from(sorted(world.observed.groups)))
    path = f"{above}/stray" if above else "stray"
    groups = {**world.observed.groups, path: frozenset[int](), f"{path}/below": frozenset[int]()}
    found = compare(world.places, replace(world.observed, groups=groups), LEAF)
    assert {(drift.kind, drift.path) for drift in found} == {("stray_group", path)}


@given(worlds(), st.data())
def test_a_process_that_left(world: World, data: st.DataObject) -> None:
    """A process of a worker's pid namespace outside its group has escaped; if it is init, it is missing."""
    place = data.draw(st.sampled_from(world.places))
    path = f"{place.path}/{LEAF}"
    pid = data.draw(st.sampled_from(sorted(world.observed.groups[path])))
    groups = {**world.observed.groups, path: world.observed.groups[path] - {pid}}
    found = compare(world.places, replace(world.observed, groups=groups, limits={}), LEAF)
    own = world.observed.namespaces[place.init_pid].inode
    if pid == place.init_pid:
        assert found == {Drift("missing_init", path, pid, place.worker_id)}
    elif own is not None:
        assert found == {Drift("escaped_process", path, pid, place.worker_id)}
    else:
        assert found == set()  # an ordinary user is not shown it


@given(worlds(), st.data())
def test_a_process_without_limits(world: World, data: st.DataObject) -> None:
    """A process that is in its group, but not in the hierarchy of one of its limits, is told of."""
    place = data.draw(st.sampled_from(world.places))
    path = f"{place.path}/{LEAF}"
    pid = data.draw(st.sampled_from(sorted(world.observed.groups[path])))
    whole = {one: pids for one, pids in world.observed.groups.items() if one.endswith(f"/{LEAF}")}
    limits = {"pids": {**whole, path: whole[path] - {pid}}}
    found = compare(world.places, replace(world.observed, limits=limits), LEAF)
    assert found == {Drift("unlimited_process", path, pid, place.worker_id)}


@given(st.lists(st.sets(st.sampled_from([Drift("k", path) for path in "abcd"]))))
def test_what_lasts_is_told_once(counts: list[set[Drift]]) -> None:
    """A drift is told at the second of two counts in a row that saw it, and again only if it went away."""
    sightings = Sightings()
    before: set[Drift] = set()
    told: set[Drift] = set()
    for now in counts:
        told &= now
        expected = (now & before) - told
        assert sightings.confirm(now) == sorted(expected)
        told |= expected
        before = now
