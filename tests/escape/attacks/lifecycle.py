"""Attacks on limits, and on ends: what a worker uses, and what is left of it."""

from __future__ import annotations

import itertools
import os
import time
from typing import TYPE_CHECKING, Any

from ..table import Row
from ..tools import Facts, Verdict, summary, verdict

if TYPE_CHECKING:
    from ..arena import Arena

MIB = 1024 * 1024


def fork_without_end(facts: Facts) -> Verdict:
    """Fork until the kernel says no, or sixty processes are there."""
    import errno
    import signal

    children, answer = [], "ok"
    try:
        while len(children) < 60:
            pid = os.fork()
            if pid == 0:
                signal.pause()
                os._exit(0)
            children.append(pid)
    except OSError as error:
        answer = errno.errorcode[error.errno or 0]
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return verdict(answer == "EAGAIN" and len(children) <= 16, f"{answer} after {len(children)}")


def compare_luck(facts: Facts) -> Verdict:
    """Draw the same randomness as a sister from the same zygote."""
    mine = draw(facts)["drawn"]
    same = [name for name, value in mine.items() if facts["first"]["drawn"][name] == value]
    return verdict(not same, f"the same: {same or 'none'} of {', '.join(mine)}")


def draw(facts: Facts) -> Verdict:
    """Draw from every source of randomness."""
    import random
    import secrets
    import ssl
    import tempfile
    import uuid

    drawn = {
        "urandom": os.urandom(8).hex(),
        "random": random.random(),
        "uuid4": str(uuid.uuid4()),
        "uuid1": str(uuid.uuid1()),
        "secrets": secrets.token_hex(8),
        "ssl": ssl.RAND_bytes(8).hex(),
        "tempfile": tempfile.mktemp(),
    }
    return verdict(True, "drawn") | {"drawn": drawn}


def call_service(method: str, request: Facts, descriptors: tuple[int, ...] = ()) -> Facts:
    """Call the worker's own service in frames, on the control stream of the task; return the answer."""
    import socket

    from hayflick_sandbox import frames

    call = {"type": "call", "id": 1, "method": method, "request": request}
    with socket.socket(fileno=os.dup(3)) as control:
        socket.send_fds(control, [frames.encode(call, b"")], list(descriptors))
        answer = frames.read_frame(control)
    assert answer is not None, "the orchestrator hung up"
    header: Facts = answer[0]
    return header


def kept(read_end: int) -> bool:
    """Return whether somebody still holds the other end of a pipe."""
    import select

    poller = select.poll()
    poller.register(read_end, select.POLLIN)
    return not poller.poll(1_000)


def send_descriptors(facts: Facts) -> Verdict:
    """Send the orchestrator descriptors on the task's stream, and see whether it keeps them."""
    read_end, write_end = os.pipe()
    answer = call_service("NoSuchMethod", {}, (write_end,) * 3)
    os.close(write_end)
    held = not kept(read_end)
    return verdict(held, f"{answer.get('reason')}; {'closed' if held else 'kept'} by the orchestrator")


def send_descriptors_by_the_door(facts: Facts) -> Verdict:
    """Send the orchestrator descriptors on the worker's own socket, and see whether it keeps them."""
    import socket

    read_end, write_end = os.pipe()
    with socket.socket(socket.AF_UNIX) as door:
        door.settimeout(5)
        door.connect(os.environ["HAYFLICK_WORKER"].removeprefix("unix://"))
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"
        socket.send_fds(door, [preface], [write_end] * 3)
        os.close(write_end)
        spoke = bool(door.recv(1))
        held = not kept(read_end)
    return verdict(held and spoke, f"{'closed' if held else 'kept'} by the orchestrator")


def tell_oneself(facts: Facts) -> Verdict:
    """Say who one is."""
    worker = call_service("GetSelf", {})["response"]["worker"]
    return verdict(True, "told") | {"worker_id": worker["workerId"]}


