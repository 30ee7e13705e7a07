"""Journal, index and metrics together."""

from __future__ import annotations

import asyncio
import resource
import sqlite3
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hayflick.v1 import logger_pb2
from hayflick_logger.metrics import MAX_WAITING_SAMPLES, MetricFilter
from hayflick_logger.record import MAX_PAGE_BYTES, Record
from hayflick_logger.rows import Filter
from hayflick_logger.tail import Growth, follow
from hayflick_logger.wal import path_of
from hayflick_rpc import events
from hayflick_rpc.errors import HayflickError

if TYPE_CHECKING:
    from pathlib import Path

Open = Callable[[], Record]
Add = Callable[..., None]
OpenAt = Callable[["Path"], Record]


def numbers(record: Record, wanted: Filter = Filter(), limit: int = 1_000) -> list[int]:  # noqa: B008 -- frozen
    """Return the sequences of the test's own source that *wanted* lets through."""
    found, _ = record.events(wanted, 0, record.journal.next_index, limit)
    return [entry.sequence for entry in found if entry.source == "test"]


def test_what_is_recorded_is_found_after_a_restart(open_record: Open, add: Add) -> None:
    """Entries, and the last sequence of each source, are known again when the logger starts anew."""
    add(open_record(), 1, 2, 3)
    record = open_record()
    assert numbers(record) == [1, 2, 3]
    assert record.plan().last("test") == 3


@pytest.mark.parametrize("damage", ["missing", "garbage", "foreign", "old"])
def test_the_index_is_built_anew(
    open_record: Open, add: Add, directory: Path, open_elsewhere: OpenAt, damage: str
) -> None:
    """An index that is missing, damaged, another journal's or another version's is built anew."""
    record = open_record()
    add(record, *range(1, 400))
    record.close()
    index = directory / "index.sqlite"
    match damage:
        case "missing":
            index.unlink()
        case "garbage":
            index.write_bytes(b"garbage" * 1_000)
        case "old":
            with sqlite3.connect(index) as database:
                database.execute("PRAGMA user_version = 99")
            database.close()
        case "foreign":
            other = directory.with_name("other")
            add(open_elsewhere(other), 1, worker_id="other")
            open_elsewhere(other).close()
            index.write_bytes((other / "index.sqlite").read_bytes())
    record = open_record()
    assert numbers(record) == list(range(1, 400))
    add(record, 400)
    assert numbers(record)[-1] == 400


def test_an_index_that_is_behind_catches_up(open_record: Open, add: Add, directory: Path) -> None:
    """Entries that the index missed, across segments, are indexed at the start and none twice."""
    record = open_record()
    add(record, *range(1, 50))
    record.close()
    index = directory / "index.sqlite"
    behind = index.read_bytes()
    record = open_record()
    for number in range(50, 600, 50):
        add(record, *range(number, number + 50))
    record.close()
    assert (directory / "log" / "tile" / "entries" / "001").exists()
    index.write_bytes(behind)
    assert numbers(open_record()) == list(range(1, 600))


def test_what_the_index_did_not_write_is_known(open_record: Open, add: Add, directory: Path) -> None:
    """Entries that are only in the index's memory are told apart from new ones, before a crash and after."""
    record = open_record()
    add(record, 1, 3)
    record.flush()
    add(record, 2, 4)
    assert record.waiting == 2
    for again in (1, 2, 3, 4):
        before = record.journal.edge
        add(record, again)
        assert record.journal.edge == before
    assert record.plan().last("test") == 4
    index = (directory / "index.sqlite", directory / "index.sqlite-wal")
    crashed = [path.read_bytes() for path in index]
    record.close()
    for path, content in zip(index, crashed, strict=True):
        path.write_bytes(content)
    record = open_record()
    assert (record.waiting, numbers(record)) == (0, [1, 3, 2, 4])
    assert record.plan().last("test") == 4


