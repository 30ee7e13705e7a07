"""Attacks that no wall of the checklist is about: what is tried must change nothing for anybody else."""

from __future__ import annotations

import json
import os
import threading
import time
from typing import TYPE_CHECKING, Any, Self

import grpc
import pytest

from hayflick.v1 import controller_pb2
from hayflick.v1 import orchestrator_pb2 as opb

from ..integration.conftest import MIB, reason_of, until
from .attacks.unlisted import _from_now, _memory_mib

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .arena import Arena
    from .conftest import Trials

# The loop of a node may be late by a test machine's own noise; what is looked for is whole seconds.
MAX_ANSWER_SECONDS = 3.0
MAX_GROWTH_MIB = 64
CALLER = {"network": {"allow_controller": True}}


@pytest.fixture
def arena(trials: Trials) -> Iterator[Arena]:
    """The whole arena, with nothing left in it."""
    yield trials.whole
    trials.whole.clear()


class Bystander:
    """Asks node and controller again and again what runs, and notes the longest wait for an answer."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._over = threading.Event()
        self.longest_seconds = 0.0
        self._pid = arena.stack.processes["orchestrator"].pid
        self._before_mib = _from_now(self._pid)
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        while not self._over.is_set():
            start = time.monotonic()
            self._arena.stack.orchestrator.ListSandboxes(opb.ListSandboxesRequest(page_size=10))
            self._arena.stack.controller.ListNodes(controller_pb2.ListNodesRequest())
            self.longest_seconds = max(self.longest_seconds, time.monotonic() - start)
            self._over.wait(0.02)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def unharmed(self) -> None:
        """Assert that the node answered in time, and did not grow."""
        self._over.set()
        self._thread.join()
        assert self.longest_seconds < MAX_ANSWER_SECONDS
        assert _memory_mib(self._pid) - self._before_mib < MAX_GROWTH_MIB


def lives(arena: Arena, worker: Any) -> None:
    """Assert that a worker takes a task and ends it."""
    ran = arena.shell(worker, "echo alive")
    assert (ran.outcome, ran.stdout) == ("SUCCEEDED", b"alive\n"), ran


def never_read(me: Any) -> int:
    """Ask twenty thousand times, and read no answer."""
    import os
    import socket

    from hayflick_sandbox import frames

    asked = 0
    with socket.socket(fileno=os.dup(3)) as control:
        control.settimeout(2)
        try:
            while asked < 20_000:
                frames.write_frame(
                    control, {"type": "call", "id": asked, "method": "GetSelf", "request": {}}, b"x" * 1_000
                )
                asked += 1
        except TimeoutError:
            pass
        control.shutdown(socket.SHUT_RD)
    os._exit(0)


def nonsense(me: Any) -> int:
    """Send what is no frame: impossible lengths."""
    import os
    import socket

    with socket.socket(fileno=os.dup(3)) as control:
        control.sendall(b"\xff" * 64)
        control.recv(1)
    return 0


def half_closed(me: Any) -> int:
    """Shut the stream's sending side, and stay."""
    import os
    import socket

    with socket.socket(fileno=os.dup(3)) as control:
        control.shutdown(socket.SHUT_WR)
    return 0


def strange_numbers(me: Any) -> int:
    """Call by numbers and names that JSON can say and protobuf cannot."""
    import os
    import socket
    import struct

    with socket.socket(fileno=os.dup(3)) as control:
        for text in (
            '{"type":"call","id":' + "9" * 4_000 + ',"method":"GetSelf","request":{}}',
            '{"type":"call","id":1,"method":"\\ud800\\n\\u001b[2J","request":{}}',
            '{"type":"call","id":2,"method":"Shutdown","request":{"request_id":"\\ud800"}}',
            '{"type":"call","id":3,"method":"Shutdown","request":{"workerId":{"a":1e999}}}',
            '{"type":"call","id":4,"method":"GetSelf","request":' + '{"a":' * 3_000 + "1" + "}" * 3_001,
        ):
            control.sendall(struct.pack(">II", 4 + len(text), len(text)) + text.encode())
            control.settimeout(5)
            if not control.recv(65_536):
                break
    return 0