def speak_as_a_sister(facts: Facts) -> Verdict:
    """End a sister by her name, replicate in her name, and run a task in her."""
    sister = facts["first"]["worker_id"]
    tries = {
        "end her": call_service("Shutdown", {"request_id": "escape", "worker_id": sister}),
        "run in her": call_service(
            "RunDescendantTask", {"worker_id": sister, "task": {"command": {"argv": ["true"]}}}
        ),
        "be her": call_service("GetSelf", {"worker_id": sister}),
    }
    answers = {name: str(answer.get("reason", answer["type"])) for name, answer in tries.items()}
    refused = {"NOT_A_DESCENDANT", "INVALID_FIELD"}
    return verdict(set(answers.values()) <= refused, ", ".join(f"{k}: {v}" for k, v in answers.items()))


def hog_memory(arena: Arena, words: tuple[str, ...]) -> Verdict:
    """Take twice the memory; see who is ended, and what it is called."""
    neighbour = arena.launch()
    hog = arena.launch(words, memory_limit_bytes=32 * MIB)

    def task(me: Any) -> int:
        return len(bytearray(64 * 1024 * 1024))

    ran = arena.run(hog, task)
    reason = arena.stack.end_reason(hog.worker_id) if ran.outcome != "SUCCEEDED" else "none"
    alive = arena.shell(neighbour, "true").outcome == "SUCCEEDED"
    held = ran.outcome == "OOM_KILLED" and reason == "OOM_KILLED" and alive
    return verdict(held, f"task {ran.outcome}, worker {reason}, neighbour {'alive' if alive else 'dead'}")


def take_more_cpu(arena: Arena, words: tuple[str, ...]) -> Verdict:
    """Spin for a second with a twentieth of a CPU; end by CPU time, by wall time, by a signal."""
    slow = arena.launch(words, cpu_millis=50)

    def spin(me: Any) -> float:
        import time

        wall, cpu = time.monotonic(), time.process_time()
        while time.monotonic() - wall < 1:
            pass
        return (time.process_time() - cpu) / (time.monotonic() - wall)

    share = float(arena.run(slow, spin).result.value_json)

    def forever(me: Any) -> None:
        while True:
            pass

    from google.protobuf.duration_pb2 import Duration

    counted = arena.launch(words, cpu_time_limit=Duration(seconds=1))
    ends = [
        arena.run(counted, forever).outcome,
        arena.shell(arena.launch(words), "sleep 60", 0.3).outcome,
        arena.shell(arena.launch(words), "kill -9 $$").outcome,
    ]
    held = share <= 0.08 and ends == ["CPU_EXCEEDED", "TIMED_OUT", "SIGNALED"]
    return verdict(held, f"share {share:.3f} of a CPU; {', '.join(ends)}")


def daemon(nonce: str, count: int = 1, *, stay: bool = True) -> Any:
    """Return a task that leaves daemons in sessions of their own, called *nonce*, and stays or ends."""

    def task(me: Any) -> int:
        import os
        import signal

        for _ in range(count):
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    signal.signal(signal.SIGTERM, signal.SIG_IGN)
                    signal.signal(signal.SIGHUP, signal.SIG_IGN)
                    null = os.open("/dev/null", os.O_RDWR)
                    for descriptor in range(3):
                        os.dup2(null, descriptor)
                    os.closerange(3, 256)
                    os.execv("/bin/sleep", [nonce, "300"])
                os._exit(0)
            os.wait()
        print("left", flush=True)
        if stay:
            signal.pause()
        return count

    return task


def run_into_the_address_space(arena: Arena, words: tuple[str, ...]) -> Verdict:
    """Take more memory than allowed on a node whose operator let the memory control group go."""
    lacking = os.environ.get("HAYFLICK_ORCHESTRATOR_ALLOW_DEGRADED", "")
    with arena.another(("no-memory-groups",), allow_degraded=f"{lacking},memory".strip(",")) as other:
        worker = other.launch(words, memory_limit_bytes=256 * MIB)

        def task(me: Any) -> int:
            return len(bytearray(1024 * 1024 * 1024))  # never touched: an address range, and no memory

        ran = other.stack.run(worker, other.task(task))
        reason = other.stack.end_reason(worker.worker_id) if ran.outcome != "SUCCEEDED" else "none"
    held = ran.outcome == reason == "MEMORY_EXCEEDED"
    return verdict(held, f"task {ran.outcome}, worker {reason}")


