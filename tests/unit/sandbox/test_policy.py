"""Policies check themselves, name the field, and survive the way to the zygote."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hayflick_sandbox import policy
from hayflick_sandbox.policy import MAX_ENVIRONMENT_BYTES, Limits, Policy

RANGES = policy._RANGES


@pytest.mark.parametrize("name", RANGES)
def test_each_limit_takes_its_range(name: str) -> None:
    """A limit takes the ends of its range and nothing one step beyond them."""
    low, high = RANGES[name]
    for value in (low, high):
        assert getattr(Limits(**{name: value}), name) == value
    for value in (low - 1, high + 1):
        with pytest.raises(ValueError, match=f"^{name}: "):
            Limits(**{name: value})


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9, True, "1", b"1", [], -1, 2**64])
def test_a_limit_is_an_integer(name: str, value: Any) -> None:
    """A limit that is no integer, or a negative or huge one, is refused by name."""
    with pytest.raises(ValueError, match=f"^{name}: "):
        Limits(**{name: value})


def test_only_cpu_time_may_be_absent() -> None:
    """Every limit must be there; CPU time alone may be without one."""
    assert Limits(cpu_time_seconds=None).cpu_time_seconds is None
    for name in set(RANGES) - {"cpu_time_seconds"}:
        with pytest.raises(ValueError, match=f"^{name}: "):
            Limits(**{name: None})  # type: ignore[arg-type]


def test_every_limit_has_a_range() -> None:
    """No limit goes unchecked."""
    assert {field.name for field in dataclasses.fields(Limits)} == set(RANGES)


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a.b", "a b", "ä", "a" * 64, "a\n", None, 7])
def test_hostnames(name: Any) -> None:
    """A host name is one label of lower-case letters, digits and inner hyphens."""
    with pytest.raises(ValueError, match=r"^hostname: "):
        Policy(hostname=name)


@pytest.mark.parametrize("value", [None, 0, 1, "yes"])
def test_loopback_is_a_bool(value: Any) -> None:
    """Loopback is on or off; something that is only true enough is refused."""
    with pytest.raises(ValueError, match=r"^loopback: "):
        Policy(loopback=value)


@pytest.mark.parametrize(
    "environment",
    [{"": "x"}, {"A=B": "x"}, {"1A": "x"}, {"A": "x\0y"}, {"A": 1}, {"A": None}, {1: "x"}, {"A\n": "x"}],
)
def test_environments(environment: Any) -> None:
    """A variable has a C identifier for a name and text without NUL for a value."""
    with pytest.raises(ValueError, match=r"^environment: "):
        Policy(environment=environment)


@pytest.mark.parametrize("character", ["x", "\x01", "\N{SNOWMAN}"])
def test_an_environment_fits_a_packet(character: str) -> None:
    """An environment is bounded as it travels, so that no character makes it overflow a packet."""
    Policy(environment={"A": "x" * (MAX_ENVIRONMENT_BYTES - 20)})
    with pytest.raises(ValueError, match=r"^environment: "):
        Policy(environment={"A": character * MAX_ENVIRONMENT_BYTES})


limits = st.builds(
    Limits,
    **{name: st.integers(low, high) for name, (low, high) in RANGES.items() if name != "cpu_time_seconds"},
    cpu_time_seconds=st.none() | st.integers(1, 10_000),
)
policies = st.builds(
    Policy,
    limits,
    st.booleans(),
    st.from_regex(
        r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True, alphabet=st.characters(max_codepoint=127)
    ),
    st.dictionaries(
        st.from_regex(r"[A-Za-z_]\w{0,8}", fullmatch=True, alphabet=st.characters(max_codepoint=127)),
        st.text().filter(lambda text: "\0" not in text),
        max_size=3,
    ),
    external=st.booleans(),
    worker_service=st.booleans(),
    proxy=st.booleans(),
)


@given(policies)
def test_round_trip(value: Policy) -> None:
    """A policy is the same after its way to the zygote as JSON."""
    assert Policy.from_json(json.loads(json.dumps(value.to_json()))) == value


@given(
    st.dictionaries(
        st.sampled_from(["limits", "loopback", "hostname", "x"]), st.none() | st.integers() | st.text()
    )
)
def test_other_json(values: dict[str, Any]) -> None:
    """JSON that is no policy is a ValueError or TypeError and never a policy."""
    with pytest.raises((ValueError, TypeError, KeyError)):
        Policy.from_json(values)
