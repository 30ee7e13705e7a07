"""The whole outside network, for those who have the licence: a world that the test made, and its borders."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hayflick.v1 import controller_pb2
from hayflick.v1.resources_pb2 import NetworkPolicy, Worker

from .conftest import Ran, Stack, command, request_id, running_stack, until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="making a world of its own takes root"),
    pytest.mark.skipif(
        not any(Path(path, "pasta").exists() for path in ("/usr/bin", "/usr/local/bin")),
        reason="pasta is not installed (Debian: passt)",
    ),
    pytest.mark.skipif(not Path("/dev/net/tun").exists(), reason="the kernel has no tun device"),
]

# Two network namespaces: where the node runs, with an address beside the one on
# its uplink, and the world behind the uplink. A server says its address.
WORLD = """
set -e
ip link set lo up
mkfifo "$1/go"
unshare -n sh -ec "$3" _ "$1" "$2" &
while [ ! -s "$1/world" ]; do sleep 0.01; done
ip link add near type veth peer name far netns "$(cat "$1/world")"
ip addr add 10.77.0.1/24 dev near; ip link set near up
ip link add side type veth peer name side-far; ip addr add 10.88.0.1/24 dev side; ip link set side up
ip route add default via 10.77.0.254
echo go > "$1/go"
exec "$2" "$1/server.py" 127.0.0.1:8000 10.77.0.1:8000 10.88.0.1:8000
"""

BEYOND = """
echo $$ > "$1/world"
read -r _ < "$1/go"
ip link set lo up
ip addr add 10.77.0.254/24 dev far; ip link set far up
ip addr add 203.0.113.7/32 dev lo; ip addr add 169.254.169.254/32 dev lo
exec "$2" "$1/server.py" 203.0.113.7:8000 169.254.169.254:80 10.77.0.254:8000
"""

SERVER = """
import socket, sys, threading
def serve(sock, name):
    while True:
        far, _ = sock.accept()
        with far:
            far.sendall(name.encode())
            far.settimeout(30)
            try:
                while far.recv(1):
                    pass
            except OSError:
                pass
for name in sys.argv[1:]:
    host, _, port = name.rpartition(":")
    sock = socket.create_server((host, int(port)))
    threading.Thread(target=serve, args=(sock, name)).start()
print("serving", flush=True)
"""


@pytest.fixture(scope="module")
def world() -> Iterator[int]:
    """Make a world; yield a process in the namespace where a node runs."""
    with tempfile.TemporaryDirectory(prefix="hayflick-") as directory:
        Path(directory, "server.py").write_text(SERVER)
        with Path(directory, "log").open("w") as log:
            process = subprocess.Popen(
                ["unshare", "-n", "sh", "-c", WORLD, "_", directory, sys.executable, BEYOND],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            until(lambda: Path(directory, "log").read_text().count("serving") == 2)
            yield process.pid
        finally:
            for pid in (Path(directory, "world").read_text().strip(), str(process.pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
            process.wait()


def prefix(world: int) -> tuple[str, ...]:
    """Return the command that starts a program in that world."""
    return ("nsenter", f"--net=/proc/{world}/ns/net", "--")


@pytest.fixture(scope="module")
def node(world: int) -> Iterator[Stack]:
    """Services whose node is in that world."""
    with running_stack(node_prefix=prefix(world)) as stack:
        yield stack


REACH = """
import json, socket, sys
answers = {}
for name in sys.argv[1:]:
    host, _, port = name.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=3) as sock:
            answers[name] = sock.recv(100).decode()
    except OSError:
        answers[name] = ""