def flood_output(arena: Arena, words: tuple[str, ...]) -> Verdict:
    """Print eight times what is allowed; and leave a child that holds the output open."""
    worker = arena.launch(words, output_limit_bytes=MIB)
    start = time.monotonic()
    holder = arena.shell(worker, "sleep 60 & echo said")
    seconds = time.monotonic() - start
    ran = arena.stack.run(worker, arena.task_of_shell(f"head -c {8 * MIB} /dev/zero"))
    reason = arena.stack.end_reason(worker.worker_id) if ran.outcome != "SUCCEEDED" else "none"
    held = ran.outcome == reason == "OUTPUT_EXCEEDED" and len(ran.stdout) <= MIB
    held = held and holder.outcome == "SUCCEEDED" and seconds < 10
    return verdict(
        held,
        f"task {ran.outcome} after {len(ran.stdout)} bytes, worker {reason}; the holder held {seconds:.1f} s",
    )


def leave_a_daemon(arena: Arena, words: tuple[str, ...]) -> Verdict:
    """Leave a daemon by setsid and a double fork, and be stopped."""
    worker, nonce = arena.launch(words), arena.nonce()
    arena.begin(worker, daemon(nonce, 3))
    there = len(arena.called(nonce, 3))
    arena.stack.stop(worker)
    left = arena.gone(nonce, 0.1)
    return verdict(there == 3 and not left, f"{there} daemons before, {len(left)} of them 100 ms after")


def outlive_the_orchestrator(arena: Arena, words: tuple[str, ...]) -> Verdict:
    """Go on when the orchestrator is killed; then see what its successor finds."""
    with arena.another() as other:
        worker, nonce = other.launch(words), other.nonce()
        other.begin(worker, daemon(nonce, 2))
        there = len(other.called(nonce, 2))
        other.stack.end("orchestrator", 9)
        left = other.gone(nonce, 1.5)
        other.weaken(())
        other.stack.start("orchestrator")
        reclaimed = not other.gone(nonce, 5)
        return verdict(
            there == 2 and not left and reclaimed,
            f"{there} daemons, {len(left)} after 1.5 s, {'none' if reclaimed else 'some'} after a restart",
        )


def launched_by_a_thread(arena: Arena, words: tuple[str, ...]) -> Verdict:
    """Be launched by a thread that ends."""
    import grpc

    worker = arena.launch(words)
    try:
        ran = arena.shell(worker, "sleep 0.6")
    except grpc.RpcError as error:
        from ...integration.conftest import reason_of

        reason = reason_of(error)
        assert reason == "WORKER_NOT_RUNNING", reason
        return verdict(False, "dead before its first task")
    assert ran.outcome in ("SUCCEEDED", "WORKER_ENDED"), ran
    return verdict(ran.outcome == "SUCCEEDED", ran.outcome)


def refuse_to_die(arena: Arena, words: tuple[str, ...]) -> Verdict:
    """Stop oneself, ignore SIGTERM, and be told to end within a grace."""
    import signal

    import grpc

    worker, nonce = arena.launch(words), arena.nonce()
    arena.begin(worker, daemon(nonce, 1))
    (pid,) = arena.called(nonce, 1)
    init = arena.sandbox(worker).host_pid
    for number in (pid, init):
        arena.signal(number, signal.SIGSTOP)
    start = time.monotonic()
    try:
        arena.stop_within(worker, grace_seconds=0.2, deadline_seconds=4)
    except grpc.RpcError:
        answered = False
    else:
        answered = True
    seconds, left = time.monotonic() - start, arena.gone(nonce, 0.1)
    arena.weaken(())
    arena.signal(init, signal.SIGKILL)
    return verdict(
        answered and not left, f"{'dead' if answered and not left else 'alive'} after {seconds:.1f} s"
    )


def start_without_a_layer(arena: Arena, words: tuple[str, ...]) -> Verdict:
    """Start where the kernel has no Landlock and nobody let it go."""
    import grpc

    try:
        worker = arena.launch(words)
    except grpc.RpcError as error:
        from ...integration.conftest import info_of

        info = info_of(error)
        seen = f"{info.reason} at {info.metadata['step']}, {info.metadata['errno']}"
        assert seen == "SANDBOX_FAILED at Broken, ENOSYS", seen
        return verdict(True, seen)
    return verdict(False, f"started as {worker.worker_id}")