@pytest.mark.parametrize("attack", [never_read, nonsense, half_closed, strange_numbers])
def test_what_a_task_says_harms_its_task_alone(arena: Arena, attack: Callable[[Any], int]) -> None:
    """A control stream that is flooded, broken or half closed ends its task at most, and nobody else."""
    worker, neighbour = arena.launch(**CALLER), arena.launch()
    with Bystander(arena) as bystander:
        ran = arena.run(worker, attack)
        assert ran.outcome in ("SUCCEEDED", "FAILED"), ran
        bystander.unharmed()
    lives(arena, worker)
    lives(arena, neighbour)


def snapshots(me: Any) -> list[str]:
    """Ask for children that start from what is deep, wide or no JSON at all; return the answers."""
    from hayflick_sandbox.tasks import CallError

    answers = []
    for number, text in enumerate(
        (
            '{"a":' + "[" * 100_000 + "]" * 100_000 + "}",
            '{"a":' + '{"a":' * 50_000 + "1" + "}" * 50_001,
            '{"a":[' + "[]," * 340_000 + "0]}",
            '{"a":' + "9" * 500_000 + "}",
            '{"a":1e400}',
            '{"a":"\\ud800"}',
            '{"a":1,"a":2}',
            "\x00",
        )
    ):
        request = {"request_id": f"r{number}", "state_snapshot_json": text}
        try:
            me._channel.call("Replicate", request)
            answers.append("born")
        except CallError as error:
            answers.append(error.reason)
    return answers


def test_what_a_child_starts_from_is_bounded(arena: Arena) -> None:
    """Deep, wide and impossible JSON is refused or taken, and neither controller nor node falls over it."""
    worker = arena.launch(memory_limit_bytes=256 * MIB, **CALLER)
    controller = arena.stack.processes["controller"].pid
    before_mib = _from_now(controller)
    with Bystander(arena) as bystander:
        ran = arena.run(worker, snapshots)
        assert ran.outcome == "SUCCEEDED", ran
        bystander.unharmed()
    answers = json.loads(ran.result.value_json)
    assert answers[:2] == ["INVALID_FIELD"] * 2
    assert set(answers) <= {"INVALID_FIELD", "TOO_LARGE", "born"}, answers
    assert _memory_mib(controller) - before_mib < 2 * MAX_GROWTH_MIB
    lives(arena, worker)


RESETS = """
import os, socket, struct
def frame(kind, flags, stream, data=b""):
    return struct.pack(">I", len(data))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + data
def name(text):
    return bytes([len(text)]) + text
path = b"/hayflick.v1.WorkerService/GetSelf"
head = b"\\x83\\x86\\x44" + name(path) + b"\\x41" + name(b"localhost") + b"\\x5f" + name(b"application/grpc")
head += b"\\x40" + name(b"te") + name(b"trailers")
sent = 0
for connection in range(6):
    with socket.socket(socket.AF_UNIX) as door:
        door.settimeout(5)
        door.connect(os.environ["HAYFLICK_WORKER"].removeprefix("unix://"))
        try:
            door.sendall(b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n" + frame(4, 0, 0))
            for number in range(1, 4_000, 2):
                door.sendall(frame(1, 4, number, head) + frame(3, 0, number, struct.pack(">I", 8)))
                sent += 1
            door.sendall(frame(6, 0, 0, bytes(8)) * 2_000)
            door.sendall(frame(4, 0, 0, b"\\0\\4\\x7f\\xff\\xff\\xff") * 500)
            door.sendall(frame(1, 0, 4_001, head) + frame(9, 0, 4_001, b"\\x40\\1a\\1b") * 2_000)
        except OSError:
            pass
print(sent)
"""


