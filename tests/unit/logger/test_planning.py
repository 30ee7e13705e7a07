"""What a commit adds, given what is recorded."""

from __future__ import annotations

import json

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from hayflick_logger.planning import OWN_SOURCE, Plan
from hayflick_rpc.errors import HayflickError


def plan(recorded: dict[tuple[str, int], bytes] | None = None) -> Plan:
    """Return an empty plan over *recorded*."""
    known = recorded or {}

    def last(source: str) -> int:
        return max((sequence for name, sequence in known if name == source), default=0)

    return Plan(last, lambda source, sequence: known.get((source, sequence)), Timestamp(seconds=1))


def added(made: Plan, source: str = "s") -> list[int]:
    """Return the sequences of *source* that *made* adds."""
    return [draft.sequence for draft in made.drafts if draft.source == source]


def body(sequence: int) -> bytes:
    """Return an event, as bytes, for *sequence*."""
    return b'{"event":"audit","n":%d}' % sequence


def test_what_was_recorded_is_passed_over() -> None:
    """A batch that is sent again adds only what is new, and the highest sequence is known."""
    made = plan({("s", 1): body(1), ("s", 2): body(2)})
    made.take("s", [(1, body(1)), (2, body(2)), (3, body(3))])
    assert added(made) == [3]
    assert made.last("s") == 3


def test_the_same_batch_twice_in_one_commit_is_added_once() -> None:
    """Two streams that bring the same events into one commit add them once."""
    made = plan()
    made.take("s", [(1, body(1))])
    made.take("s", [(1, body(1))])
    assert added(made) == [1]


def test_another_event_under_a_recorded_sequence_is_refused_whole() -> None:
    """A contradiction is refused with REQUEST_ID_REUSED, and nothing of its batch is added."""
    made = plan({("s", 1): body(1)})
    with pytest.raises(HayflickError) as caught:
        made.take("s", [(1, body(9)), (2, body(2))])
    assert caught.value.reason_name == "REQUEST_ID_REUSED"
    assert caught.value.metadata == {"request_id": "s/1"}
    assert made.drafts == []


def test_a_gap_is_recorded_as_it_is_and_noted() -> None:
    """A sequence that leaves others out is added behind an event that says which are missing."""
    made = plan({("s", 1): body(1)})
    made.take("s", [(5, body(5))])
    note, entry = made.drafts
    assert (note.source, note.sequence, entry.sequence) == (OWN_SOURCE, 1, 5)
    noted = json.loads(note.event)
    assert noted["event"] == "sequence_gap"
    assert noted["details"] == {"source": "s", "expected_sequence": 2, "received_sequence": 5}


def test_what_fills_a_gap_is_added_late() -> None:
    """An event below the last sequence that was never recorded is added: it would be lost otherwise."""
    made = plan({("s", 5): body(5)})
    made.take("s", [(3, body(3))])
    assert added(made) == [3]
    assert made.last("s") == 5


def test_sources_do_not_share_sequences() -> None:
    """The same sequence of two sources is two events."""
    made = plan()
    made.take("a", [(1, body(1))])
    made.take("b", [(1, body(2))])
    assert [(draft.source, draft.sequence) for draft in made.drafts] == [("a", 1), ("b", 1)]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sets(st.integers(1, 12), max_size=6)), max_size=8))
def test_every_event_taken_is_added_exactly_once(batches: list[tuple[str, set[int]]]) -> None:
    """Whatever is sent and sent again, in whatever batches, each event is in the record once."""
    made = plan()
    for source, sequences in batches:
        made.take(source, [(sequence, body(sequence)) for sequence in sorted(sequences)])
    wanted = {(source, sequence) for source, sequences in batches for sequence in sequences}
    got = [(draft.source, draft.sequence) for draft in made.drafts if draft.source != OWN_SOURCE]
    assert len(got) == len(set(got))
    assert set(got) == wanted
