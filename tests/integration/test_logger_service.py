"""The logger as its callers see it: a real process, real streams."""

from __future__ import annotations

import asyncio
import signal
import stat
from collections.abc import AsyncIterator, Callable, Iterable
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hayflick.v1 import logger_pb2, logger_pb2_grpc
from hayflick_rpc.audit import AuditClient
from hayflick_rpc.channel import connect
from hayflick_rpc.status import from_rpc_error
from hayflick_tlog.merkle import root_of

if TYPE_CHECKING:
    from hayflick_rpc.errors import HayflickError

Start = Callable[..., Any]


def event(number: int = 0, name: str = "audit", **fields: str) -> logger_pb2.Event:
    """Return an event that carries *number*."""
    made = logger_pb2.Event(event=name, timestamp={"seconds": 1_800_000_000 + number}, **fields)
    made.details["number"] = number
    return made


def request(source: str, *sequences: int, **fields: str) -> logger_pb2.AppendRequest:
    """Return a batch with one event for each of *sequences*."""
    return logger_pb2.AppendRequest(
        source=source,
        events=[
            logger_pb2.SequencedEvent(sequence=sequence, event=event(sequence, **fields))
            for sequence in sequences
        ],
    )


class Logger:
    """The stub, with the two calls that tests make all the time."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.stub: logger_pb2_grpc.LoggerServiceAsyncStub = logger_pb2_grpc.LoggerServiceStub(channel)

    async def append(self, *requests: logger_pb2.AppendRequest) -> list[int]:
        return [answer.sequence async for answer in self.stub.Append(iter(requests))]

    async def list_all(self, page_size: int = 1_000, **fields: Any) -> list[logger_pb2.RecordedEvent]:
        got: list[logger_pb2.RecordedEvent] = []
        token = ""
        while True:
            page = await self.stub.ListEvents(
                logger_pb2.ListEventsRequest(page_size=page_size, page_token=token, **fields)
            )
            got += page.events
            token = page.next_page_token
            if not token:
                return got


@pytest.fixture
async def process(start_logger: Start) -> Any:
    """A logger that runs."""
    return start_logger()


@pytest.fixture
async def logger(process: Any) -> AsyncIterator[Logger]:
    """A connection to it."""
    async with connect(process.address) as channel:
        yield Logger(channel)


async def refused(call: Any) -> HayflickError:
    """Return the error that *call* ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


async def test_what_is_appended_is_listed(logger: Logger) -> None:
    """Events come back as they were sent, in order, with consecutive indexes and a hash each."""
    assert await logger.append(request("a", 1, 2), request("a", 3)) == [2, 3]
    recorded = await logger.list_all()
    assert [(entry.index, entry.source, entry.sequence) for entry in recorded] == [
        (0, "a", 1),
        (1, "a", 2),
        (2, "a", 3),
    ]
    assert [entry.event for entry in recorded] == [event(1), event(2), event(3)]
    assert {len(entry.hash) for entry in recorded} == {32}


async def test_an_event_that_is_sent_again_is_recorded_once(logger: Logger) -> None:
    """A repeated (source, sequence) is acknowledged and not appended."""
    await logger.append(request("a", 1, 2))
    assert await logger.append(request("a", 1, 2, 3)) == [3]
    assert [entry.sequence for entry in await logger.list_all()] == [1, 2, 3]


async def test_another_event_under_a_recorded_sequence_is_refused(logger: Logger) -> None:
    """A sender that contradicts the record is refused with REQUEST_ID_REUSED and changes nothing."""
    await logger.append(request("a", 1))
    error = await refused(logger.append(request("a", 1, worker_id="other")))
    assert (error.reason_name, error.metadata) == ("REQUEST_ID_REUSED", {"request_id": "a/1"})
    assert len(await logger.list_all()) == 1


async def test_a_gap_is_noted_in_the_record(logger: Logger) -> None:
    """A source that leaves out sequences is recorded as it is, behind an event that says so."""
    assert await logger.append(request("a", 1), request("a", 4)) == [1, 4]
    note = (await logger.list_all())[1]
    assert (note.source, note.event.event) == ("logger", "sequence_gap")
    assert dict(note.event.details.items()) == {"source": "a", "expected_sequence": 2, "received_sequence": 4}


async def test_sixty_four_writers_keep_their_order(process: Any) -> None:
    """Concurrent senders lose nothing, double nothing, and each one's events stand in its order."""
    clients = [AuditClient(process.address, f"writer/{number}") for number in range(64)]
    for client in clients:
        await client.start()
    try:
        await asyncio.gather(*(client.record(event(n), 30) for client in clients for n in range(1, 26)))
    finally:
        await asyncio.gather(*(client.close(5) for client in clients))
    async with connect(process.address) as channel:
        logger = Logger(channel)
        recorded = await logger.list_all(page_size=333)
        verdict = await logger.stub.VerifyJournal(logger_pb2.VerifyJournalRequest())
    assert [entry.index for entry in recorded] == list(range(64 * 25))
    for number in range(64):
        own = [entry.sequence for entry in recorded if entry.source == f"writer/{number}"]
        assert own == list(range(1, 26))
    assert (verdict.intact, verdict.entry_count) == (True, 1_600)
    assert verdict.head_hash == root_of([entry.hash for entry in recorded])


