"""The packets between an orchestrator and init: exactly ours, or a violation."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hayflick_sandbox import messages
from hayflick_sandbox.messages import (
    Beat,
    Finding,
    Introduce,
    KillTask,
    Probed,
    ProtocolViolation,
    Ready,
    RunTask,
    SetupFailed,
    TaskExited,
    TaskStarted,
)

text = st.text(max_size=50)
whole = st.integers(-(2**53), 2**53)
seconds = st.floats(allow_nan=False, allow_infinity=False)
variables = st.dictionaries(text, text, max_size=3)
findings = st.lists(st.builds(Finding, text, st.booleans(), text), max_size=3).map(tuple)
from_init = st.one_of(
    st.builds(Probed, findings, whole),
    st.permutations(messages.DESCRIPTORS).map(lambda names: Ready(tuple(names))),
    st.just(Ready()),
    st.builds(SetupFailed, text, whole, text),
    st.builds(Beat, whole),
    st.builds(TaskStarted, text),
    st.builds(TaskExited, text, st.none() | whole, st.none() | whole, seconds, whole),
)
to_init = st.one_of(
    st.builds(Introduce, text, variables),
    st.builds(RunTask, text, st.just("call"), text),
    st.builds(
        RunTask, text, st.just("exec"), argv=st.lists(text, max_size=4).map(tuple), environment=variables
    ),
    st.builds(KillTask, text, whole),
)


@given(from_init)
def test_words_of_init_round_trip(message: messages.FromInit) -> None:
    """What init says is what the orchestrator hears."""
    assert messages.parse_from_init(messages.encode(message)) == message


@given(to_init)
def test_orders_round_trip(message: messages.ToInit) -> None:
    """What the orchestrator orders is what init obeys."""
    assert messages.parse_to_init(messages.encode(message)) == message


@given(st.binary(max_size=300))
def test_any_bytes(packet: bytes) -> None:
    """Any bytes are a message or a ProtocolViolation, and never another error."""
    for parse in (messages.parse_from_init, messages.parse_to_init):
        try:
            parse(packet)
        except ProtocolViolation:
            continue


names = st.sampled_from(
    ["Ready", "SetupFailed", "Beat", "TaskStarted", "TaskExited", "Probed", "RunTask", "Exit", ""]
)
fields = st.sampled_from(
    [
        "step",
        "errno",
        "message",
        "tasks",
        "task_id",
        "exit_code",
        "signal",
        "cpu_seconds",
        "argv",
        "findings",
        "x",
    ]
)
values = st.none() | st.booleans() | whole | st.floats() | text | st.lists(whole, max_size=2)


@given(names, st.dictionaries(fields, values, max_size=6))
def test_near_misses(name: str, content: dict[str, Any]) -> None:
    """A packet of our shape with wrong names or types is a violation, or else exactly well typed."""
    try:
        message = messages.parse_from_init(json.dumps([name, content]).encode())
    except ProtocolViolation:
        return
    assert type(message).__name__ == name
    assert not any(type(value) is bool for value in content.values())


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"[]",
        b"{}",
        b"null",
        b'["Ready"]',
        b'["Probed",{"findings":[]}]',
        b'["Probed",{"findings":{},"elapsed_us":1}]',
        b'["Probed",{"findings":[["a",1,"b"]],"elapsed_us":1}]',
        b'["Probed",{"findings":[["a",true]],"elapsed_us":1}]',
        b'["Probed",{"findings":["abc"],"elapsed_us":1}]',
        b'["Probed",{"findings":[["a",true,"' + b"s" * 201 + b'"]],"elapsed_us":1}]',
        b'["Probed",{"findings":[' + b'["a",true,""],' * 256 + b'["a",true,""]],"elapsed_us":1}]',
        b'["Ready",{},1]',
        b'["Ready",{"x":1}]',
        b'["Ready",[]]',
        b'["Ready",{"descriptors":["master_key"]}]',
        b'["Ready",{"descriptors":["worker_service","worker_service"]}]',
        b'["Ready",{"descriptors":"worker_service"}]',
        b'["Ready",{"descriptors":[["worker_service"]]}]',
        b'["Beat",{"tasks":1,"descriptors":[]}]',
        b'[["Ready"],{}]',
        b'["Beat",{"tasks":true}]',
        b'["Beat",{"tasks":1.5}]',
        b'["Beat",{}]',
        b'["RunTask",{"task_id":"a","kind":"exec"}]',
        b"[" * 60_000,
        b'["Beat",{"tasks":' + b"9" * 5_000 + b"}]",
        b'["TaskExited",{"task_id":"a","exit_code":0,"signal":null,"cpu_seconds":NaN,"max_rss_bytes":1}]',
        b'["TaskExited",{"task_id":"a","exit_code":0,"signal":null,"cpu_seconds":Infinity,"max_rss_bytes":1}]',
        b'["TaskExited",{"task_id":"a","exit_code":0,"signal":null,"cpu_seconds":1e999,"max_rss_bytes":1}]',
    ],
)
def test_violations(packet: bytes) -> None:
    """A packet that no init of ours sends is a violation."""
    with pytest.raises(ProtocolViolation):
        messages.parse_from_init(packet)


def test_an_order_is_no_word_of_init() -> None:
    """The two directions do not understand one another's messages."""
    with pytest.raises(ProtocolViolation):
        messages.parse_from_init(messages.encode(KillTask("t", 9)))
    with pytest.raises(ProtocolViolation):
        messages.parse_to_init(messages.encode(Ready()))


def test_an_oversized_order_is_not_sent() -> None:
    """An argv that fits no packet is refused where it is made."""
    with pytest.raises(ProtocolViolation):
        messages.encode(RunTask("t", "exec", argv=("x" * messages.MAX_PACKET_BYTES,)))
