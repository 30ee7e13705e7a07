"""What the logger acknowledged stays, whatever happens to it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import signal
from collections.abc import Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from hayflick.v1 import logger_pb2, logger_pb2_grpc
from hayflick_rpc.audit import AuditClient
from hayflick_rpc.channel import connect
from hayflick_rpc.errors import HayflickError
from hayflick_rpc.status import from_rpc_error

Start = Callable[..., Any]


def event(number: int = 0, text: str = "") -> logger_pb2.Event:
    """Return an event that carries *number* and *text*."""
    made = logger_pb2.Event(event="audit", timestamp={"seconds": 1_800_000_000 + number})
    made.details.update({"number": number, "text": text})
    return made


@asynccontextmanager
async def audit(address: str, source: str = "test", **options: Any) -> Any:
    """Deliver to the logger at *address* for as long as the block lasts."""
    client = AuditClient(address, source, **options)
    await client.start()
    try:
        yield client
    finally:
        await client.close(0)


async def recorded(address: str) -> list[logger_pb2.RecordedEvent]:
    """Return every entry of the record."""
    async with connect(address) as channel:
        stub: logger_pb2_grpc.LoggerServiceAsyncStub = logger_pb2_grpc.LoggerServiceStub(channel)
        got: list[logger_pb2.RecordedEvent] = []
        token = ""
        while True:
            page = await stub.ListEvents(logger_pb2.ListEventsRequest(page_size=1_000, page_token=token))
            got += page.events
            token = page.next_page_token
            if not token:
                return got


async def verify(address: str) -> logger_pb2.VerifyJournalResponse:
    """Ask the logger to verify its journal."""
    async with connect(address) as channel:
        stub: logger_pb2_grpc.LoggerServiceAsyncStub = logger_pb2_grpc.LoggerServiceStub(channel)
        return await stub.VerifyJournal(logger_pb2.VerifyJournalRequest())


async def test_what_was_acknowledged_survives_sigkill(start_logger: Start) -> None:
    """Killed amid appends, again and again, the logger keeps every acknowledged event, once and in order."""
    acknowledged: list[int] = []
    logger = start_logger("--max-segment-bytes", "65536")
    async with audit(logger.address, on_acknowledged=acknowledged.append) as client:
        for _ in range(4):
            await client.wait_connected(20)
            before = client.acknowledged
            for _ in range(2_000):
                client.enqueue(event())
            await client.wait_acknowledged(before + 500, 20)  # some are through, the rest are under way
            logger.end(signal.SIGKILL)
            promised = client.acknowledged
            logger = start_logger("--max-segment-bytes", "65536")
            kept = [entry.sequence for entry in await recorded(logger.address)]
            assert kept[:promised] == list(range(1, promised + 1))
            await client.wait_acknowledged(before + 2_000, 20)
    assert [entry.sequence for entry in await recorded(logger.address)] == list(range(1, 8_001))
    assert acknowledged == sorted(acknowledged)
    assert (await verify(logger.address)).intact


async def test_sigterm_amid_appends_loses_none(start_logger: Start) -> None:
    """Told to stop amid appends of two sources, the logger ends in order and records each event once."""
    logger = start_logger("--drain-seconds", "0.2")
    async with audit(logger.address, "one") as one, audit(logger.address, "two") as two:
        clients = {"one": one, "two": two}
        for _ in range(3):
            before = {name: client.acknowledged for name, client in clients.items()}
            for client in clients.values():
                await client.wait_connected(20)
                for _ in range(2_000):
                    client.enqueue(event())
            await one.wait_acknowledged(before["one"] + 200, 20)  # the rest is under way
            assert await asyncio.to_thread(logger.end) == 0
            promised = {name: client.acknowledged for name, client in clients.items()}
            logger = start_logger("--drain-seconds", "0.2")
            await one.wait_connected(20)
            entries = await recorded(logger.address)
            for name, client in clients.items():
                kept = [entry.sequence for entry in entries if entry.source == name]
                assert kept[: promised[name]] == list(range(1, promised[name] + 1))
                await client.wait_acknowledged(before[name] + 2_000, 20)
    entries = await recorded(logger.address)
    for name in clients:
        assert [entry.sequence for entry in entries if entry.source == name] == list(range(1, 6_001))
    assert (await verify(logger.address)).intact


async def test_a_changed_byte_is_found_and_named(start_logger: Start) -> None:
    """VerifyJournal names the first entry that was changed on disk; the next start refuses it by name."""
    logger = start_logger()
    async with audit(logger.address) as client:
        for number in range(1, 21):
            await client.record(event(number), 20)
    path = logger.data_dir / "wal-00000000000000000000"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"number":8,', b'"number":9,', 1))
    verdict = await verify(logger.address)
    assert (verdict.intact, verdict.first_bad_index, verdict.entry_count) == (False, 7, 20)
    assert logger.end() == 0
    refused = start_logger(expect_ready=False)
    assert refused.end() == 1
    assert "JOURNAL_CORRUPT" in refused.log
    assert "'index': '7'" in refused.log
    path.write_bytes(content)
    assert (await verify(start_logger().address)).intact


async def test_a_torn_tail_is_healed_and_said(start_logger: Start) -> None:
    """A last line without an end is removed at the start; the log and the record say so."""
    logger = start_logger()
    async with audit(logger.address) as client:
        await client.record(event(1), 20)
    logger.end()
    with (logger.data_dir / "wal-00000000000000000000").open("ab") as file:
        file.write(b"\0\x20\xff\xdf" + b'{"event":{"deta')
    logger = start_logger()
    kept, healed = await recorded(logger.address)
    assert kept.sequence == 1
    assert (healed.source, healed.event.event) == ("logger", "journal_healed")
    assert "removed 19 bytes of a torn write after entry 0" in logger.log
    assert (await verify(logger.address)).intact


async def test_a_second_logger_is_refused(start_logger: Start) -> None:
    """Two loggers cannot share a directory: the second says so and ends; the first goes on."""
    first = start_logger()

    def elsewhere(command: list[str]) -> list[str]:
        return [part.replace("logger.sock", "other.sock") for part in command]

    second = start_logger(wrap=elsewhere, expect_ready=False)
    assert second.end() == 1
    assert "another logger holds the record" in second.log
    async with audit(first.address) as client:
        await client.record(event(), 20)


def limit_file_size(pid: int, size_bytes: int) -> None:
    """Let no file that process *pid* writes grow beyond *size_bytes*."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size_bytes, resource.RLIM_INFINITY))


