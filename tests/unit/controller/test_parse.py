"""What the wire may say, field by field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from hayflick.v1 import controller_pb2, resources_pb2
from hayflick_controller import parse, render, render_terms
from hayflick_controller.model import (
    MAX_EXACT_INTEGER,
    Contract,
    Latch,
    Manifest,
    NetworkPolicy,
    Resources,
    Scope,
    ScopeKind,
    Usage,
)
from hayflick_controller.store import terms as terms_text
from hayflick_rpc.errors import HayflickError

BIG = 2**64 - 1


def contract(**fields: Any) -> resources_pb2.Contract:
    """Make a contract that is valid but for *fields*."""
    fields.setdefault("cooldown", Duration())
    return resources_pb2.Contract(**{"max_depth": 3, "max_replicas": 10, **fields})


def python(**fields: Any) -> resources_pb2.StopCondition:
    """Make a condition with a Python predicate."""
    predicate = {"pickled": b"x", "python_version": "3.11", **fields}
    return resources_pb2.StopCondition(name="rule", python=resources_pb2.PythonPredicate(**predicate))


def cel(name: str = "rule", source: str = "true") -> resources_pb2.StopCondition:
    """Make a condition in CEL."""
    return resources_pb2.StopCondition(name=name, cel=source)


def tripwire(**fields: Any) -> resources_pb2.Tripwire:
    """Make a tripwire that is valid but for *fields*."""
    return resources_pb2.Tripwire(**{"name": "t", "count": 1, "window": Duration(seconds=1), **fields})


def refused(call: Any) -> str:
    """Return the field that a refusal names."""
    with pytest.raises(HayflickError) as caught:
        call()
    assert caught.value.reason_name == "INVALID_FIELD"
    return caught.value.metadata["field"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("contract_id", "mine"),
        ("key_id", "mine"),
        ("active_count", 1),
        ("reserved_count", 1),
        ("kill_switch", resources_pb2.KillSwitch()),
        ("create_time", Timestamp()),
        ("grade_floors", [resources_pb2.GradeFloor()] * 17),
        ("tripwires", [tripwire(name=f"t{number}") for number in range(17)]),
        ("tripwires", [tripwire(), tripwire()]),
        ("max_depth", 1_001),
        ("max_replicas", 0),
        ("max_replicas", 1_000_001),
        ("cooldown", Duration(seconds=-1)),
        ("cooldown", Duration(nanos=1)),
        ("cooldown", Duration(seconds=1, nanos=-1_000)),
        ("cooldown", Duration(seconds=315_576_000_000)),
        ("expiration", Duration()),
        ("expiration", Duration(seconds=-5)),
        ("manifest_ttl", Duration()),
        ("manifest_ttl", Duration(seconds=3_601)),
        ("display_name", "x" * 129),
        ("display_name", "\0"),
        ("stop_conditions", [cel(f"rule {n}") for n in range(65)]),
        ("stop_conditions", [cel(), cel()]),
    ],
)
def test_contracts_are_checked(field: str, value: Any) -> None:
    """Each value that a contract may not have is refused, naming its field."""
    assert refused(lambda: parse.policy(contract(**{field: value}))) == f"contract.{field}"


@pytest.mark.parametrize(
    ("condition", "field"),
    [
        (cel(name=""), ".name"),
        (cel(source="1 +"), ".cel"),
        (resources_pb2.StopCondition(name="rule"), ""),
        (python(pickled=b""), ".python.pickled"),
        (python(pickled=bytes(1024 * 1024 + 1)), ".python.pickled"),
        (python(python_version="three"), ".python.python_version"),
        (python(timeout=Duration(seconds=31)), ".python.timeout"),
        (python(timeout=Duration()), ".python.timeout"),
    ],
)
def test_conditions_are_checked(condition: resources_pb2.StopCondition, field: str) -> None:
    """A condition is refused by the part that is wrong, and by its place."""
    wrong = contract(stop_conditions=[cel("first"), condition])
    assert refused(lambda: parse.policy(wrong)) == f"contract.stop_conditions[1]{field}"


def test_cooldown_is_required() -> None:
    """A contract without a cooldown is refused; zero must be said."""
    missing = resources_pb2.Contract(max_depth=1, max_replicas=1)
    assert refused(lambda: parse.policy(missing)) == "contract.cooldown"


def test_defaults_of_a_contract() -> None:
    """A manifest is good for 60 s and a predicate may run for 2 s where the contract does not say."""
    policy = parse.policy(contract(stop_conditions=[python()]))
    assert policy.manifest_ttl_us == 60_000_000
    assert policy.expiration_us is None
    predicate = policy.stop_conditions[0].predicate
    assert predicate is not None
    assert predicate.timeout_us == 2_000_000


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cpu_millis", 9),
        ("cpu_millis", 1_024_001),
        ("memory_limit_bytes", 0),
        ("memory_limit_bytes", 16 * 1024 * 1024 - 1),
        ("memory_limit_bytes", 2**53),
        ("memory_limit_bytes", BIG),
        ("pids_limit", 2**32 - 1),
        ("open_files_limit", 2**32 - 1),
        ("file_size_limit_bytes", BIG),
        ("workspace_limit_bytes", BIG),
        ("tmp_limit_bytes", 2**53),
        ("cpu_time_limit", Duration()),
        ("cpu_time_limit", Duration(seconds=-1)),
    ],
)
def test_limits_are_checked(field: str, value: Any) -> None:
    """A limit that is missing, too small, or not exact in JSON is refused, naming it."""
    limits = {"cpu_millis": 500, "memory_limit_bytes": 2**28, field: value}
    wrong = resources_pb2.Resources(**limits)
    assert refused(lambda: parse.resources("resources", wrong)) == f"resources.{field}"


@pytest.mark.parametrize("secret", ["short", "x" * 1_025])
def test_a_secret_is_never_echoed(secret: str) -> None:
    """A secret of the wrong length is refused without a part of it in the message."""
    with pytest.raises(HayflickError) as caught:
        parse.secret(secret)
    assert caught.value.metadata["field"] == "secret"
    assert secret not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "1",
        "nonsense",
        '{"a": NaN}',
        '{"a": Infinity}',
        '{"a": 1',
        "[" * 100_000,
        json.dumps({"a": "x" * 1024 * 1024}),
    ],
    ids=["list", "number", "word", "nan", "infinity", "cut", "deep", "large"],
)
def test_a_snapshot_is_a_json_object(text: str) -> None:
    """A snapshot that is not a JSON object of at most 1 MiB is refused."""
    assert refused(lambda: parse.snapshot(text)) == "state_snapshot_json"


def test_a_snapshot_stays_as_it_is() -> None:
    """A snapshot is checked and kept to the byte; none is an empty object."""
    text = '{ "a":\n 1.50, "n": 123456789012345678901234567890 }'
    assert parse.snapshot(text) == text
    assert parse.snapshot("") == "{}"


texts = st.text(st.characters(codec="utf-8"), max_size=20)
exact = st.integers(0, MAX_EXACT_INTEGER)
resources = st.builds(
    Resources,
    cpu_millis=st.integers(0, 2**32 - 1),
    memory_limit_bytes=exact,
    pids_limit=st.integers(0, 2**32 - 1),
    open_files_limit=st.integers(0, 2**32 - 1),
    file_size_limit_bytes=exact,
    workspace_limit_bytes=exact,
    tmp_limit_bytes=exact,
    cpu_time_limit_us=st.none() | st.integers(0, parse.MAX_LENGTH_US),
    network=st.builds(NetworkPolicy, st.booleans(), st.booleans(), st.booleans()),
)
manifests = st.builds(
    Manifest,
    manifest_id=texts,
    contract_id=texts,
    worker_id=texts,
    parent_id=texts,
    depth=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, BIG),
    state_snapshot_json=texts,
    resources=resources,
    issue_us=exact,
    expire_us=exact,
    key_id=texts,
    signature=st.binary(max_size=40),
)


@given(manifests)
def test_manifests_survive_the_wire(manifest: Manifest) -> None:
    """What is issued comes back exactly, or its signature could not be checked."""
    wire = render.manifest(manifest).SerializeToString()
    assert parse.manifest(resources_pb2.Manifest.FromString(wire)) == manifest


@pytest.mark.parametrize(
    "change",
    [
        {"issue_time": Timestamp(seconds=1, nanos=1)},
        {"issue_time": Timestamp(seconds=-1)},
        {"expire_time": Timestamp(seconds=2**60)},
        {"resources": resources_pb2.Resources(cpu_time_limit=Duration(nanos=1_500))},
    ],
)
def test_what_a_signature_could_not_see_is_malformed(change: Any) -> None:
    """A manifest with a time finer than is signed, or out of range, can not have been issued."""
    with pytest.raises(parse.MalformedManifest):
        parse.manifest(resources_pb2.Manifest(**change))


@pytest.mark.parametrize(
    ("scope", "field"),
    [
        (controller_pb2.Scope(), "scope"),
        (controller_pb2.Scope(everything=False), "scope.everything"),
        (controller_pb2.Scope(contract_id=""), "scope.contract_id"),
        (controller_pb2.Scope(worker_id=""), "scope.worker_id"),
    ],
)
def test_a_scope_must_say_what(scope: controller_pb2.Scope, field: str) -> None:
    """A scope that names nothing is refused: nothing is never taken for everything."""
    assert refused(lambda: parse.scope(scope)) == field


def test_an_end_must_have_a_reason_and_be_past() -> None:
    """An exit without a reason is refused; one in the future is recorded as now."""
    assert refused(lambda: parse.exit_(resources_pb2.Exit(), 5)) == "exit.reason"
    wire = resources_pb2.Exit(reason=resources_pb2.END_REASON_KILLED, end_time=Timestamp(seconds=100))
    assert parse.exit_(wire, 5).end_us == 5


def test_usage_is_checked() -> None:
    """Usage that no node can mean is refused; nanoseconds are rounded down."""
    wire = resources_pb2.Usage(memory_bytes=1, cpu_time=Duration(nanos=1_999), pids=2)
    assert parse.usage("usage", wire) == Usage(1, 0, 1, 2)
    for wrong in (
        resources_pb2.Usage(memory_bytes=BIG),
        resources_pb2.Usage(cpu_time=Duration(seconds=-1)),
    ):
        assert refused(lambda wrong=wrong: parse.usage("usage", wrong)).startswith("usage.")


FLOOR = resources_pb2.GradeFloor(from_depth=2, min_grade=resources_pb2.ISOLATION_GRADE_B)
BUDGET = resources_pb2.FamilyBudget(
    memory_limit_bytes=2**24, cpu_millis=10, pids_limit=2, max_spawns=1, wall_time_limit=Duration(nanos=1_000)
)


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("family_budget.memory_limit_bytes", {"memory_limit_bytes": 2**24 - 1}),
        ("family_budget.memory_limit_bytes", {"memory_limit_bytes": 2**53}),
        ("family_budget.cpu_millis", {"cpu_millis": 9}),
        ("family_budget.pids_limit", {"pids_limit": 1}),
        ("family_budget.pids_limit", {"pids_limit": 2**23}),
        ("family_budget.max_spawns", {"max_spawns": 2**30}),
        ("family_budget.wall_time_limit", {"wall_time_limit": Duration()}),
        ("family_budget.wall_time_limit", {"wall_time_limit": Duration(seconds=-1)}),
    ],
)
def test_bad_family_budgets_are_refused(field: str, fields: dict[str, Any]) -> None:
    """A limit of a family that is out of range is refused and named."""
    budget = resources_pb2.FamilyBudget(**fields)
    assert refused(lambda: parse.policy(contract(family_budget=budget))) == f"contract.{field}"


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("name", {"name": ""}),
        ("name", {"name": "a b"}),
        ("name", {"name": "x" * 65}),
        ("classes[0]", {"classes": [0]}),
        ("classes[1]", {"classes": [1, 99]}),
        ("classes", {"classes": [1, 1]}),
        ("count", {"count": 0}),
        ("count", {"count": 1_001}),
        ("window", {"window": None}),
        ("window", {"window": Duration()}),
        ("window", {"window": Duration(seconds=3_601)}),
        ("scope", {"scope": 99}),
    ],
)
def test_bad_tripwires_are_refused(field: str, fields: dict[str, Any]) -> None:
    """A tripwire that could not be kept is refused and the field named."""
    wrong = contract(tripwires=[tripwire(name="good"), tripwire(**fields)])
    assert refused(lambda: parse.policy(wrong)) == f"contract.tripwires[1].{field}"


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("min_grade", {}),
        ("min_grade", {"min_grade": 99}),
        ("from_depth", {"min_grade": 1, "from_depth": 1_001}),
    ],
)
def test_bad_floors_are_refused(field: str, fields: dict[str, Any]) -> None:
    """A floor without a grade, or for generations that no contract has, is refused."""
    wrong = contract(grade_floors=[FLOOR, resources_pb2.GradeFloor(**fields)])
    assert refused(lambda: parse.policy(wrong)) == f"contract.grade_floors[1].{field}"


def test_terms_come_back_as_they_went_in() -> None:
    """What a contract says about containment is read, and rendered again, without a change."""
    wires = [
        tripwire(name="any", scope=resources_pb2.TRIPWIRE_SCOPE_WORKER),
        tripwire(name="some", classes=[1, 10], count=3, scope=resources_pb2.TRIPWIRE_SCOPE_FAMILY),
    ]
    said = contract(grade_floors=[FLOOR], family_budget=BUDGET, tripwires=wires)
    policy = parse.policy(said)
    terms = render_terms.contract_terms(policy, 2)
    assert terms.min_grade == resources_pb2.ISOLATION_GRADE_B
    assert terms.family_budget == BUDGET
    assert list(terms.tripwires) == wires
    assert (terms.max_replicas, terms.max_depth) == (10, 3)
    whole = render.contract(Contract("c", policy, "k", 0), Latch(Scope(ScopeKind.CONTRACT, "c")))
    assert (whole.family_budget, list(whole.grade_floors), list(whole.tripwires)) == (BUDGET, [FLOOR], wires)
    assert terms_text.from_text(terms_text.text_of(policy.terms)) == policy.terms


def test_the_strictest_floor_that_applies_counts() -> None:
    """A generation is held to the highest of the floors that begin at or above it."""
    grade = resources_pb2.IsolationGrade
    floors = [
        resources_pb2.GradeFloor(from_depth=1, min_grade=grade.ISOLATION_GRADE_A),
        resources_pb2.GradeFloor(from_depth=2, min_grade=grade.ISOLATION_GRADE_C),
    ]
    terms = parse.policy(contract(grade_floors=floors)).terms
    assert [terms.min_grade(depth).name for depth in (0, 1, 2, 9)] == ["UNSPECIFIED", "A", "A", "A"]


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("allowed_hosts", {"allowed_hosts": [f"h{number}" for number in range(65)]}),
        ("allowed_hosts", {"allowed_hosts": ["a", "a"]}),
        *(
            ("allowed_hosts[0]", {"allowed_hosts": [host]})
            for host in (
                "",
                "*",
                "A.b",
                "a..b",
                "a.",
                ".a",
                "a:0",
                "a:65536",
                "a:x",
                "*.*.a",
                "a\0b",
                "a b",
                "a/b",
            )
        ),
        ("egress_limit_bytes", {"egress_limit_bytes": 2**53}),
    ],
)
def test_bad_licences_are_refused(field: str, fields: dict[str, Any]) -> None:
    """A host that is not spelled as one, or a budget too large to sign, is refused and named."""
    wire = resources_pb2.Resources(cpu_millis=10, memory_limit_bytes=2**24, network=fields)
    assert refused(lambda: parse.resources("resources", wire)) == f"resources.network.{field}"


def test_good_licences_come_back() -> None:
    """Names, addresses and ports are kept as they are, in their order."""
    hosts = ["pypi.org", "*.example.org:8443", "127.0.0.1:80", "[::1]:443", "under_score"]
    network = resources_pb2.NetworkPolicy(allowed_hosts=hosts, egress_limit_bytes=5)
    wire = resources_pb2.Resources(
        cpu_millis=10, memory_limit_bytes=2**24, network=network, output_limit_bytes=7
    )
    assert render.resources(parse.resources("resources", wire)) == wire
