"""The values of a message are counted in its bytes, as a parser would find them."""

from __future__ import annotations

import pytest
from google.protobuf.struct_pb2 import Value
from hypothesis import given
from hypothesis import strategies as st

from hayflick.v1 import worker_pb2
from hayflick.v1.resources_pb2 import NetworkPolicy, Resources
from hayflick_rpc.fields import MAX_DEPTH, has_few

REPLICATE = worker_pb2.ReplicateRequest.DESCRIPTOR


@given(hosts=st.lists(st.text(max_size=4), max_size=20), reason=st.text(), loopback=st.booleans())
def test_every_value_counts_once(*, hosts: list[str], reason: str, loopback: bool) -> None:
    """What a message holds is counted to the last one, at each level."""
    network = NetworkPolicy(allowed_hosts=hosts, allow_loopback=loopback)
    request = worker_pb2.ReplicateRequest(reason=reason, resources=Resources(network=network))
    count = len(hosts) + loopback + bool(reason) + 2  # resources and its network
    data = request.SerializeToString()
    assert has_few(data, REPLICATE, count)
    assert not has_few(data, REPLICATE, count - 1)


@given(st.binary(max_size=64))
def test_any_bytes(data: bytes) -> None:
    """Whatever came is counted without a fault, and what is too much for a few is so for fewer."""
    answers = [has_few(data, REPLICATE, most) for most in range(40)]
    assert answers == sorted(answers)


def test_long_payloads_are_one_value() -> None:
    """The bytes of a long string are not looked into."""
    request = worker_pb2.ReplicateRequest(state_snapshot_json="\n\x00" * 1_000_000)
    assert has_few(request.SerializeToString(), REPLICATE, 1)


def test_groups_are_refused() -> None:
    """A group, whose end only a parser finds, counts as too much."""
    assert not has_few(b"\x0b" + b"\x12\x00" * 10 + b"\x0c", REPLICATE)


@pytest.mark.parametrize("depth", [MAX_DEPTH // 2, MAX_DEPTH * 2])
def test_no_depth_is_a_fault(depth: int) -> None:
    """What is nested beyond what any parser reads is counted as far as it is read."""
    data = b""
    for _ in range(depth):  # a list in a list, by google.protobuf.Value's sixth field and its first
        data = _field(6, _field(1, data))
    assert has_few(data, Value.DESCRIPTOR)
    assert not has_few(data, Value.DESCRIPTOR, 20)


def _field(number: int, data: bytes) -> bytes:
    size, out = len(data), bytes([number << 3 | 2])
    while size > 0x7F:
        out += bytes([size & 0x7F | 0x80])
        size >>= 7
    return out + bytes([size]) + data