async def test_a_write_error_refuses_and_recovers(start_logger: Start) -> None:
    """While the journal cannot grow nothing is acknowledged; when it can again, all that waits is."""
    logger = start_logger()
    journal = logger.data_dir / "wal-00000000000000000000"
    async with audit(logger.address) as client:
        await client.record(event(1), 20)
        durable_bytes = journal.stat().st_size
        limit_file_size(logger.process.pid, durable_bytes + 1_000)
        sequences = [client.enqueue(event(number, "x" * 500)) for number in range(2, 12)]
        async with connect(logger.address) as channel:
            stub: logger_pb2_grpc.LoggerServiceAsyncStub = logger_pb2_grpc.LoggerServiceStub(channel)
            big = logger_pb2.SequencedEvent(sequence=1, event=event(1, "y" * 5_000))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Append(iter([logger_pb2.AppendRequest(source="other", events=[big])])).read()
        error = from_rpc_error(caught.value)
        assert (error.reason_name, error.metadata["errno"]) == ("AUDIT_UNAVAILABLE", "EFBIG")
        assert client.acknowledged == 1
        assert journal.stat().st_size == durable_bytes
        assert [entry.sequence for entry in await recorded(logger.address)] == [1]
        limit_file_size(logger.process.pid, resource.RLIM_INFINITY)
        await client.wait_acknowledged(sequences[-1], 20)
    assert [entry.sequence for entry in await recorded(logger.address)] == list(range(1, 12))
    assert (await verify(logger.address)).intact


def fill_disk(path: Path) -> None:
    """Write to *path* until there is no room for another byte."""
    with path.open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while file.write(b"\0" * 4_096):
                pass
        assert os.statvfs(path).f_bavail == 0


def remove(path: Path) -> None:
    """Make room again."""
    path.unlink()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="mounts a tmpfs of its own")
