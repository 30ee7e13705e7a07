"""Which network policy is wider than which, and what two have in common."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hayflick_controller.licences import common, settled, wider_in
from hayflick_controller.model import NetworkPolicy
from hayflick_rpc import hosts

flags = st.booleans()
names = st.sampled_from(["a.com", "b.a.com", "c.b.a.com", "d.org", "10.0.0.1", "[fd00::1]"])
rules = st.lists(
    st.one_of(
        st.builds(lambda name, port: name + port, names, st.sampled_from(["", ":443", ":99"])),
        st.sampled_from(["*.a.com", "*.b.a.com:443", "*.org:99"]),
    ),
    max_size=4,
    unique=True,
).map(tuple)
policies = st.builds(
    NetworkPolicy, flags, flags, flags, rules, st.sampled_from([0, 1, 1_000, 2**53 - 1])
).map(settled)


@given(policies, policies)
def test_what_two_have_in_common_is_wider_than_neither(one: NetworkPolicy, two: NetworkPolicy) -> None:
    """Neither gives less than both have in common, and the order does not matter to what is reached."""
    shared = settled(common(one, two))
    assert wider_in(shared, one) == ""
    assert wider_in(shared, two) == ""


@given(
    policies,
    policies,
    st.sampled_from(["a.com", "b.a.com", "x.b.a.com", "d.org"]),
    st.sampled_from([80, 443, 99]),
)
def test_nothing_that_both_allow_is_lost(
    one: NetworkPolicy, two: NetworkPolicy, name: str, port: int
) -> None:
    """A host is reached by what is common exactly when each of the two reaches it."""

    def reached(policy: NetworkPolicy) -> bool:
        return not hosts.refusal(hosts.rules(policy.allowed_hosts), name, port)

    assert reached(common(one, two)) == (reached(one) and reached(two))


@given(policies)
def test_every_policy_is_as_wide_as_itself(policy: NetworkPolicy) -> None:
    """No policy is wider than itself, and the empty one is wider than none."""
    assert wider_in(policy, policy) == ""
    assert wider_in(NetworkPolicy(), policy) == ""
    assert settled(common(policy, NetworkPolicy())) == NetworkPolicy()


HELD = NetworkPolicy(allow_controller=True, allowed_hosts=("*.a.com", "d.org:99"), egress_limit_bytes=100)


@pytest.mark.parametrize(
    ("wanted", "field"),
    [
        (NetworkPolicy(), ""),
        (NetworkPolicy(allow_controller=True), ""),
        (NetworkPolicy(allow_external=True), "allow_external"),
        (NetworkPolicy(allow_loopback=True), "allow_loopback"),
        (NetworkPolicy(allowed_hosts=("x.a.com:443",), egress_limit_bytes=100), ""),
        (NetworkPolicy(allowed_hosts=("a.com",), egress_limit_bytes=100), "allowed_hosts"),
        (NetworkPolicy(allowed_hosts=("d.org",), egress_limit_bytes=100), "allowed_hosts"),
        (NetworkPolicy(allowed_hosts=("d.org:99",), egress_limit_bytes=101), "egress_limit_bytes"),
        (NetworkPolicy(allowed_hosts=("d.org:99",)), "egress_limit_bytes"),
        (NetworkPolicy(allowed_hosts=("d.org:99",), egress_limit_bytes=1), ""),
    ],
)
def test_the_field_that_is_wider_is_named(wanted: NetworkPolicy, field: str) -> None:
    """Whoever asks for more learns by field of what."""
    assert wider_in(wanted, HELD) == field