def start_with_a_wall_gone(arena: Arena, words: tuple[str, ...]) -> Verdict:
    """Start where a wall fell and no step of the launch noticed."""
    import grpc

    try:
        worker = arena.launch(words)
    except grpc.RpcError as error:
        from ...integration.conftest import info_of

        info = info_of(error)
        assert info.reason == "ISOLATION_INSUFFICIENT", info
        return verdict(
            True, f"{info.reason}: {', '.join(f'{k} {v}' for k, v in sorted(info.metadata.items()))}"
        )
    return verdict(False, f"started as {worker.worker_id}")


def outdo_the_parent(arena: Arena, words: tuple[str, ...]) -> Verdict:
    """Have more than one's parent, of each resource in turn, by a controller that allows everything."""
    import grpc

    from ...integration.conftest import info_of

    small = {
        "memory_limit_bytes": 64 * MIB,
        "cpu_millis": 300,
        "pids_limit": 24,
        "workspace_limit_bytes": 8 * MIB,
    }
    wishes: dict[str, Any] = {name: value * 2 for name, value in small.items()}
    wishes |= {"open_files_limit": 1_024, "tmp_limit_bytes": 512 * MIB, "network": {"allow_loopback": True}}
    if "cpu" in os.environ.get("HAYFLICK_ORCHESTRATOR_ALLOW_DEGRADED", "").split(","):
        del wishes["cpu_millis"]  # nothing of the kernel's tells what it is
    answers: dict[str, str] = {}
    with arena.another(words, turned=True) as other:
        contract = other.stack.contract()
        root = other.launch(words, contract_id=contract, **small)
        for name, wish in wishes.items():
            wanted = {**small, name: wish}
            try:
                other.launch(words, contract_id=contract, parent_id=root.worker_id, **wanted)
            except grpc.RpcError as error:
                answers[name] = info_of(error).reason
            else:
                answers[name] = "born"
        equal = other.launch(words, contract_id=contract, parent_id=root.worker_id, **small)
        lives = other.shell(equal, "true").outcome == "SUCCEEDED"
    assert set(answers.values()) <= {"EXCEEDS_PARENT", "born"}, answers
    held = set(answers.values()) == {"EXCEEDS_PARENT"} and lives
    return verdict(held, f"{summary(answers)}; one like its parent {'lives' if lives else 'does not'}")


def exceed_the_contract(arena: Arena, words: tuple[str, ...]) -> Verdict:
    """Be born beyond the population, and deeper than allowed, by a controller that allows everything."""
    import grpc

    from ...integration.conftest import reason_of

    def born(other: Arena, contract: str, parent_id: str = "") -> str:
        try:
            return str(other.launch(words, contract_id=contract, parent_id=parent_id).worker_id)
        except grpc.RpcError as error:
            reasons.append(reason_of(error))
            return ""

    reasons: list[str] = []
    with arena.another(words, turned=True) as other:
        narrow, deep = (other.stack.contract(max_replicas=2, max_depth=1) for _ in range(2))
        many = [one for one in (born(other, narrow) for _ in range(4)) if one]
        chain = [born(other, deep)]
        while chain[-1] and len(chain) < 3:
            chain.append(born(other, deep, chain[-1]))
    depth = len([one for one in chain if one]) - 1
    assert set(reasons) <= {"HELD_BY_KERNEL"}, reasons  # no other refusal tells anything
    held = len(many) == 2 and depth == 1 and len(reasons) == 3
    return verdict(
        held, f"{len(many)} born of 2 allowed, depth {depth} of 1 allowed; {set(reasons) or 'no refusal'}"
    )


