"""An entry's line and hash."""

from __future__ import annotations

import json
from typing import Any

import pytest
import rfc8785
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from hayflick.v1 import logger_pb2
from hayflick_logger import entries
from hayflick_rpc import events
from hayflick_rpc.errors import HayflickError
from hayflick_tlog.merkle import leaf_hash
from hayflick_tlog.tiles import MAX_ENTRY_BYTES

ids = st.from_regex(r"[A-Za-z0-9_.-]{1,64}", fullmatch=True) | st.just("")
seconds = st.integers(-62_135_596_800, 253_402_300_799)
nanos = st.integers(0, 999_999_999) | st.integers(0, 999).map(lambda millis: millis * 1_000_000)
leaves = (
    st.none()
    | st.booleans()
    # There is one zero: RFC 8785 writes -0 as 0.
    | st.floats(allow_nan=False, allow_infinity=False).map(lambda number: number or 0.0)
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
)
details = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=10),
    st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab"), inner, max_size=3)
    ),
    max_size=4,
)


@st.composite
def any_event(draw: st.DrawFn) -> logger_pb2.Event:
    """Return any event that may be recorded."""
    event = logger_pb2.Event(
        event=draw(st.from_regex(r"[a-z][a-z0-9_]{0,63}", fullmatch=True)),
        contract_id=draw(ids),
        worker_id=draw(ids),
        parent_id=draw(ids),
        root_id=draw(ids),
    )
    event.timestamp.seconds = draw(seconds)
    event.timestamp.nanos = draw(nanos)
    found = draw(details)
    if found:
        event.details.update(found)
    return event


def simple() -> logger_pb2.Event:
    """Return the least that can be recorded about a worker."""
    event = logger_pb2.Event(event="audit", worker_id="w1")
    event.timestamp.seconds = 1
    return event


@given(event=any_event(), index=st.integers(0, 2**53 - 1), sequence=st.integers(1, 2**53 - 1))
def test_an_entry_reads_back_as_what_was_written(event: logger_pb2.Event, index: int, sequence: int) -> None:
    """Every event that may be recorded comes back equal, from an entry that is canonical JSON."""
    entry = entries.compose(index, "a/b:c", sequence, events.to_json(event))
    # As RFC 8785 has it, every number is a double.
    assert entry == rfc8785.dumps(json.loads(entry, parse_int=float))
    assert entries.parse(entry, index) == logger_pb2.RecordedEvent(
        index=index, source="a/b:c", sequence=sequence, event=event, hash=leaf_hash(entry)
    )
    assert entries.event_bytes(entry) == events.to_json(event)


@given(document=details)
def test_the_canonical_form_is_that_of_rfc_8785(document: Any) -> None:
    """Whatever its strings, keys, nesting and numbers, a document is spelt as the reference has it."""
    assert events.canonical(document) == rfc8785.dumps(document)


@pytest.mark.parametrize(
    "number", [0.0, -0.0, 5e-324, 1e-7, 1e-4, 0.1 + 0.2, -2.5, 1e15 + 0.5, 2.0**53, 1e16, 1e21]
)
def test_numbers_are_spelt_as_rfc_8785_has_them(number: float) -> None:
    """Numbers on either side of each border between two spellings are spelt as the reference has them."""
    canonical = rfc8785.dumps({"value": number})
    assert events.canonical({"value": number}) == canonical
    assert b'"details":' + canonical in events.to_json(detailed(number))


@given(stamp=st.builds(Timestamp, seconds=seconds, nanos=nanos))
def test_an_instant_reads_back_from_its_text(stamp: Timestamp) -> None:
    """Every instant that may be recorded is understood to the nanosecond."""
    assert events.unix_time(stamp.ToJsonString()) == (stamp.seconds, stamp.nanos)


def test_details_that_imitate_an_entry_do_not_confuse_the_reader() -> None:
    """Keys of an entry inside the details belong to the event."""
    event = simple()
    event.details.update({"index": 9, "x": ',"index":9,"sequence":9,"source":"s"}', "y": {"index": 1}})
    entry = entries.compose(0, "s", 1, events.to_json(event))
    assert entries.event_bytes(entry) == events.to_json(event)
    assert entries.parse(entry, 0).event == event


@pytest.mark.parametrize(
    "entry", [b"", b"\n", b"{}", b'{"event":{},"index":0', b"\0" * 100, b"garbage", b"[0]"]
)
def test_garbage_is_no_entry(entry: bytes) -> None:
    """Bytes that are no entry are refused and never crash the reader."""
    with pytest.raises(entries.BadEntry):
        entries.parse(entry, 0)


def test_an_entry_is_bound_to_its_place() -> None:
    """An entry does not read at another index than its own."""
    entry = entries.compose(3, "s", 9, events.to_json(simple()))
    with pytest.raises(entries.BadEntry, match="out of place"):
        entries.parse(entry, 4)


def test_the_largest_entry_fits_a_bundle() -> None:
    """The largest event there can be makes an entry that a bundle can hold."""
    event = logger_pb2.Event(
        event="x" * 64,
        contract_id="c" * 64,
        worker_id="w" * 64,
        parent_id="p" * 64,
        root_id="r" * 64,
        timestamp={"seconds": 1, "nanos": 1},
    )
    event.details["value"] = "x" * (events.MAX_DETAILS_BYTES - len(b'{"value":""}'))
    entry = entries.compose(2**53 - 1, "s" * events.MAX_SOURCE_CHARS, 2**53 - 1, events.to_json(event))
    assert len(entry) <= MAX_ENTRY_BYTES


def make(**fields: Any) -> logger_pb2.Event:
    """Return an event with a timestamp and *fields*."""
    event = logger_pb2.Event(**{"event": "audit", **fields})
    event.timestamp.seconds = 1
    return event


def detailed(value: Any) -> logger_pb2.Event:
    """Return an event whose details hold *value*."""
    event = make()
    event.details["value"] = value
    return event


@pytest.mark.parametrize(
    ("event", "field"),
    [
        (make(event=""), "event.event"),
        (make(event="Bad Name"), "event.event"),
        (make(event="x" * 65), "event.event"),
        (make(worker_id="a/b"), "event.worker_id"),
        (make(contract_id="é"), "event.contract_id"),
        (make(parent_id="x" * 65), "event.parent_id"),
        (make(root_id="a\nb"), "event.root_id"),
        (logger_pb2.Event(event="audit"), "event.timestamp"),
        (logger_pb2.Event(event="audit", timestamp={"seconds": 10**12}), "event.timestamp"),
        (detailed(float("nan")), "event.details"),
        (detailed(float("inf")), "event.details"),
        (detailed("x" * 65_536), "event.details"),
    ],
)
def test_an_event_that_cannot_be_recorded_names_its_field(event: logger_pb2.Event, field: str) -> None:
    """Each field that is out of form is refused with INVALID_FIELD and its name."""
    with pytest.raises(HayflickError) as caught:
        events.to_json(event)
    assert (caught.value.reason_name, caught.value.metadata["field"]) == ("INVALID_FIELD", field)


def test_details_may_be_as_large_as_promised() -> None:
    """Details of exactly 60 KiB as JSON are recorded; one byte more is refused."""
    room = events.MAX_DETAILS_BYTES - len(b'{"value":""}')
    assert len(events.to_json(detailed("x" * room))) > events.MAX_DETAILS_BYTES
    with pytest.raises(HayflickError, match="must be at most 61440 bytes"):
        events.to_json(detailed("x" * (room + 1)))
