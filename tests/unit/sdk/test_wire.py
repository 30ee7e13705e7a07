"""The one conversion between dataclasses and the wire."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hayflick.v1 import resources_pb2
from replication import (
    DenialClass,
    FamilyBudget,
    Manifest,
    NetworkPolicy,
    ReplicationContract,
    ResourceSpec,
    Tripwire,
    TripwireScope,
    _rpc,
    _wire,
)
from replication._records import EndReason, Stage

MB = 1024 * 1024
INSTANTS = st.datetimes(datetime(1970, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 -- UTC
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SIZES = st.none() | st.integers(1, 2**50).map(lambda size: size // MB if size % MB == 0 else size / MB)
RESOURCES = st.builds(
    ResourceSpec,
    cpu_limit=st.integers(10, 1_024_000).map(lambda millis: millis / 1_000),
    memory_limit_mb=st.integers(16 * MB, 2**50).map(lambda size: size // MB if size % MB == 0 else size / MB),
    network_policy=st.builds(
        NetworkPolicy,
        st.booleans(),
        st.booleans(),
        st.booleans(),
        allowed_hosts=st.lists(TEXT.filter(bool), max_size=3),
        egress_limit_mb=SIZES,
    ),
    pids_limit=st.none() | st.integers(1, 1_000),
    open_files_limit=st.none() | st.integers(1, 1_000),
    file_size_limit_mb=SIZES,
    workspace_limit_mb=SIZES,
    tmp_limit_mb=SIZES,
    cpu_time_limit_seconds=st.none() | st.integers(1, 10**12).map(lambda us: us / 1_000_000),
    output_limit_mb=SIZES,
)
BUDGETS = st.builds(
    FamilyBudget,
    memory_limit_mb=st.none() | st.integers(16, 2**20),
    cpu_limit=st.none() | st.integers(10, 1_024_000).map(lambda millis: millis / 1_000),
    pids_limit=st.none() | st.integers(2, 1_000),
    max_spawns=st.none() | st.integers(1, 1_000),
    wall_time_limit_seconds=st.none() | st.integers(1, 10**12).map(lambda us: us / 1_000_000),
)
TRIPWIRES = st.builds(
    Tripwire,
    name=st.from_regex(r"[A-Za-z0-9_.-]{1,64}", fullmatch=True),
    count=st.integers(1, 1_000),
    window_seconds=st.integers(1, 3_600_000_000).map(lambda us: us / 1_000_000),
    classes=st.lists(st.sampled_from(DenialClass), unique=True),
    scope=st.sampled_from(TripwireScope),
)
MANIFESTS = st.builds(
    Manifest,
    worker_id=TEXT,
    parent_id=st.none() | TEXT.filter(bool),
    depth=st.integers(0, 2**32 - 1),
    state_snapshot=st.dictionaries(
        TEXT, st.integers() | TEXT | st.floats(allow_nan=False, allow_infinity=False)
    ),
    issued_at=INSTANTS,
    resources=RESOURCES,
    signature=st.binary(min_size=32, max_size=32).map(bytes.hex),
    contract_id=TEXT,
    manifest_id=TEXT,
    expires_at=st.none() | INSTANTS,
    key_id=TEXT,
    epoch=st.integers(0, 2**64 - 1),
)


def over_the_wire(manifest: Manifest) -> Manifest:
    """Send a manifest there and back."""
    sent = _rpc.from_json(_wire.manifest_to_json(manifest), resources_pb2.Manifest())
    received = resources_pb2.Manifest.FromString(sent.SerializeToString())
    return _wire.manifest_from_json(_rpc.to_json(received))


@given(MANIFESTS)
def test_a_manifest_survives_the_wire(manifest: Manifest) -> None:
    """Every field of a manifest comes back as it was sent."""
    assert over_the_wire(manifest) == manifest


GRADES = st.sampled_from("ABC")


@given(RESOURCES)
def test_resources_survive_the_wire(resources: ResourceSpec) -> None:
    """Every limit comes back as it was sent."""
    sent = _rpc.from_json(_wire.resources_to_json(resources), resources_pb2.Resources())
    assert _wire.resources_from_json(_rpc.to_json(sent)) == resources


@given(
    st.builds(
        ReplicationContract,
        max_depth=st.integers(0, 1_000),
        max_replicas=st.integers(1, 1_000_000),
        cooldown_seconds=st.integers(0, 10**12).map(lambda us: us / 1_000_000),
        expiration_seconds=st.none() | st.integers(1_000, 10**12).map(lambda us: us / 1_000_000),
        display_name=TEXT,
        family_budget=st.none() | BUDGETS,
        tripwires=st.lists(TRIPWIRES, max_size=3, unique_by=lambda tripwire: tripwire.name),
        min_grade=st.none() | GRADES | st.dictionaries(st.integers(0, 1_000), GRADES, max_size=16),
    )
)
def test_a_contract_survives_the_wire(contract: ReplicationContract) -> None:
    """Every term of a contract comes back as it was sent."""
    sent = _rpc.from_json(_wire.contract_to_json(contract), resources_pb2.Contract())
    assert _wire.contract_from_json(_rpc.to_json(sent)) == contract


def test_a_cooldown_of_zero_is_sent_and_not_left_out() -> None:
    """Zero is a term that was agreed, which the controller requires to be said."""
    contract = ReplicationContract(0, 1, 0)
    assert _rpc.from_json(_wire.contract_to_json(contract), resources_pb2.Contract()).HasField("cooldown")


# What another client's controller may sign: spelled otherwise than we would.
SIGNED: dict[str, Any] = {
    "workerId": "w",
    "stateSnapshotJson": '{ "b": 1e-7, "a": [1.0, true] }',
    "issueTime": "2026-01-02T03:04:05.678901Z",
    "resources": {"cpuMillis": 500, "memoryLimitBytes": "268435456", "network": {}},
    "signature": "AAAA",
}


def test_an_untouched_manifest_is_sent_exactly_as_it_came() -> None:
    """What was signed is what is sent, to the last space."""
    assert _wire.manifest_to_json(_wire.manifest_from_json(SIGNED)) == SIGNED


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"depth": 3}, "depth"),
        ({"worker_id": "x"}, "workerId"),
        ({"signature": "00" * 32}, "signature"),
        ({"signature": "forged"}, "signature"),
        ({"state_snapshot": {"b": 1e-7, "a": [1.0, 1]}}, "stateSnapshotJson"),
        ({"resources": ResourceSpec(1, 256, NetworkPolicy(allow_controller=False))}, "resources"),
    ],
)
def test_a_changed_manifest_is_sent_as_changed(change: dict[str, Any], field: str) -> None:
    """No edit is quietly undone; the controller sees it and refuses the signature."""
    changed = dataclasses.replace(_wire.manifest_from_json(SIGNED), **change)
    assert _wire.manifest_to_json(changed).get(field) != SIGNED.get(field)


def test_a_snapshot_changed_in_place_is_sent_as_changed() -> None:
    """The snapshot is a dict that a user may write to; that is an edit too."""
    manifest = _wire.manifest_from_json(SIGNED)
    manifest.state_snapshot["a"] = [1, 1]
    assert _wire.manifest_to_json(manifest)["stateSnapshotJson"] != SIGNED["stateSnapshotJson"]


@pytest.mark.parametrize("name", [name for name in resources_pb2.State.keys() if name != "STATE_UNSPECIFIED"])  # noqa: SIM118
def test_every_state_of_the_wire_has_a_stage(name: str) -> None:
    """A new state cannot be forgotten here."""
    assert name.removeprefix("STATE_") in Stage.__members__


@pytest.mark.parametrize(
    "name",
    [name for name in resources_pb2.EndReason.keys() if name != "END_REASON_UNSPECIFIED"],  # noqa: SIM118
)
def test_every_end_reason_of_the_wire_is_known(name: str) -> None:
    """A new reason cannot be forgotten here."""
    assert _wire.end_reason(name) in EndReason