async def test_filters_and_pages(logger: Logger) -> None:
    """Pages under a filter hold what matches, in order, once, also while the record grows."""
    await logger.append(request("a", *range(1, 51), worker_id="w1", contract_id="c1", root_id="r1"))
    await logger.append(request("b", *range(1, 51), worker_id="w2", contract_id="c1", root_id="r1"))
    wanted = logger_pb2.EventFilter(worker_id="w2")
    first = await logger.stub.ListEvents(logger_pb2.ListEventsRequest(filter=wanted, page_size=30))
    await logger.append(request("b", *range(51, 61), worker_id="w2"))
    rest = await logger.stub.ListEvents(
        logger_pb2.ListEventsRequest(filter=wanted, page_size=30, page_token=first.next_page_token)
    )
    assert [entry.sequence for entry in [*first.events, *rest.events]] == list(range(1, 61))
    assert len(await logger.list_all(filter=logger_pb2.EventFilter(contract_id="c1", root_id="r1"))) == 100
    assert [entry.index for entry in await logger.list_all(start_index=105)] == list(range(105, 110))
    window = logger_pb2.EventFilter(
        worker_id="w1",
        start_time={"seconds": 1_800_000_010},
        end_time={"seconds": 1_800_000_013},
    )
    assert [entry.sequence for entry in await logger.list_all(filter=window)] == [10, 11, 12]


async def test_a_page_token_serves_its_own_listing_alone(logger: Logger) -> None:
    """A token that was made up, or made for another filter, is refused."""
    await logger.append(request("a", 1, 2, 3))
    page = await logger.stub.ListEvents(logger_pb2.ListEventsRequest(page_size=1))
    for token, wanted in (("nonsense", None), (page.next_page_token, logger_pb2.EventFilter(worker_id="x"))):
        error = await refused(
            logger.stub.ListEvents(logger_pb2.ListEventsRequest(page_token=token, filter=wanted))
        )
        assert error.reason_name == "PAGE_TOKEN_INVALID"


async def test_a_tail_joins_stored_and_live_without_a_seam(logger: Logger) -> None:
    """A tail from the start sees each event once, in order, while others append."""
    await logger.append(request("a", *range(1, 301)))
    call = logger.stub.TailEvents(logger_pb2.TailEventsRequest(start_index=0))

    async def more() -> None:
        for sequence in range(301, 601):
            await logger.append(request("a", sequence))

    appending = asyncio.create_task(more())
    got = [(await call.read()).event.index for _ in range(600)]
    await appending
    call.cancel()
    assert got == list(range(600))


async def test_a_tail_without_a_start_shows_only_what_is_to_come(logger: Logger) -> None:
    """A tail that has begun shows what is recorded from then on and its filter lets through."""
    await logger.append(request("a", 1, 2))
    call = logger.stub.TailEvents(logger_pb2.TailEventsRequest(filter={"worker_id": "w"}))
    await call.initial_metadata()
    await logger.append(request("a", 3), request("a", 4, worker_id="w"))
    assert (await call.read()).event.sequence == 4
    call.cancel()


async def test_a_reader_that_does_not_read_holds_nobody_up(logger: Logger) -> None:
    """A tail whose caller stops reading neither blocks appends nor loses what it has not read."""
    text = "x" * 30_000
    call = logger.stub.TailEvents(logger_pb2.TailEventsRequest(start_index=0))
    for number in range(1, 41):
        made = event(number)
        made.details["text"] = text
        batch = [logger_pb2.SequencedEvent(sequence=number * 10 + n, event=made) for n in range(10)]
        await asyncio.wait_for(logger.append(logger_pb2.AppendRequest(source="a", events=batch)), 20)
    got = [(await call.read()).event.index for _ in range(401)]  # the first is the note of a gap
    call.cancel()
    assert got == list(range(401))


async def test_metrics_are_listed_by_page(logger: Logger) -> None:
    """Samples come back in order, filtered, in pages."""
    samples = [
        logger_pb2.MetricSample(name="pids", value=number, worker_id="w", timestamp={"seconds": number + 1})
        for number in range(5)
    ]
    await logger.append(logger_pb2.AppendRequest(source="a", metrics=samples))
    first = await logger.stub.ListMetrics(logger_pb2.ListMetricsRequest(worker_id="w", page_size=3))
    rest = await logger.stub.ListMetrics(
        logger_pb2.ListMetricsRequest(worker_id="w", page_size=3, page_token=first.next_page_token)
    )
    assert [*first.metrics, *rest.metrics] == samples
    assert rest.next_page_token == ""


def sequenced(sequence: int) -> logger_pb2.SequencedEvent:
    """Return an event under *sequence*."""
    return logger_pb2.SequencedEvent(sequence=sequence, event=event())