def signal_by_load(arena: Arena, words: tuple[str, ...]) -> Verdict:
    """Signal to a sister by the machine's free memory, as sysinfo(2) tells it."""
    import threading

    sender, receiver = arena.launch(), arena.launch()
    begin, period, bits = time.clock_gettime(time.CLOCK_MONOTONIC) + 0.5, 0.05, 40

    def send(me: Any) -> None:
        import mmap
        import time

        for number in range(bits):
            until = begin + number * period
            time.sleep(max(0.0, until - time.clock_gettime(time.CLOCK_MONOTONIC)))
            if number % 2:
                with mmap.mmap(-1, 40 << 20) as held:
                    for offset in range(0, len(held), 4096):
                        held[offset] = 1
                    time.sleep(max(0.0, until + period * 0.8 - time.clock_gettime(time.CLOCK_MONOTONIC)))

    def receive(me: Any) -> list[int]:
        import ctypes
        import time

        libc = ctypes.CDLL(None)
        buffer = (ctypes.c_ulong * 16)()
        seen = []
        for number in range(bits):
            time.sleep(max(0.0, begin + (number + 0.6) * period - time.clock_gettime(time.CLOCK_MONOTONIC)))
            libc.sysinfo(buffer)
            seen.append(buffer[5])  # freeram
        return seen

    import json

    thread = threading.Thread(target=arena.run, args=(sender, send))
    thread.start()
    seen = json.loads(arena.run(receiver, receive).result.value_json)
    thread.join()
    right = sum((b < a) == bool(n % 2) for n, (a, b) in enumerate(itertools.pairwise(seen), 1))
    rate = right / (bits - 1)
    return verdict(True, f"{right} of {bits - 1} bits right at {1 / period:.0f} bits/s ({rate:.0%})")


ALIVE_AFTER_INIT = ("host-pids", "no-tree-kill")

LICENSED = {"network": {"allow_controller": True}}

ROWS = [
    Row(
        56,
        run_into_the_address_space,
        ("RLIMIT_AS",),
        ("no-memory-groups", "no-rlimits"),
        where="outside",
        faults=("no-memory-groups",),
    ),
    Row(
        66,
        outdo_the_parent,
        ("controller", "the node, by the kernel's facts about both"),
        ("no-narrowing",),
        where="outside",
        limits_of_it="the controller is turned in both runs; that it refuses by itself is tested with it",
    ),
    Row(
        67,
        exceed_the_contract,
        ("controller", "cgroup.max.descendants", "cgroup.max.depth"),
        ("no-bounds",),
        where="outside",
        needs=("kill",),
        limits_of_it="the controller is turned in both runs; that it refuses by itself is tested with it",
    ),
    Row(
        65,
        start_with_a_wall_gone,
        ("the self-probe in every sandbox", "least grade"),
        ("keep-capabilities",),
        where="outside",
        faults=("keep-capabilities", "judged"),
    ),
    Row(61, flood_output, ("output limit",), ("no-output-limit",), where="outside"),
    Row(
        50,
        send_descriptors_by_the_door,
        ("the orchestrator takes no descriptor",),
        ("keep-sent-descriptors",),
        resources=LICENSED,
    ),
    Row(
        52,
        speak_as_a_sister,
        ("the orchestrator knows who calls by the channel",),
        ("anybody-is-a-descendant",),
        first=tell_oneself,
        resources=LICENSED,
    ),
    Row(50, send_descriptors, ("the orchestrator takes no descriptor",), ("keep-sent-descriptors",)),
    Row(53, hog_memory, ("memory control group",), ("loose-limits",), where="outside", needs=("memory",)),
    Row(
        54,
        fork_without_end,
        ("pids control group", "RLIMIT_NPROC"),
        ("loose-limits", "no-rlimits"),
        resources={"pids_limit": 16},
        host=("forks",),
    ),
    Row(
        55,
        take_more_cpu,
        ("cpu control group", "RLIMIT_CPU"),
        ("loose-limits",),
        where="outside",
        needs=("cpu",),
    ),
    Row(57, leave_a_daemon, ("cgroup.kill", "pid namespace"), ALIVE_AFTER_INIT, where="outside"),
    Row(
        58,
        outlive_the_orchestrator,
        ("zygote", "init's channel", "death signal"),
        ("immortal",),
        where="outside",
    ),
    Row(59, launched_by_a_thread, ("single-threaded zygote",), ("threaded-launch",), where="outside"),
    Row(60, refuse_to_die, ("cgroup.kill", "SIGKILL"), ("polite-kill",), where="outside"),
    Row(64, compare_luck, ("reseeding at each fork",), ("same-luck",), first=draw),
    Row(
        65,
        start_without_a_layer,
        ("no step is optional",),
        ("landlock-best-effort",),
        where="outside",
        faults=("landlock-fails",),
    ),
    Row(
        70,
        signal_by_load,
        (),
        (),
        where="outside",
        informational=True,
        limits_of_it="measured, not refused: sysinfo(2) tells the machine's load and free memory to all",
    ),
]
