"""What a child may have of what its parent has."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hayflick_controller import narrowing
from hayflick_controller.model import NetworkPolicy, Resources

PARENT = Resources(
    cpu_millis=500,
    memory_limit_bytes=2**26,
    pids_limit=10,
    open_files_limit=20,
    file_size_limit_bytes=30,
    workspace_limit_bytes=40,
    tmp_limit_bytes=50,
    cpu_time_limit_us=6_000_000,
    network=NetworkPolicy(
        allow_controller=True,
        allow_loopback=True,
        allowed_hosts=("a.org", "*.b.org:8443", "10.0.0.1:80", "[::1]:443"),
        egress_limit_bytes=70,
    ),
    output_limit_bytes=80,
)
numbers = st.integers(0, 3)
hosts = st.lists(
    st.sampled_from(["a.b", "a.b:80", "a.b:443", "*.b", "*.b:80", "c.a.b", "*.a.b", "1.2.3.4", "[::1]:80"])
).map(tuple)
networks = st.builds(NetworkPolicy, st.booleans(), st.booleans(), st.booleans(), hosts, numbers)
limits = st.builds(
    Resources,
    **{
        field.name: numbers
        for field in fields(Resources)
        if field.name not in ("cpu_time_limit_us", "network")
    },
    cpu_time_limit_us=st.none() | st.integers(1, 3),
    network=networks,
)


@pytest.mark.parametrize(
    ("field", "limit", "more"),
    [
        ("cpu_millis", 500, {"cpu_millis": 501}),
        ("memory_limit_bytes", 2**26, {"memory_limit_bytes": 2**26 + 1}),
        ("pids_limit", 10, {"pids_limit": 11}),
        ("open_files_limit", 20, {"open_files_limit": 21}),
        ("file_size_limit_bytes", 30, {"file_size_limit_bytes": 31}),
        ("workspace_limit_bytes", 40, {"workspace_limit_bytes": 41}),
        ("tmp_limit_bytes", 50, {"tmp_limit_bytes": 51}),
        ("output_limit_bytes", 80, {"output_limit_bytes": 81}),
        ("cpu_time_limit", 6.0, {"cpu_time_limit_us": 6_000_001}),
        ("cpu_time_limit", 6.0, {"cpu_time_limit_us": None}),
    ],
)
def test_more_of_anything_is_named(field: str, limit: float, more: dict[str, Any]) -> None:
    """Whatever a child wants more of is named with its parent's limit."""
    assert narrowing.excess(replace(PARENT, **more), PARENT) == (field, limit)


@pytest.mark.parametrize(
    ("field", "more"),
    [
        ("allow_external", {"allow_external": True}),
        ("egress_limit_bytes", {"egress_limit_bytes": 71}),
        ("egress_limit_bytes", {"egress_limit_bytes": 0}),
        *(
            ("allowed_hosts", {"allowed_hosts": (host,)})
            for host in (
                *("b.org:8443", "x.a.org", "a.org:8443", "x.b.org", "x.b.org:443", "*.a.org", "*.org:8443"),
                *("xb.org:8443", "10.0.0.1", "10.0.0.2:80", "[::1]:80", "[::1]", "*.1.org:80", "org"),
            )
        ),
    ],
)
def test_no_licence_is_added(field: str, more: dict[str, Any]) -> None:
    """A licence, a host or a port that the parent has not got is refused."""
    network = replace(PARENT.network, **more)
    found = narrowing.excess(replace(PARENT, network=network), PARENT)
    assert found is not None
    assert found.field == f"network.{field}"


@pytest.mark.parametrize(
    "host",
    ["a.org", "a.org:80", "a.org:443", "x.b.org:8443", "x.y.b.org:8443", "*.x.b.org:8443", "10.0.0.1:80"],
)
def test_a_host_within_the_parents_is_no_more(host: str) -> None:
    """One of its parent's names, or of the names and ports below one, a child may have."""
    network = replace(PARENT.network, allowed_hosts=(host,))
    assert narrowing.excess(replace(PARENT, network=network), PARENT) is None


def test_the_whole_outside_is_any_name_and_no_address() -> None:
    """A parent that may reach everything may give a child some of it, but nothing of the host's own."""
    parent = NetworkPolicy(allow_external=True)
    assert narrowing.network_excess(NetworkPolicy(allowed_hosts=("x.org:1",)), parent) is None
    for host in ("127.0.0.1:80", "[::1]:80", "localhost:80", "x.localhost"):
        assert narrowing.network_excess(NetworkPolicy(allowed_hosts=(host,)), parent) is not None


def test_two_entries_may_cover_one() -> None:
    """Ports are compared one by one."""
    parent = NetworkPolicy(allowed_hosts=("a:80", "a:443"))
    assert narrowing.network_excess(NetworkPolicy(allowed_hosts=("a",)), parent) is None


def test_what_is_left_out_is_the_parents() -> None:
    """A child that names only what it must gets its parent's other limits, and no licence."""
    child = narrowing.inherited(Resources(10, 2**24), PARENT)
    network = NetworkPolicy(egress_limit_bytes=70)
    assert child == replace(PARENT, cpu_millis=10, memory_limit_bytes=2**24, network=network)


@given(limits, limits)
def test_what_is_inherited_is_never_more(wanted: Resources, parent: Resources) -> None:
    """Filling in what was left out adds nothing: only what was asked for can be too much."""
    child = narrowing.inherited(wanted, parent)
    found = narrowing.excess(child, parent)
    if found is not None:
        name = {"cpu_time_limit": "cpu_time_limit_us"}.get(found.field, found.field)
        asked = wanted.network if name.startswith("network.") else wanted
        assert getattr(asked, name.removeprefix("network."))
    assert narrowing.inherited(child, parent) == child


@given(limits, limits, limits)
def test_generations_only_narrow(child: Resources, parent: Resources, grandparent: Resources) -> None:
    """A grandchild whose line was never refused has no more than its grandparent."""
    parent = narrowing.inherited(parent, grandparent)
    child = narrowing.inherited(child, parent)
    if narrowing.excess(parent, grandparent) is None and narrowing.excess(child, parent) is None:
        assert narrowing.excess(child, grandparent) is None