def bad_batches() -> Iterable[Any]:
    """Yield what a sender may get wrong, with the field that is to be named."""
    metric = logger_pb2.MetricSample(name="pids", value=1, timestamp={"seconds": 1})
    batch = logger_pb2.AppendRequest
    yield pytest.param(batch(), "source", id="no source")
    yield pytest.param(batch(source="x" * 129), "source", id="long source")
    yield pytest.param(batch(source="a b"), "source", id="source with a space")
    yield pytest.param(batch(source="logger"), "source", id="the logger's own source")
    yield pytest.param(batch(source="a", events=[sequenced(0)]), "events.sequence", id="sequence 0")
    yield pytest.param(
        batch(source="a", events=[sequenced(2), sequenced(2)]), "events.sequence", id="descending"
    )
    yield pytest.param(batch(source="a", events=[sequenced(2**53)]), "events.sequence", id="huge sequence")
    yield pytest.param(batch(source="a", events=map(sequenced, range(1, 1_002))), "events", id="many events")
    yield pytest.param(batch(source="a", metrics=[metric] * 1_001), "metrics", id="many metrics")
    nan = logger_pb2.MetricSample(name="pids", value=float("nan"), timestamp={"seconds": 1})
    yield pytest.param(batch(source="a", metrics=[nan]), "metric.value", id="NaN metric")
    nameless = logger_pb2.SequencedEvent(sequence=1, event=logger_pb2.Event(timestamp={"seconds": 1}))
    yield pytest.param(batch(source="a", events=[nameless]), "event.event", id="no name")
    timeless = logger_pb2.SequencedEvent(sequence=1, event=logger_pb2.Event(event="audit"))
    yield pytest.param(batch(source="a", events=[timeless]), "event.timestamp", id="no time")


@pytest.mark.parametrize(("batch", "field"), [*bad_batches()])
async def test_a_batch_that_cannot_be_recorded_names_its_field(
    logger: Logger, batch: logger_pb2.AppendRequest, field: str
) -> None:
    """Bad input is refused with INVALID_FIELD and the field's name, and nothing of it is recorded."""
    error = await refused(logger.append(batch))
    assert (error.reason_name, error.metadata["field"]) == ("INVALID_FIELD", field)
    assert await logger.list_all() == []


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (logger_pb2.ListEventsRequest(page_size=1_001), "page_size"),
        (logger_pb2.ListEventsRequest(filter={"worker_id": "a b"}), "filter.worker_id"),
        (logger_pb2.ListEventsRequest(filter={"events": ["Bad"]}), "filter.events"),
        (logger_pb2.ListEventsRequest(filter={"events": ["a"] * 101}), "filter.events"),
    ],
)
async def test_a_listing_that_makes_no_sense_names_its_field(
    logger: Logger, asked: logger_pb2.ListEventsRequest, field: str
) -> None:
    """Bad filters and page sizes are refused with INVALID_FIELD and the field's name."""
    error = await refused(logger.stub.ListEvents(asked))
    assert (error.reason_name, error.metadata["field"]) == ("INVALID_FIELD", field)


async def test_a_start_index_beyond_what_can_be_is_an_empty_page(logger: Logger) -> None:
    """The largest index that the wire can carry is answered like any that is not there yet."""
    await logger.append(request("a", 1))
    assert await logger.list_all(start_index=2**64 - 1) == []


async def test_a_huge_message_is_refused_and_the_logger_goes_on(logger: Logger) -> None:
    """100 MB in one message end that stream with an error and nothing else."""
    made = event()
    made.details["text"] = "x" * 100_000_000
    big = logger_pb2.AppendRequest(source="a", events=[logger_pb2.SequencedEvent(sequence=1, event=made)])
    error = await refused(logger.append(big))
    assert error.reason_name == "TOO_LARGE"
    assert await logger.append(request("a", 1)) == [1]


async def test_the_service_says_that_it_is_healthy_and_what_it_offers(process: Any) -> None:
    """Health answers SERVING under the service's own name."""
    async with connect(process.address) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service="hayflick.v1.LoggerService")
        )
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_cleanly(process: Any, number: int) -> None:
    """A signal ends the logger with status 0, its tails with SHUTTING_DOWN, and its socket is gone."""
    async with connect(process.address) as channel:
        logger = Logger(channel)
        call = logger.stub.TailEvents(logger_pb2.TailEventsRequest())
        await call.initial_metadata()
        status = await asyncio.to_thread(process.end, number)
        error = await refused(call.read())
    assert (status, error.reason_name) == (0, "SHUTTING_DOWN")
    assert process.socket_gone()


async def test_its_files_are_for_this_user_alone(process: Any, logger: Logger) -> None:
    """Every file has mode 0600, in directories of mode 0700."""
    await logger.append(request("a", 1))
    assert stat.S_IMODE(process.data_dir.stat().st_mode) == 0o700
    for path in process.data_dir.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
