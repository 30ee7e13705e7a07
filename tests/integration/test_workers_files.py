"""Files into and out of real workers, against links, pipes and whatever else a worker plants."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from hayflick.v1 import controller_pb2, logger_pb2
from hayflick.v1 import orchestrator_pb2 as opb
from hayflick.v1.resources_pb2 import Worker

from .conftest import MIB, Stack, call, groups, reason_of, refused, request_id, shell, until

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def worker(stack: Stack) -> Iterator[Worker]:
    """A worker of one's own."""
    one = stack.launch()
    yield one
    stack.stop(one)


def parts(
    worker: Worker, path: str, *data: bytes, executable: bool = False, whole: bool = True
) -> Iterator[opb.PutFileRequest]:
    """Yield a file as a caller sends it."""
    yield opb.PutFileRequest(
        header=opb.PutFileHeader(worker_id=worker.worker_id, path=path, executable=executable)
    )
    for piece in data:
        yield opb.PutFileRequest(data=piece)
    if whole:
        yield opb.PutFileRequest(summary=opb.FileSummary(size_bytes=sum(map(len, data))))


def put(stack: Stack, worker: Worker, path: str, *data: bytes, **more: Any) -> opb.PutFileResponse:
    """Write a file into a worker."""
    return stack.orchestrator.PutFile(parts(worker, path, *data, **more))