async def test_a_full_disk_refuses_and_recovers(start_logger: Start) -> None:
    """On a disk that is really full nothing is acknowledged and reads go on; with room again, all is."""

    def on_small_disk(command: list[str]) -> list[str]:
        data_dir = command[command.index("--data-dir") + 1]
        script = 'mkdir -m 700 "$0" && mount -t tmpfs -o size=2m,mode=0700 hayflick-test "$0" && exec "$@"'
        # A mount namespace of its own: the mount ends with the process.
        return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, data_dir, *command]

    logger = start_logger(wrap=on_small_disk)
    filler = Path(f"/proc/{logger.process.pid}/root{logger.data_dir}/filler")
    async with audit(logger.address) as client:
        await client.record(event(1), 20)
        fill_disk(filler)
        sequences = [client.enqueue(event(number, "x" * 20_000)) for number in range(2, 12)]
        with pytest.raises(HayflickError) as caught:
            await client.wait_acknowledged(sequences[-1], 1)
        assert caught.value.reason_name == "AUDIT_UNAVAILABLE"
        assert [entry.sequence for entry in await recorded(logger.address)] == list(
            range(1, client.acknowledged + 1)
        )
        assert client.acknowledged < sequences[-1]
        remove(filler)
        await client.wait_acknowledged(sequences[-1], 20)
    assert [entry.sequence for entry in await recorded(logger.address)] == list(range(1, 12))
    assert (await verify(logger.address)).intact
    assert "ENOSPC" in logger.log or "No space left" in logger.log


async def test_the_sender_waits_for_a_logger_that_is_not_there_yet(start_logger: Start) -> None:
    """Events submitted before the logger runs are delivered once it does, and a waiter is told in time."""
    logger = start_logger()
    address = logger.address
    logger.end()
    async with audit(address) as client:
        sequence = client.enqueue(event(1))
        with pytest.raises(HayflickError) as caught:
            await client.wait_acknowledged(sequence, 0.1)
        assert caught.value.reason_name == "AUDIT_UNAVAILABLE"
        assert not client.connected
        start_logger()
        await client.wait_acknowledged(sequence, 20)
        assert client.connected


async def test_the_sender_notices_a_loss_while_idle(start_logger: Start) -> None:
    """A client with nothing to send knows that its logger is gone, and that it is back."""
    logger = start_logger()
    async with audit(logger.address) as client:
        await client.wait_connected(20)
        logger.end(signal.SIGKILL)
        await client.wait_disconnected(20)
        assert not client.connected
        start_logger()
        await client.wait_connected(20)


async def test_a_full_queue_refuses_and_loses_nothing(start_logger: Start) -> None:
    """Beyond its bound the queue refuses with AUDIT_UNAVAILABLE; metrics give way and are counted."""
    logger = start_logger()
    logger.end()
    async with audit(logger.address, max_pending_events=3, max_pending_metrics=2) as client:
        for number in range(3):
            client.enqueue(event(number))
        with pytest.raises(HayflickError) as caught:
            client.enqueue(event(4))
        assert caught.value.reason_name == "AUDIT_UNAVAILABLE"
        for number in range(5):
            client.emit_metric(logger_pb2.MetricSample(name="pids", value=number, timestamp={"seconds": 1}))
        assert client.dropped_metrics == 3
        start_logger()
        await client.wait_acknowledged(3, 20)
        assert client.enqueue(event(4)) == 4
        await client.wait_acknowledged(4, 20)


async def test_a_refused_event_fails_alone(start_logger: Start) -> None:
    """An event that contradicts the record fails with the logger's reason; its neighbours are recorded."""
    logger = start_logger()
    async with audit(logger.address) as client:
        for number in (1, 2, 3):
            await client.record(event(number), 20)
    async with audit(logger.address) as impostor:
        futures = [
            impostor.submit(1, event(1)),
            impostor.submit(2, event(99)),
            impostor.submit(3, event(3)),
            impostor.submit(4, event(4)),
        ]
        results = await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), 20)
        assert [type(result) for result in results] == [type(None), HayflickError, type(None), type(None)]
        with pytest.raises(HayflickError) as caught:
            await impostor.wait_acknowledged(2, 1)
        assert caught.value.reason_name == "REQUEST_ID_REUSED"
    assert [entry.event.details["number"] for entry in await recorded(logger.address)] == [1, 2, 3, 4]


async def test_closing_fails_what_was_not_delivered(start_logger: Start) -> None:
    """Futures of events that no logger took end with AUDIT_UNAVAILABLE, never silently."""
    logger = start_logger()
    logger.end()
    async with audit(logger.address) as client:
        future = client.submit(1, event(1))
    with pytest.raises(HayflickError) as caught:
        await future
    assert caught.value.reason_name == "AUDIT_UNAVAILABLE"


async def test_a_lifeline_that_ends_stops_the_logger(start_logger: Start) -> None:
    """When the holder of the lifeline is gone, the logger ends by itself, with status 0."""
    theirs, ours = os.pipe()
    try:
        logger = start_logger("--lifeline-fd", str(theirs), pass_fds=(theirs,))
    finally:
        os.close(theirs)
        os.close(ours)
    assert await asyncio.to_thread(logger.process.wait, 20) == 0