def test_resets_of_streams(arena: Arena) -> None:
    """Streams that are reset at once, pings, settings and endless headers at a door harm nobody."""
    worker, neighbour = arena.launch(**CALLER), arena.launch(memory_limit_bytes=256 * MIB, **CALLER)
    with Bystander(arena) as bystander:
        ran = arena.stack.run(worker, _program(RESETS), keep=True)
        assert int(ran.stdout) > 1_000, ran
        bystander.unharmed()
    code = (
        "import os, grpc\n"
        "from hayflick.v1 import worker_pb2, worker_pb2_grpc\n"
        "stub = worker_pb2_grpc.WorkerServiceStub(grpc.insecure_channel(os.environ['HAYFLICK_WORKER']))\n"
        "print(stub.GetSelf(worker_pb2.GetSelfRequest(), timeout=20).worker.worker_id)"
    )
    assert arena.stack.run(neighbour, _program(code)).stdout.decode().strip() == neighbour.worker_id
    lives(arena, worker)


def _program(code: str) -> opb.Task:
    return opb.Task(command=opb.Command(argv=["python3", "-I", "-c", code]))


def die_while_asking(me: Any) -> int:
    """Have children killed in the middle of calls that are refused and seen."""
    import ctypes
    import os
    import signal

    libc = ctypes.CDLL(None)
    for _ in range(150):
        pid = os.fork()
        if pid == 0:
            while True:
                libc.ptrace(0x4206, 1, 0, 0)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return 0


@pytest.mark.layers("tripwire")
def test_death_in_the_middle_of_a_refused_call(arena: Arena) -> None:
    """Processes that die while they wait for a refusal leave the listener as it was: it refuses the next."""
    worker = arena.launch(pids_limit=32)
    with Bystander(arena) as bystander:
        assert arena.run(worker, die_while_asking).outcome == "SUCCEEDED"
        bystander.unharmed()
    before = _denied(arena, worker)

    def once(me: Any) -> int:
        import ctypes

        return int(ctypes.CDLL(None).ptrace(0x4206, 1, 0, 0))

    assert arena.run(worker, once).result.value_json == "-1"
    until(lambda: _denied(arena, worker) == before + 1)


def _denied(arena: Arena, worker: Any) -> int:
    return sum(one.count for one in arena.sandbox(worker).denials)


def names_and_sizes(me: Any) -> int:
    """Leave deep directories, names that are no text, and a file that is larger than any disk."""
    import os

    os.chdir("/workspace")
    with open("sparse", "wb") as file:
        file.truncate(200 * 1024 * 1024)
    for name in (b"new\nline", b"\xff\xfe", b"\x1b[2J\x07", b"a" * 255, "\u202etxt.exe".encode()):
        with open(name, "wb") as file:
            file.write(b"x")
    for _ in range(1_500):
        os.mkdir("d")
        os.chdir("d")
    with open("deep", "w") as file:
        file.write("x")
    return 0


def grow_for_ever(me: Any) -> None:
    """Append to a file for as long as one lives."""
    print("growing", flush=True)
    with open("/workspace/growing", "wb", buffering=0) as file:
        while True:
            if file.write(b"x" * 65_536) and file.tell() > 8 * 1024 * 1024:
                file.truncate(0)
                file.seek(0)


def test_files_that_are_no_files(arena: Arena) -> None:
    """Deep, endless and unspeakable files are refused or read in bounds, and hold up nobody."""
    worker = arena.launch(workspace_limit_bytes=256 * MIB)
    ran = arena.run(worker, names_and_sizes)
    assert ran.outcome == "SUCCEEDED", ran
    arena.begin(worker, grow_for_ever)
    answers: dict[str, str] = {}
    with Bystander(arena) as bystander:
        for path in ("growing", "sparse", "new\nline", "a" * 255, "d/" * 1_500 + "deep", "d/" * 200 + "x"):
            size = 0
            try:
                request = opb.GetFileRequest(worker_id=worker.worker_id, path=path)
                for part in arena.stack.orchestrator.GetFile(request, timeout=60):
                    size += len(part.data)
                answers[path[:9]] = f"{size} bytes"
            except grpc.RpcError as error:
                answers[path[:9]] = reason_of(error)
        bystander.unharmed()
    assert answers["sparse"] == "TOO_LARGE"
    assert all(
        answer.endswith(" bytes") or answer in ("INVALID_FIELD", "FILE_REFUSED", "FILE_UNKNOWN", "TOO_LARGE")
        for answer in answers.values()
    ), answers
    lives(arena, worker)