def get(stack: Stack, worker: Worker, path: str, max_bytes: int = 0) -> bytes:
    """Read a file from a worker; what came is what the summary says."""
    data, summary = b"", None
    request = opb.GetFileRequest(worker_id=worker.worker_id, path=path, max_bytes=max_bytes)
    for response in stack.orchestrator.GetFile(request):
        assert summary is None
        data += response.data
        summary = response.summary if response.HasField("summary") else None
    assert summary is not None
    assert (summary.size_bytes, summary.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    return data


def test_there_and_back(stack: Stack, worker: Worker) -> None:
    """A file that was put is what tasks read and what comes back, and both are on record by hash."""
    data = os.urandom(3 * MIB + 17)
    said = put(stack, worker, "a/b/c.bin", *(data[at : at + MIB] for at in range(0, len(data), MIB)))
    digest = hashlib.sha256(data).hexdigest()
    assert (said.size_bytes, said.sha256) == (len(data), digest)
    assert stack.run(worker, shell("sha256sum < a/b/c.bin")).stdout.split()[0].decode() == digest
    assert get(stack, worker, "a/b/c.bin") == data
    names = until(lambda: (events := stack.events(worker.worker_id)).count("file_got") and events)
    assert names.count("file_put") == 1
    request = logger_pb2.ListEventsRequest(filter=logger_pb2.EventFilter(worker_id=worker.worker_id))
    (event,) = (
        recorded.event
        for recorded in stack.logger.ListEvents(request).events
        if recorded.event.event == "file_put"
    )
    assert dict(event.details) == {"path": "a/b/c.bin", "size_bytes": len(data), "sha256": digest}


def test_small_ones(stack: Stack, worker: Worker) -> None:
    """An empty file is one; a second put replaces the first; a program that was put runs."""
    assert put(stack, worker, "x").size_bytes == 0
    assert get(stack, worker, "x") == b""
    put(stack, worker, "x", b"again")
    assert get(stack, worker, "x") == b"again"
    put(stack, worker, "x", b"#!/bin/sh\necho ran\n", executable=True)
    assert stack.run(worker, shell("./x; ls -A | wc -l")).stdout == b"ran\n1\n"


@pytest.mark.parametrize("path", ["", "/etc/passwd", "..", "a/../b", "a//b", "./a", "a/", "a\0b", "n" * 256])
def test_paths_that_are_none(stack: Stack, worker: Worker, path: str) -> None:
    """A path that is absolute, climbs, or is no path is refused before the worker hears of it."""
    with refused("INVALID_FIELD"):
        put(stack, worker, path, b"x")
    with refused("INVALID_FIELD"):
        get(stack, worker, path)


PLANT = """
ln -s /etc/passwd link; ln -s /etc dir; ln -s ../../../../etc/passwd up; ln -s /proc/self/root root
ln -s /proc/1/root/etc/passwd magic; ln -s . here; mkdir sub; ln -s /tmp sub/out; echo own > own
mkfifo pipe
python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind("sock")'
"""


@pytest.mark.parametrize(
    "path",
    ["link", "dir/passwd", "up", "root/etc/passwd", "magic", "here/own", "sub/out/x", "pipe", "sock", "sub"],
)
def test_what_is_no_file_is_not_read(stack: Stack, worker: Worker, path: str) -> None:
    """A link anywhere on the way, a pipe, a socket and a directory are refused, at once."""
    stack.run(worker, shell(PLANT))
    with refused("FILE_REFUSED"):
        get(stack, worker, path)
    assert get(stack, worker, "own") == b"own\n"


@pytest.mark.parametrize(
    "path", ["link", "dir/x", "up", "root/x", "here/x", "sub/out/x", "pipe", "sock", "sub", "own/x"]
)
def test_what_is_no_file_is_not_written(stack: Stack, worker: Worker, path: str) -> None:
    """Nothing is written through a link, into a pipe or a socket, or over a directory."""
    before = Path("/etc/passwd").read_bytes()
    stack.run(worker, shell(PLANT))
    with refused("FILE_REFUSED"):
        put(stack, worker, path, b"evil")
    assert Path("/etc/passwd").read_bytes() == before
    listing = stack.run(worker, shell("ls -A / /tmp /workspace /workspace/sub")).stdout
    assert b".hayflick" not in listing
    assert not Path("/tmp/x").exists()


def test_what_is_not_there(stack: Stack, worker: Worker) -> None:
    """A file, a directory or a worker that does not exist is named as unknown."""
    for path in ("no", "no/such"):
        with refused("FILE_UNKNOWN"):
            get(stack, worker, path)
    with refused("WORKER_UNKNOWN"):
        get(stack, Worker(worker_id="ab" * 8), "x")


def test_devices_stay_closed(stack: Stack, worker: Worker) -> None:
    """Neither /dev nor /proc nor what is shown read-only can be named, and none of it be made."""
    stack.run(worker, shell("mknod zero c 1 5; true"))
    with refused("FILE_UNKNOWN"):
        get(stack, worker, "zero")


def test_limits_of_size(stack: Stack) -> None:
    """A file over a limit is TOO_LARGE, and so is one that finds no room; nothing is left of it."""
    worker = stack.launch(workspace_limit_bytes=2 * MIB, file_size_limit_bytes=8 * MIB)
    put(stack, worker, "x", bytes(MIB))
    with refused("TOO_LARGE"):
        get(stack, worker, "x", max_bytes=MIB - 1)
    assert len(get(stack, worker, "x", max_bytes=MIB)) == MIB
    with refused("INVALID_FIELD"):
        get(stack, worker, "x", max_bytes=2**40)
    with refused("TOO_LARGE"):
        put(stack, worker, "y", *([bytes(MIB)] * 16))
    assert stack.run(worker, shell("ls -A; df -k --output=used . | tail -1")).stdout.split() == [
        b"x",
        b"1024",
    ]
    with refused("TOO_LARGE"):
        put(stack, worker, "z", bytes(MIB + 1))
    stack.stop(worker)
    small = stack.launch(file_size_limit_bytes=4096)
    with refused("TOO_LARGE"):
        put(stack, small, "x", bytes(8192))
    stack.stop(small)


def test_a_worker_without_a_process_left(stack: Stack) -> None:
    """At its pids limit a worker has nobody to transfer with, and the caller learns which limit it is."""
    worker = stack.launch(pids_limit=1)
    stream = stack.begin(worker, shell("echo x; exec sleep 60"))
    with pytest.raises(grpc.RpcError) as caught:
        put(stack, worker, "x", b"x")
    assert reason_of(caught.value) == "NODE_FULL"
    stream.cancel()
    stack.stop(worker)


@pytest.mark.layers("memory")
def test_out_of_memory(stack: Stack) -> None:
    """A file larger than the worker's memory ends the worker, and the caller learns that."""
    worker = stack.launch(memory_limit_bytes=24 * MIB, workspace_limit_bytes=512 * MIB)
    with refused("WORKER_NOT_RUNNING"):
        put(stack, worker, "x", *([bytes(MIB)] * 64))
    assert stack.end_reason(worker.worker_id) == "OOM_KILLED"


@pytest.mark.layers("pids")
def test_a_sender_that_breaks_off(stack: Stack, worker: Worker) -> None:
    """Whoever hangs up, or stops without a summary, or miscounts, leaves the old file as it was."""
    put(stack, worker, "x", b"old")
    with refused("INVALID_FIELD"):
        put(stack, worker, "x", b"new", whole=False)
    asked, go = threading.Event(), threading.Event()

    def slow() -> Iterator[opb.PutFileRequest]:
        yield from parts(worker, "x", b"n" * MIB, whole=False)
        asked.set()
        go.wait(20)

    call_ = stack.orchestrator.PutFile.future(slow())
    assert asked.wait(10)
    call_.cancel()
    go.set()
    until(lambda: _tasks(stack, worker) == 1)
    wrong = [
        *parts(worker, "x", b"new", whole=False),
        opb.PutFileRequest(summary=opb.FileSummary(size_bytes=4)),
    ]
    with refused("INVALID_FIELD"):
        stack.orchestrator.PutFile(iter(wrong))
    wrong[-1].summary.size_bytes = 3
    wrong[-1].summary.sha256 = "0" * 64
    with refused("INVALID_FIELD"):
        stack.orchestrator.PutFile(iter(wrong))
    with refused("INVALID_FIELD"):
        stack.orchestrator.PutFile(iter(wrong[1:]))
    assert stack.run(worker, shell("ls -A; cat x")).stdout == b"x\nold"


def _tasks(stack: Stack, worker: Worker) -> int:
    path = stack.sandboxes()[worker.worker_id].cgroup_path
    (file,) = groups(f"{stack.node_id}/{path}/self/pids.current")
    return int(file.read_text())


@pytest.mark.layers("pids")
def test_a_reader_that_hangs_up(stack: Stack, worker: Worker) -> None:
    """Whoever hangs up in the middle of a file frees its place, and the process in the worker goes."""
    stack.run(worker, shell("head -c 30000000 /dev/zero > big"))
    for _ in range(6):
        stream = stack.orchestrator.GetFile(opb.GetFileRequest(worker_id=worker.worker_id, path="big"))
        assert next(stream).data
        stream.cancel()
    until(lambda: _tasks(stack, worker) == 1)
    assert len(get(stack, worker, "big")) == 30_000_000


def test_so_many_at_once(stack: Stack, worker: Worker) -> None:
    """A fifth transfer waits for nobody: it is refused, and the four go on."""
    stack.run(worker, shell("head -c 30000000 /dev/zero > big"))
    request = opb.GetFileRequest(worker_id=worker.worker_id, path="big")
    streams = [stack.orchestrator.GetFile(request) for _ in range(4)]
    for stream in streams:
        assert next(stream).data
    with refused("NODE_FULL"):
        get(stack, worker, "big")
    for stream in streams:
        assert sum(len(response.data) for response in stream) > 29_000_000


def test_a_worker_that_kills_the_transfer(stack: Stack, worker: Worker) -> None:
    """A worker can end the process of a transfer, and gains an error by it, no lie."""
    put(stack, worker, "x", b"old")

    def task(me: Any) -> list[str]:
        import os
        import time

        print("up", flush=True)
        seen: list[str] = []
        while not seen:
            for name in os.listdir("/proc"):  # noqa: PTH208 -- names are what is wanted
                if name.isdigit() and int(name) not in (1, os.getpid()):
                    for what in ("environ", "mem", "maps", "fd/1"):
                        try:
                            os.close(os.open(f"/proc/{name}/{what}", os.O_RDONLY))
                            seen.append(f"opened {what}")
                        except OSError as error:
                            seen.append(type(error).__name__)
                    os.kill(int(name), 9)
            time.sleep(0)
        return seen

    stream = stack.begin(worker, call(task))
    gate = threading.Event()

    def slow() -> Iterator[opb.PutFileRequest]:
        yield from parts(worker, "x", b"new", whole=False)
        gate.wait(20)
        yield opb.PutFileRequest(summary=opb.FileSummary(size_bytes=3))

    future = stack.orchestrator.PutFile.future(slow())
    *_, last = stream
    assert (
        '"PermissionError", "PermissionError", "PermissionError", "PermissionError"' in last.result.value_json
    )
    gate.set()
    with refused("FILE_REFUSED"):
        future.result()
    assert get(stack, worker, "x") == b"old"


@pytest.mark.layers("kill")
def test_the_frozen_and_the_dead(stack: Stack) -> None:
    """A quarantined worker neither takes nor gives a file, nor does an ended one; what goes on breaks off."""
    worker = stack.launch()
    put(stack, worker, "x", b"old")
    gate, asked = threading.Event(), threading.Event()

    def slow() -> Iterator[opb.PutFileRequest]:
        yield from parts(worker, "x", b"new", whole=False)
        asked.set()
        gate.wait(20)
        yield opb.PutFileRequest(summary=opb.FileSummary(size_bytes=3))

    future = stack.orchestrator.PutFile.future(slow())
    assert asked.wait(10)
    until(lambda: _tasks(stack, worker) == 2)
    stack.controller.QuarantineWorker(
        controller_pb2.QuarantineWorkerRequest(
            request_id=request_id(), worker_id=worker.worker_id, reason="test"
        )
    )
    with refused("QUARANTINED"):
        future.result(10)
    gate.set()
    with refused("QUARANTINED"):
        get(stack, worker, "x")
    with refused("QUARANTINED"):
        put(stack, worker, "x", b"new")
    stack.controller.ReleaseQuarantine(
        controller_pb2.ReleaseQuarantineRequest(
            request_id=request_id(), worker_id=worker.worker_id, reason="test"
        )
    )
    assert get(stack, worker, "x") == b"old"
    stack.stop(worker)
    with refused("WORKER_NOT_RUNNING"):
        get(stack, worker, "x")
