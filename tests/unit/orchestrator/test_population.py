"""Who descends from whom, and whom an order is about."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hayflick.v1.controller_pb2 import Scope
from hayflick_orchestrator.population import Population, tops


@dataclass(frozen=True)
class One:
    worker_id: str
    contract_id: str = "c1"
    parent_id: str = ""

    @property
    def cgroup_path(self) -> str:
        return f"{self.contract_id}/{self.worker_id}"


Everyone = Population[One, One, str]


@pytest.fixture
def family() -> Everyone:
    """A root with two children, one of which has a child; and a root of another contract."""
    population = Everyone()
    for one in (
        One("root"),
        One("left", parent_id="root"),
        One("right", parent_id="root"),
        One("leaf", parent_id="left"),
        One("other", contract_id="c2"),
    ):
        population.add(one)
    return population


def ids(members: tuple[One, ...]) -> list[str]:
    """Return who *members* are."""
    return [member.worker_id for member in members]


def test_lines(family: Everyone) -> None:
    """Ancestors go up from the parent, descendants come parents first."""
    assert ids(family.ancestors("leaf")) == ["left", "root"]
    assert ids(family.descendants("root")) == ["left", "right", "leaf"]


def test_descent(family: Everyone) -> None:
    """Nobody descends from itself, a sibling, or a stranger."""
    assert family.is_descendant("leaf", "root")
    assert not any(family.is_descendant("leaf", of) for of in ("leaf", "right", "other", "nobody"))


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        (Scope(everything=True), {"root", "left", "right", "leaf", "other"}),
        (Scope(contract_id="c1"), {"root", "left", "right", "leaf"}),
        (Scope(contract_id="c2"), {"other"}),
        (Scope(worker_id="left"), {"left", "leaf"}),
        (Scope(worker_id="nobody"), set()),
        (Scope(everything=False), set()),
        (Scope(), set()),
    ],
)
def test_scopes(family: Everyone, scope: Scope, expected: set[str]) -> None:
    """A scope holds exactly the workers it names, and an empty one holds nobody."""
    assert set(ids(family.in_scope(scope)[0])) == expected


def test_named_workers_bring_their_families(family: Everyone) -> None:
    """A worker that the controller names is ended with its descendants, whatever the scope says."""
    assert set(ids(family.in_scope(Scope(contract_id="c2"), ["left"])[0])) == {"other", "left", "leaf"}


@pytest.mark.parametrize(
    ("birth", "scope"),
    [
        (One("new"), Scope(everything=True)),
        (One("new"), Scope(contract_id="c1")),
        (One("new"), Scope(worker_id="new")),
        (One("new", parent_id="leaf"), Scope(worker_id="root")),
        (One("new", parent_id="unborn"), Scope(worker_id="unborn")),
    ],
)
def test_births_in_scope(family: Everyone, birth: One, scope: Scope) -> None:
    """A kill finds the launches in progress that it is about."""
    family.conceive(birth)
    assert family.in_scope(scope)[1] == (birth,)
    family.settle(birth)
    assert family.in_scope(scope)[1] == ()


def test_births_out_of_scope(family: Everyone) -> None:
    """A kill leaves alone the launches that it is not about."""
    family.conceive(One("new", parent_id="right"))
    for scope in (Scope(contract_id="c2"), Scope(worker_id="left")):
        assert family.in_scope(scope)[1] == ()


def test_a_forged_birth_cannot_displace_the_living(family: Everyone) -> None:
    """A launch whose manifest names a live worker leaves that worker where it is."""
    family.conceive(One("leaf", parent_id="left"))
    assert ids(family.family("leaf")) == ["leaf"]
    with pytest.raises(ValueError, match="lives here already"):
        family.add(One("leaf"))


def test_tops(family: Everyone) -> None:
    """The fewest workers whose cgroups hold a whole selection are those without an ancestor in it."""
    assert ids(tops(family.in_scope(Scope(contract_id="c1"))[0])) == ["root"]
    assert ids(tops((*family.family("left"), *family.family("right")))) == ["left", "right"]


def test_memory_of_the_dead_is_bounded() -> None:
    """The oldest are forgotten first."""
    population = Everyone(max_remembered=2)
    for name in "abc":
        one = One(name)
        population.add(one)
        population.bury(one, f"record of {name}")
    assert [population.remembered(name) for name in "abc"] == [None, "record of b", "record of c"]


@given(st.lists(st.integers(0, 30), max_size=30))
def test_families_are_trees(parents: list[int]) -> None:
    """In any forest, ancestors and descendants are each other's mirror."""
    population = Everyone()
    population.add(One("w0"))
    for index, parent in enumerate(parents, start=1):
        population.add(One(f"w{index}", parent_id=f"w{parent % index}"))
    everyone = [one.worker_id for one in population]
    for name in everyone:
        for below in population.descendants(name):
            assert name in ids(population.ancestors(below.worker_id))
    assert len(population.family("w0")) == len(everyone)