SMUGGLED = b"\r\n".join(
    (
        *(b"GET http://ok.invalid/ HTTP/1.1", b"Host: 127.0.0.1", b"Transfer-Encoding: chunked"),
        *(b"Content-Length: 5", b"", b"0", b"", b"GET http://127.0.0.1/ HTTP/1.1", b"", b""),
    )
)


def proxy_hogs(me: Any) -> list[str]:
    """Hold every connection of one's proxy open in the middle of a request; say what large ones are told."""
    import socket

    held = []
    for _ in range(28):
        sock = socket.create_connection(("127.0.0.1", 3128), timeout=5)
        sock.sendall(b"CONNECT ok.inva")
        held.append(sock)
    answers = []
    for text in (
        b"CONNECT ok.invalid:443 HTTP/1.1\r\n" + b"X: " + b"a" * 1_000_000 + b"\r\n\r\n",
        b"CONNECT ok.invalid:443 HTTP/1.1\r\n" + b"X: a\r\n" * 100_000 + b"\r\n",
        b"CONNECT 127.0.0.1:22 HTTP/1.1\r\n\r\n" * 50,
        SMUGGLED,
    ):
        with socket.create_connection(("127.0.0.1", 3128), timeout=20) as sock:
            try:
                sock.sendall(text)
                answers.append(sock.recv(65_536)[9:12].decode())
            except OSError as error:
                answers.append(type(error).__name__)
    print("holding", flush=True)
    return answers


def test_a_proxy_that_is_held_up_holds_up_its_worker_alone(arena: Arena) -> None:
    """Half, large and smuggled requests at one worker's proxy are refused, and others are answered."""
    network = {"allowed_hosts": ["ok.invalid:443"]}
    hog, other = arena.launch(network=network), arena.launch(network=network)
    answers: list[str] = []

    def ask(me: Any) -> str:
        import socket

        with socket.create_connection(("127.0.0.1", 3128), timeout=10) as sock:
            sock.sendall(b"CONNECT no.invalid:443 HTTP/1.1\r\nHost: no.invalid\r\n\r\n")
            return sock.recv(64)[9:12].decode()

    def hogging() -> None:
        answers.extend(json.loads(arena.run(hog, proxy_hogs).result.value_json))

    thread = threading.Thread(target=hogging)
    with Bystander(arena) as bystander:
        thread.start()
        answer = arena.run(other, ask).result.value_json
        thread.join()
        bystander.unharmed()
    assert answer == '"403"'
    assert len(answers) == 4
    assert "200" not in answers, answers


def use_up(me: Any) -> int:
    """Use up what the kernel counts by user: pages of pipes, and descriptors that are under way."""
    import fcntl
    import os
    import socket

    pipes = 0
    try:
        while pipes < 200:
            fcntl.fcntl(os.pipe()[1], fcntl.F_SETPIPE_SZ, 1 << 20)
            pipes += 1
    except OSError:
        pass
    pairs = [socket.socketpair() for _ in range(8)]
    for one, _ in pairs:
        try:
            for _ in range(64):
                socket.send_fds(one, [b"x"], [pairs[0][0].fileno()] * 200)
        except OSError:
            continue
    return pipes


def test_who_follows_on_a_user_id_finds_nothing_of_before(trials: Trials) -> None:
    """What a worker used up under its host user is free again when the next one has that id."""
    arena = trials.weakened
    try:
        used, uids = [], []
        for _ in range(2):
            worker = arena.launch(("one-uid",))
            uids.append(os.stat(f"/proc/{arena.sandbox(worker).host_pid}").st_uid)
            ran = arena.run(worker, use_up)
            assert ran.outcome == "SUCCEEDED", ran
            used.append(int(ran.result.value_json))
            arena.stack.stop(worker)
    finally:
        arena.clear()
    assert uids[0] == uids[1]
    assert used[0] == used[1] > 0
