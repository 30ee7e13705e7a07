"""What users may write down, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replication import (
    FamilyBudget,
    Manifest,
    NetworkPolicy,
    ReplicationContext,
    ReplicationContract,
    ResourceSpec,
    StopCondition,
    Tripwire,
)

NOT_NUMBERS = st.one_of(
    st.none(), st.booleans(), st.text(), st.binary(), st.lists(st.integers()), st.complex_numbers()
)
BAD_FLOATS = st.sampled_from([math.nan, math.inf, -math.inf, -1, -0.001, 10**400, 1e300])


def contract(**changes: Any) -> ReplicationContract:
    """Return a valid contract, but for *changes*."""
    return ReplicationContract(**{"max_depth": 3, "max_replicas": 10, "cooldown_seconds": 1.0, **changes})


def resources(**changes: Any) -> ResourceSpec:
    """Return valid resources, but for *changes*."""
    return ResourceSpec(**{"cpu_limit": 0.5, "memory_limit_mb": 256, **changes})


def manifest(**changes: Any) -> Manifest:
    """Return a valid manifest, but for *changes*."""
    values = {
        "worker_id": "a1b2",
        "parent_id": None,
        "depth": 0,
        "state_snapshot": {"task": "x"},
        "issued_at": datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC),
        "resources": resources(),
    }
    return Manifest(**{**values, **changes})


CONTRACT_NUMBERS = [
    "max_depth",
    "max_replicas",
    "cooldown_seconds",
    "expiration_seconds",
    "manifest_ttl_seconds",
]
RESOURCE_NUMBERS = [
    "cpu_limit",
    "memory_limit_mb",
    "pids_limit",
    "open_files_limit",
    "file_size_limit_mb",
    "workspace_limit_mb",
    "tmp_limit_mb",
    "cpu_time_limit_seconds",
]


@pytest.mark.parametrize("field", CONTRACT_NUMBERS)
@given(value=st.one_of(NOT_NUMBERS.filter(lambda value: value is not None), BAD_FLOATS))
def test_a_bad_number_in_a_contract_is_a_value_error_that_names_the_field(field: str, value: object) -> None:
    """Whatever is not a number in range is refused, and the message begins with the field."""
    with pytest.raises(ValueError, match=f"^{field}: "):
        contract(**{field: value})


@pytest.mark.parametrize("field", RESOURCE_NUMBERS)
@given(value=st.one_of(NOT_NUMBERS.filter(lambda value: value is not None), BAD_FLOATS))
def test_a_bad_limit_is_a_value_error_that_names_the_field(field: str, value: object) -> None:
    """Whatever is not a limit in range is refused, and the message begins with the field."""
    with pytest.raises(ValueError, match=f"^{field}: "):
        resources(**{field: value})


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: contract(max_depth=1.5), "max_depth"),
        (lambda: contract(max_replicas=0), "max_replicas"),
        (lambda: contract(expiration_seconds=0), "expiration_seconds"),
        (lambda: contract(display_name="x" * 129), "display_name"),
        (lambda: contract(stop_conditions="no"), "stop_conditions"),
        (lambda: contract(stop_conditions=None), "stop_conditions"),
        (lambda: contract(stop_conditions=[lambda context: True]), "stop_conditions"),
        (lambda: contract(stop_conditions=[StopCondition("a", cel="true")] * 2), "stop_conditions"),
        (lambda: resources(cpu_limit=0), "cpu_limit"),
        (lambda: resources(memory_limit_mb=15), "memory_limit_mb"),
        (lambda: resources(memory_limit_mb=16.3), "memory_limit_mb"),
        (lambda: resources(network_policy=None), "network_policy"),
        (lambda: NetworkPolicy(allow_external="no"), "allow_external"),  # type: ignore[arg-type]
        (lambda: contract(family_budget={}), "family_budget"),
        (lambda: contract(min_grade="D"), "min_grade"),
        (lambda: contract(min_grade=3), "min_grade"),
        (lambda: contract(min_grade={-1: "A"}), "min_grade"),
        (lambda: contract(min_grade={0: "a"}), "min_grade"),
        (lambda: contract(min_grade=dict.fromkeys(range(17), "A")), "min_grade"),
        (lambda: contract(tripwires="no"), "tripwires"),
        (lambda: contract(tripwires=[Tripwire("a", 1, 1)] * 2), "tripwires"),
        (lambda: contract(tripwires=[Tripwire(str(n), 1, 1) for n in range(17)]), "tripwires"),
        (lambda: FamilyBudget(memory_limit_mb=15), "memory_limit_mb"),
        (lambda: FamilyBudget(cpu_limit=0), "cpu_limit"),
        (lambda: FamilyBudget(pids_limit=1), "pids_limit"),
        (lambda: FamilyBudget(max_spawns=0), "max_spawns"),
        (lambda: FamilyBudget(wall_time_limit_seconds=0), "wall_time_limit_seconds"),
        (lambda: Tripwire("a b", 1, 1), "name"),
        (lambda: Tripwire("a", 1_001, 1), "count"),
        (lambda: Tripwire("a", 1, 3_601), "window_seconds"),
        (lambda: Tripwire("a", 1, 1, ["mounts"]), "classes"),  # type: ignore[list-item]
        (lambda: Tripwire("a", 1, 1, scope="family"), "scope"),  # type: ignore[arg-type]
        (lambda: NetworkPolicy(allowed_hosts="pypi.org"), "allowed_hosts"),
        (lambda: NetworkPolicy(allowed_hosts=["a"] * 65), "allowed_hosts"),
        (lambda: NetworkPolicy(egress_limit_mb=0), "egress_limit_mb"),
        (lambda: resources(output_limit_mb=0), "output_limit_mb"),
        (lambda: StopCondition("", cel="true"), "name"),
        (lambda: StopCondition("x"), "predicate"),
        (lambda: StopCondition("x", predicate=lambda context: True, cel="true"), "predicate"),
        (lambda: StopCondition("x", predicate=3), "predicate"),  # type: ignore[arg-type]
        (lambda: StopCondition("x", cel="1" * 4_097), "cel"),
        (lambda: StopCondition("x", cel="true", timeout_seconds=31), "timeout_seconds"),
        (lambda: manifest(depth=-1), "depth"),
        (lambda: manifest(resources={}), "resources"),
        (lambda: manifest(issued_at=datetime(2026, 1, 1)), "issued_at"),  # noqa: DTZ001 -- the point
        (lambda: manifest(worker_id=7), "worker_id"),
        (lambda: manifest(epoch=2**64), "epoch"),
    ],
)
def test_each_bad_value_is_a_value_error_that_names_its_field(make: Any, field: str) -> None:
    """Every rule of every noun is enforced when the noun is made."""
    with pytest.raises(ValueError, match=f"^{field}: "):
        make()


@given(
    st.integers(0, 1_000),
    st.integers(1, 1_000_000),
    st.floats(0, 31_000_000),
    st.one_of(st.none(), st.floats(0.001, 31_000_000)),
)
def test_every_contract_in_range_is_accepted(
    depth: int, replicas: int, cooldown: float, expiration: float | None
) -> None:
    """Nothing in range is refused."""
    made = ReplicationContract(depth, replicas, cooldown, expiration_seconds=expiration)
    assert made.max_depth == depth
    assert made.stop_conditions == ()


def test_what_was_agreed_cannot_be_changed_afterwards() -> None:
    """A contract's own list does not follow the list it was made from, and fields are frozen."""
    conditions = [StopCondition("a", cel="true")]
    made = contract(stop_conditions=conditions)
    conditions.clear()
    assert [condition.name for condition in made.stop_conditions] == ["a"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.max_depth = 9  # type: ignore[misc]


def test_a_rule_can_be_asked_without_any_service() -> None:
    """Evaluate returns the first condition that is triggered, or None."""
    crowded = StopCondition("crowded", "5 or more", lambda context: context.active_count >= 5)
    deep = StopCondition("deep", "", lambda context: context.manifest.depth > 1)
    made = contract(stop_conditions=[crowded, deep])
    assert made.evaluate(ReplicationContext(manifest(), 5, made)) is crowded
    assert made.evaluate(ReplicationContext(manifest(depth=2), 4, made)) is deep
    assert made.evaluate(ReplicationContext(manifest(), 4, made)) is None


def test_a_rule_that_would_be_denied_for_its_form_says_so_when_asked_here() -> None:
    """A predicate that gives no bool and a CEL rule raise, instead of seeming to pass."""
    context = ReplicationContext(manifest(), 0, contract())
    with pytest.raises(TypeError, match="bool"):
        StopCondition("x", predicate=lambda context: 1).is_triggered(context)  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match="controller"):
        StopCondition("x", cel="true").is_triggered(context)
