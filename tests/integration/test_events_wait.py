"""Events while the logger is away: they wait on disk beyond memory, and what gives way is counted."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from hayflick.v1 import logger_pb2, logger_pb2_grpc
from hayflick.v1.resources_pb2 import Worker
from hayflick_orchestrator.records import Records
from hayflick_rpc.audit import AuditClient
from hayflick_rpc.channel import connect
from hayflick_rpc.errors import HayflickError
from hayflick_rpc.spool import Spool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable
    from pathlib import Path

WAIT_SECONDS = 20.0
WORKER = Worker(worker_id="w", contract_id="c", root_id="w")


def numbered(number: int) -> logger_pb2.Event:
    """Return an event that carries *number*."""
    made = logger_pb2.Event(event="audit", timestamp={"seconds": 1_800_000_000})
    made.details["number"] = number
    return made


def kept(directory: Path) -> list[Path]:
    """Return what lies in *directory*."""
    return list(directory.iterdir())


async def recorded(address: str) -> list[logger_pb2.Event]:
    """Return all that a logger has."""
    found, token = [], ""
    async with connect(address) as channel:
        stub: Any = logger_pb2_grpc.LoggerServiceStub(channel)
        while True:
            page = await stub.ListEvents(logger_pb2.ListEventsRequest(page_size=1_000, page_token=token))
            found += [one.event for one in page.events]
            token = page.next_page_token
            if not token:
                return found


@contextlib.asynccontextmanager
async def sender(address: str, spool: Spool, told: Iterable[Callable[[], None]] = ()) -> AsyncIterator[Any]:
    """Run a client as a node does, with room for ten events in memory."""

    def acknowledged(sequence: int) -> None:
        spool.acknowledged(sequence)
        for tell in told:
            tell()

    client = AuditClient(
        address,
        "orchestrator/n/1",
        keep=spool.append,
        reread=spool.read,
        on_acknowledged=acknowledged,
        max_pending_events=10,
    )
    await client.start()
    try:
        yield client
    finally:
        await client.close(flush_seconds=5)
        spool.close()


async def test_events_beyond_memory_wait_on_disk(start_logger: Callable[..., Any], tmp_path: Path) -> None:
    """However many wait, each is recorded once and in order, and whoever waits for one hears of it."""
    logger = start_logger()
    logger.end()
    async with sender(logger.address, Spool(tmp_path, "orchestrator/n/1")) as client:
        for number in range(1, 101):
            assert client.enqueue(numbered(number)) == number
        assert client.pending_events == 100
        with pytest.raises(HayflickError):
            await client.wait_acknowledged(70, 0.05)
        start_logger()
        await client.wait_acknowledged(70, WAIT_SECONDS)
        assert client.enqueue(numbered(101)) == 101
        await client.wait_acknowledged(101, WAIT_SECONDS)
        assert client.pending_events == 0
        numbers = [event.details["number"] for event in await recorded(logger.address)]
        assert numbers == list(range(1, 102))
    assert kept(tmp_path) == []


async def test_what_says_least_gives_way_and_is_counted(
    start_logger: Callable[..., Any], tmp_path: Path
) -> None:
    """Heartbeats leave room for what matters; how many of each kind were left out is on record later."""
    logger = start_logger()
    logger.end()
    spool = Spool(tmp_path, "orchestrator/n/1", max_bytes=20_000)
    told: list[Callable[[], None]] = []
    async with sender(logger.address, spool, told) as client:
        records = Records(client, lambda: spool.fullness)
        told.append(lambda: records.tell_lost("n"))
        for _ in range(1_000):
            records.heartbeat(WORKER)
        for _ in range(1_000):
            records.egress(WORKER, {"host": "example.org"})
        records.denial(WORKER, {"class": "probe"})
        records.tripwire(WORKER, {"tripwire": "probing"})
        sent = client.enqueue(numbered(1))
        start_logger()
        await client.wait_acknowledged(sent, WAIT_SECONDS)
        await client.wait_acknowledged(sent + 1, WAIT_SECONDS)
        found = await recorded(logger.address)
    kept = [event.event for event in found]
    assert kept[-4:] == ["denial", "tripwire", "audit", "events_lost"]
    lost = dict(found[-1].details["counts"])
    assert lost == {"heartbeat": 1_000 - kept.count("heartbeat"), "egress": 1_000 - kept.count("egress")}
    assert min(kept.count("heartbeat"), kept.count("egress")) > 10
    assert "sequence_gap" not in kept