def test_nothing_is_appended_while_the_index_cannot_be_written(open_record: Open, add: Add) -> None:
    """An index that cannot be written stops appending, not reading, and what it owes is written later."""
    record = open_record()
    add(record, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        for attempt in (record.flush, record.plan):
            with pytest.raises(HayflickError) as caught:
                attempt()
            assert caught.value.reason_name == "AUDIT_UNAVAILABLE"
        assert (record.waiting, numbers(record)) == (1, [1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    add(record, 2)
    record.flush()
    assert (record.waiting, numbers(record)) == (0, [1, 2])


def test_a_record_whose_end_was_cut_off_is_refused(open_record: Open, add: Add, directory: Path) -> None:
    """Entries that were signed and are no longer there stop the start, even when cut at a record's end."""
    record = open_record()
    add(record, 1, 2)
    kept = path_of(directory, 0).read_bytes()
    add(record, 3)
    record.close()
    path_of(directory, 0).write_bytes(kept)
    with pytest.raises(HayflickError) as caught:
        open_record()
    assert (caught.value.reason_name, caught.value.metadata) == ("JOURNAL_CORRUPT", {"index": "2"})


@pytest.mark.parametrize("witness", ["checkpoint", "index"])
def test_an_acknowledged_entry_is_never_healed_away(
    open_record: Open, add: Add, directory: Path, witness: str
) -> None:
    """A last entry that lost a byte looks torn; whoever vouches for it, it is refused and kept."""
    record = open_record()
    add(record, 1, 2)
    record.close()
    other = directory / "index.sqlite" if witness == "checkpoint" else directory / "log" / "checkpoint"
    other.unlink()
    path = path_of(directory, 0)
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(HayflickError) as caught:
        open_record()
    assert caught.value.metadata == {"index": "1"}
    assert path.read_bytes() == content[:-1]


def test_a_record_that_was_written_anew_is_refused(open_record: Open, add: Add, directory: Path) -> None:
    """A record whose later entries were replaced by ones that follow is told by its signed checkpoint."""
    record = open_record()
    add(record, 1)
    first = path_of(directory, 0).read_bytes()
    add(record, 2)
    record.close()
    signed = (directory / "log" / "checkpoint").read_bytes()
    (directory / "index.sqlite").unlink()
    (directory / "log" / "checkpoint").unlink()
    path_of(directory, 0).write_bytes(first)
    record = open_record()
    add(record, 2, worker_id="forged")
    record.close()
    (directory / "log" / "checkpoint").write_bytes(signed)
    with pytest.raises(HayflickError) as caught:
        open_record()
    assert caught.value.metadata == {"index": "1"}


def test_a_checkpoint_of_another_key_stops_the_start(
    open_record: Open, add: Add, directory: Path, tmp_path: Path, open_elsewhere: OpenAt
) -> None:
    """A checkpoint that this record's key did not sign is refused."""
    add(open_record(), 1)
    open_record().close()
    add(open_elsewhere(tmp_path / "other"), 1)
    open_elsewhere(tmp_path / "other").close()
    foreign = tmp_path / "other" / "log" / "checkpoint"
    (directory / "log" / "checkpoint").write_bytes(foreign.read_bytes())
    with pytest.raises(HayflickError, match="not this record's"):
        open_record()


def test_a_healed_journal_says_so(open_record: Open, add: Add, directory: Path) -> None:
    """After a torn write the record itself holds an event with what was removed."""
    record = open_record()
    add(record, 1)
    record.close()
    with path_of(directory, 0).open("ab") as file:
        file.write(b"\0\x20\xff\xdf" + b"x" * 5)
    record = open_record()
    found, _ = record.events(Filter(events=("journal_healed",)), 0, record.journal.next_index, 10)
    (healed,) = found
    assert healed.source == "logger"
    assert dict(healed.event.details.items()) == {"removed_bytes": 9.0, "next_index": 1.0}


filters = st.builds(
    Filter,
    contract_id=st.sampled_from(["", "c1", "c2"]),
    worker_id=st.sampled_from(["", "w1"]),
    root_id=st.sampled_from(["", "r1"]),
    events=st.sampled_from([(), ("audit",), ("audit", "heartbeat"), ("nothing",)]),
    start=st.none() | st.tuples(st.integers(0, 10), st.integers(0, 2)),
    end=st.none() | st.tuples(st.integers(0, 10), st.integers(0, 2)),
)
sampled = st.builds(
    logger_pb2.Event,
    event=st.sampled_from(["audit", "heartbeat"]),
    contract_id=st.sampled_from(["", "c1", "c2"]),
    worker_id=st.sampled_from(["", "w1"]),
    root_id=st.sampled_from(["", "r1"]),
    timestamp=st.builds(lambda s, n: {"seconds": s, "nanos": n}, st.integers(0, 10), st.integers(0, 2)),
)


def allows(wanted: Filter, event: logger_pb2.Event) -> bool:
    """Return whether *wanted* lets *event* through, said in Python."""
    stamp = (event.timestamp.seconds, event.timestamp.nanos)
    return (
        all(
            getattr(wanted, name) in ("", getattr(event, name))
            for name in ("contract_id", "worker_id", "root_id")
        )
        and (not wanted.events or event.event in wanted.events)
        and (wanted.start is None or stamp >= wanted.start)
        and (wanted.end is None or stamp < wanted.end)
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sent=st.lists(sampled, min_size=1, max_size=12),
    written=st.integers(0, 12),
    wanted=filters,
    limit=st.integers(1, 4),
)
def test_pages_hold_what_the_filter_lets_through(
    open_record: Open, sent: list[logger_pb2.Event], written: int, wanted: Filter, limit: int
) -> None:
    """Whatever the filter, the page size and the part written yet, the pages are the matching events."""
    record = open_record()
    start = record.journal.next_index
    for part in (sent[:written], sent[written:]):
        record.flush()
        plan = record.plan()
        base = plan.last("pages")
        plan.take("pages", [(base + n, events.to_json(event)) for n, event in enumerate(part, 1)])
        record.commit(plan)
    end = record.journal.next_index
    got: list[logger_pb2.Event] = []
    position = start
    while position < end:
        page, position = record.events(wanted, position, end, limit)
        assert len(page) <= limit
        got += [entry.event for entry in page]
    assert got == [event for event in sent if allows(wanted, event)]


def test_a_page_of_large_events_fits_a_message(open_record: Open) -> None:
    """A page is cut short by bytes, and the next one goes on where it ended."""
    record = open_record()
    event = logger_pb2.Event(event="audit", timestamp={"seconds": 1})
    event.details["text"] = "x" * 60_000
    plan = record.plan()
    plan.take("big", [(number, events.to_json(event)) for number in range(1, 101)])
    record.commit(plan)
    first, go_on = record.events(Filter(), 0, 100, 1_000)
    rest, end = record.events(Filter(), go_on, 100, 1_000)
    assert sum(entry.ByteSize() for entry in first) <= MAX_PAGE_BYTES
    assert [entry.index for entry in first + rest] == list(range(100))
    assert end == 100


def sample(value: float, worker_id: str = "w") -> logger_pb2.MetricSample:
    """Return a sample of *worker_id*."""
    return logger_pb2.MetricSample(
        name="pids", value=value, worker_id=worker_id, timestamp={"seconds": 1, "nanos": 2}
    )


def test_the_oldest_metrics_give_way(open_record: Open) -> None:
    """No more samples are kept than the limit; the newest are."""
    record = open_record()
    for start in range(0, 1_500, 500):
        record.add_metrics([sample(value) for value in range(start, start + 500)])
    found = [kept for _, kept in record.metrics(MetricFilter(), 0, 5_000)]
    assert found == [sample(value) for value in range(500, 1_500)]


def test_metrics_are_found_by_worker_and_name(open_record: Open) -> None:
    """A filter lets only its worker's samples with its name through."""
    record = open_record()
    record.add_metrics([sample(1, "a"), sample(2, "b"), sample(3, "a")])
    assert [kept.value for _, kept in record.metrics(MetricFilter(worker_id="a", name="pids"), 0, 10)] == [
        1,
        3,
    ]
    assert record.metrics(MetricFilter(worker_id="a", name="other"), 0, 10) == []


def test_metrics_that_cannot_be_written_wait(open_record: Open, add: Add) -> None:
    """Samples that cannot be written are not shown as if they were all, and hold up no event."""
    record = open_record()
    record.add_metrics([sample(1)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        for attempt in (record.flush, lambda: record.metrics(MetricFilter(), 0, 10)):
            with pytest.raises(HayflickError) as caught:
                attempt()
            assert caught.value.reason_name == "AUDIT_UNAVAILABLE"
        record.add_metrics([sample(2)] * MAX_WAITING_SAMPLES)
        with pytest.raises(HayflickError):
            record.add_metrics([sample(3)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    add(record, 1)
    assert record.metrics(MetricFilter(), 0, 10_000) != []
    assert record.waiting == 1  # the entry


def test_damaged_metrics_are_set_aside(open_record: Open, directory: Path) -> None:
    """A damaged file of metrics does not keep the record from opening, and is kept for whoever asks."""
    open_record().close()
    (directory / "metrics.sqlite").write_bytes(b"garbage" * 1_000)
    record = open_record()
    record.add_metrics([sample(1)])
    assert (directory / "metrics.sqlite.damaged").read_bytes() == b"garbage" * 1_000


async def test_a_follower_sees_stored_and_live_entries_once(open_record: Open, add: Add) -> None:
    """However the record grows while it is read, a follower gets each entry once, in order."""
    record = open_record()
    add(record, *range(1, 11))
    growth = Growth(record.journal.next_index)
    got: list[int] = []
    async for entry in follow(record, growth, Filter(), 0):
        got.append(entry.sequence)
        if entry.sequence % 10 == 0 and entry.sequence < 50:
            add(record, *range(entry.sequence + 1, entry.sequence + 11))
            growth.reach(record.journal.next_index)
        if entry.sequence == 50:
            growth.end()
    assert got == list(range(1, 51))


async def test_a_follower_waits_without_reading(open_record: Open, add: Add) -> None:
    """A follower at the end of the record wakes when it grows, and ends when it grows no more."""
    record = open_record()
    growth = Growth(0)
    entries = follow(record, growth, Filter(), 0)
    waiting = asyncio.ensure_future(anext(entries))
    await asyncio.sleep(0)
    assert not waiting.done()
    add(record, 1)
    growth.reach(1)
    assert (await waiting).sequence == 1
    growth.end()
    with pytest.raises(StopAsyncIteration):
        await anext(entries)