print(json.dumps(answers))
"""


def reach(stack: Stack, worker: Worker, *names: str) -> dict[str, str]:
    """Return what answers at each of *names*, from inside."""
    ran: Ran = stack.run(worker, command("python", "-c", REACH, *names, timeout=60), keep=True)
    assert ran.outcome == "SUCCEEDED", ran
    answers: dict[str, str] = json.loads(ran.stdout)
    return answers


def pastas(stack: Stack) -> list[int]:
    """Return the processes that connect workers of this node."""
    parent = stack.processes["orchestrator"].pid
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(pid) for pid in children if b"pasta" in Path(f"/proc/{pid}/cmdline").read_bytes()]


OUTSIDE = NetworkPolicy(allow_external=True)


def test_the_world_but_not_the_host(node: Stack) -> None:
    """A worker reaches a host of the world, and no address of its own host, loopback or metadata."""
    worker = node.launch(network=OUTSIDE)
    answers = reach(
        node,
        worker,
        *("203.0.113.7:8000", "10.77.0.254:8000"),
        *("127.0.0.1:8000", "10.77.0.1:8000", "10.88.0.1:8000", "169.254.169.254:80"),
    )
    assert answers == {
        "203.0.113.7:8000": "203.0.113.7:8000",
        "10.77.0.254:8000": "10.77.0.254:8000",  # the gateway is the gateway, not the host
        "127.0.0.1:8000": "",
        "10.77.0.1:8000": "",
        "10.88.0.1:8000": "",
        "169.254.169.254:80": "",
    }
    ran = node.run(worker, command("cat", "/etc/resolv.conf"))
    assert ran.stdout == b"nameserver 198.18.0.53\n"
    node.stop(worker)


def test_without_the_licence_there_is_no_way(node: Stack) -> None:
    """A neighbour without the licence reaches nothing of it, and nothing is started for it."""
    worker = node.launch(network=NetworkPolicy(allow_loopback=True))
    assert set(reach(node, worker, "203.0.113.7:8000", "10.77.0.254:8000").values()) == {""}
    assert pastas(node) == []
    node.stop(worker)


def test_what_connects_it_has_no_power(node: Stack) -> None:
    """Pasta is a user of its own with power over one namespace, in which the worker has none."""
    worker = node.launch(network=OUTSIDE)
    (pid,) = pastas(node)
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    uid = int(fields["Uid"].split()[0])
    assert uid >= 100_000
    assert uid != node.sandboxes()[worker.worker_id].host_uid
    assert fields["NoNewPrivs"] == "1"
    assert fields["Seccomp"] == "2"
    inside = "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)"
    ran = node.run(worker, command("python", "-c", inside), keep=True)
    assert b"Error" in ran.stderr, ran
    # Its own user namespace, not the host's.
    assert Path(f"/proc/{pid}/ns/user").readlink() != Path("/proc/self/ns/user").readlink()
    node.stop(worker)
    until(lambda: pastas(node) == [])


def test_taken_live(node: Stack) -> None:
    """Narrowed, a worker reaches nothing any more, and what connected it is gone when the answer comes."""
    worker = node.launch(network=OUTSIDE)
    assert reach(node, worker, "203.0.113.7:8000")["203.0.113.7:8000"]
    request = controller_pb2.NarrowNetworkRequest(
        request_id=request_id(), worker_id=worker.worker_id, reason="enough", network=NetworkPolicy()
    )
    node.controller.NarrowNetwork(request)
    assert pastas(node) == []
    assert reach(node, worker, "203.0.113.7:8000") == {"203.0.113.7:8000": ""}
    node.stop(worker)


def test_nothing_outlives_a_killed_node(world: int) -> None:
    """When the orchestrator is killed, what connected its workers dies with it."""
    with tempfile.TemporaryDirectory(prefix="hayflick-") as directory:
        stack = Stack(Path(directory), node_prefix=prefix(world))
        try:
            stack.launch(network=OUTSIDE)
            (pid,) = pastas(stack)
            stack.end("orchestrator", 9)
            until(lambda: not Path(f"/proc/{pid}").exists())
            until(lambda: not any("cgroup" in it for it in stack.left_behind()))
        finally:
            stack.abandon()
