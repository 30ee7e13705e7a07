"""The allow-list proxy: a worker reaches what it was given, by any way it tries, and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hayflick.v1 import logger_pb2
from hayflick.v1.resources_pb2 import NetworkPolicy, Worker

from .conftest import Ran, Stack, command, until

if TYPE_CHECKING:
    from collections.abc import Iterator

BODY = b"hello from upstream\n"


class Handler(BaseHTTPRequestHandler):
    """Answers, and notes what it was asked."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer with as many bytes as the path's number says, or with a word."""
        assert isinstance(self.server, Server)
        self.server.asked.append((self.path, dict(self.headers)))
        if self.path.startswith("/redirect"):
            self.send_response(302)
            self.send_header("Location", "http://evil.example/")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        count = self.path.rpartition("/")[2]
        body = bytes(int(count)) if count.isdigit() else BODY
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    def do_POST(self) -> None:
        """Say how much came."""
        size = len(self.rfile.read(int(self.headers["Content-Length"])))
        answer = str(size).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    """A host of the outside world, on the test's own loopback."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, dict[str, str]]] = []

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.server_address[1])


@pytest.fixture
def upstream() -> Iterator[Server]:
    """A web server."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@dataclass
class Case:
    """A worker with a list of hosts, and what came of it."""

    stack: Stack
    worker: Worker
    events: list[dict[str, Any]] = field(default_factory=list)

    def python(self, code: str, **values: object) -> Ran:
        """Run *code* inside, with *values* defined."""
        head = "".join(f"{name} = {value!r}\n" for name, value in values.items())
        return self.stack.run(
            self.worker, command("python", "-c", head + PRELUDE + code, timeout=60), keep=True
        )

    def egress(self, count: int) -> list[dict[str, Any]]:
        """Return the worker's egress events once there are so many."""

        def found() -> list[dict[str, Any]] | None:
            request = logger_pb2.ListEventsRequest(
                filter=logger_pb2.EventFilter(worker_id=self.worker.worker_id, events=["egress"]),
                page_size=1_000,
            )
            events = [dict(it.event.details) for it in self.stack.logger.ListEvents(request).events]
            return events if len(events) >= count else None

        return list(until(found))


PRELUDE = """
import json, os, socket, sys, urllib.request, urllib.error

def raw(data, half=True):
    with socket.create_connection(("127.0.0.1", 3128), timeout=20) as sock:
        sock.sendall(data)
        if half:
            sock.shutdown(socket.SHUT_WR)
        got = b""
        try:
            while piece := sock.recv(65536):
                got += piece
        except ConnectionResetError:
            pass
        return got

def get(url):
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""

def status(authority):
    if isinstance(authority, str):
        authority = authority.encode()
    return raw(b"CONNECT " + authority + b" HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")[:12].decode("latin-1")

def socks(kind, address, port):
    data = b"\\5\\1\\0" + b"\\5\\1\\0" + bytes([kind]) + address + port.to_bytes(2, "big")
    return raw(data)[2:4]
"""


@contextlib.contextmanager
def licensed(stack: Stack, *allowed: str, limit: int = 0, **more: Any) -> Iterator[Case]:
    """Run a worker that may reach *allowed*."""
    policy = NetworkPolicy(allowed_hosts=allowed, egress_limit_bytes=limit, **more)
    worker = stack.launch(network=policy, memory_limit_bytes=128 * 1024 * 1024)
    try:
        yield Case(stack, worker)
    finally:
        stack.stop(worker)


def test_ordinary_programs_reach_what_is_allowed(stack: Stack, upstream: Server) -> None:
    """A program that knows nothing of Hayflick fetches a page by the proxy variables; it is on record."""
    with licensed(stack, f"127.0.0.1:{upstream.port}") as case:
        ran = case.python("print(get(url)[1].decode(), end='')", url=f"http://127.0.0.1:{upstream.port}/word")
        assert ran.stdout == BODY, ran
        (event,) = case.egress(1)
        assert event["host"] == "127.0.0.1"
        assert event["port"] == upstream.port
        assert event["verdict"] == "ended"
        assert event["bytes_in"] > len(BODY)
        assert event["bytes_out"] > 0
        assert event["seconds"] < 20
        ((path, headers),) = upstream.asked
        assert path == "/word"
        assert headers["Host"] == f"127.0.0.1:{upstream.port}"
        assert headers["Connection"] == "close"
        assert "Proxy-Connection" not in headers


def test_uploads_pass(stack: Stack, upstream: Server) -> None:
    """What a program sends reaches the other side whole."""
    with licensed(stack, f"127.0.0.1:{upstream.port}") as case:
        ran = case.python(
            "print(urllib.request.urlopen(url, data=bytes(3_000_000)).read().decode())",
            url=f"http://127.0.0.1:{upstream.port}/",
        )
        assert ran.stdout.strip() == b"3000000", ran


def test_tunnels(stack: Stack, upstream: Server) -> None:
    """CONNECT and SOCKS5 both lead there, with bytes that came early."""
    with licensed(stack, f"127.0.0.1:{upstream.port}") as case:
        ran = case.python(
            """
get = b"GET /word HTTP/1.1\\r\\nHost: u\\r\\nConnection: close\\r\\n\\r\\n"
print(raw(b"CONNECT 127.0.0.1:%d HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n" % port + get)[-6:])
head = b"\\5\\1\\0\\5\\1\\0\\1\\x7f\\0\\0\\1" + port.to_bytes(2, "big")
print(raw(head + get)[-6:])
name = b"127.0.0.1"
head = b"\\5\\2\\2\\0\\5\\1\\0\\3" + bytes([len(name)]) + name + port.to_bytes(2, "big")
print(raw(head + get)[-6:])
""",
            port=upstream.port,
        )
        assert ran.stdout.splitlines() == [b"b'tream\\n'"] * 3, ran


def test_every_other_way_is_refused(stack: Stack, upstream: Server) -> None:
    """Names, addresses and spellings beyond the list are refused, and nothing reaches the upstream."""
    port = upstream.port
    with licensed(stack, "ok.example", f"127.0.0.1:{port + 1 if port < 65_535 else port - 1}") as case:
        asked = [
            f"127.0.0.1:{port}",
            f"localhost:{port}",
            f"[::1]:{port}",
            f"[::ffff:127.0.0.1]:{port}",
            f"2130706433:{port}",
            f"0x7f000001:{port}",
            f"0177.0.0.1:{port}",
            "169.254.169.254:80",
            "evil.example:443",
            "ok.example@evil.example:443",
            "evil.example%00.ok.example:443",
            "evil.example\0.ok.example:443",
            "bücher.example:443",
            "xn--a.example:443",
            "ok.example:22",
            "ok.example",
            "",
        ]
        ran = case.python("print(json.dumps([status(it) for it in asked]))", asked=asked)
        answers = json.loads(ran.stdout or b"0")
        assert set(answers) <= {"HTTP/1.1 403", "HTTP/1.1 400"}, dict(zip(asked, answers, strict=True))
        ran = case.python(
            """
print([socks(1, bytes([127, 0, 0, 1]), port), socks(3, b"\\x0cevil.example", 443),
       socks(3, b"\\x17evil.example\\0.ok.example", 443), socks(4, bytes(15) + b"\\1", port),
       raw(b"\\5\\1\\0\\5\\2\\0\\1" + bytes(6))[2:4], raw(b"\\5\\1\\2")])
print(raw(b"GET / HTTP/1.1\\r\\nHost: ok.example\\r\\n\\r\\n")[:12])
print(raw(b"GET https://ok.example/ HTTP/1.1\\r\\nHost: ok.example\\r\\n\\r\\n")[:12])
print(raw(b"GET http://u:p@ok.example/ HTTP/1.1\\r\\nHost: ok.example\\r\\n\\r\\n")[:12])
print(raw(b"\\0" * 100)[:12])
print(raw(b"GET http://ok.example/ HTTP/1.1\\r\\nX: " + b"x" * 100_000)[:12])
""",
            port=port,
        )
        assert b"\\x00" not in ran.stdout.splitlines()[0].replace(b"b'\\x05\\x02'", b"").replace(
            b"b'\\x05\\x07'", b""
        ), ran
        assert set(ran.stdout.splitlines()[1:]) == {b"b'HTTP/1.1 400'"}, ran
        assert upstream.asked == []
        events = case.egress(10)
        assert all(event["bytes_out"] == event["bytes_in"] == 0 for event in events)
        assert {"host_not_allowed", "address_not_allowed", "bad_request_host"} <= {
            event["verdict"] for event in events
        }


def test_a_name_that_leads_home_is_refused(stack: Stack, upstream: Server) -> None:
    """A listed name whose address is the host's own or private is refused, unless that address is listed."""
    with licensed(stack, f"localhost:{upstream.port}") as case:
        ran = case.python("print(status(f'localhost:{port}'))", port=upstream.port)
        assert ran.stdout.strip() == b"HTTP/1.1 403", ran
        assert case.egress(1)[0]["verdict"] == "private_address"
        assert upstream.asked == []


def test_redirects_are_new_requests(stack: Stack, upstream: Server) -> None:
    """A redirect from an allowed host to another leads nowhere."""
    with licensed(stack, f"127.0.0.1:{upstream.port}") as case:
        ran = case.python("print(get(url)[0])", url=f"http://127.0.0.1:{upstream.port}/redirect")
        assert ran.stdout.strip() == b"403", ran
        assert {event["host"] for event in case.egress(2)} == {"127.0.0.1", "evil.example"}


def test_one_request_a_connection(stack: Stack, upstream: Server) -> None:
    """A second request behind the first is not passed on, whatever host it names."""
    with licensed(stack, f"127.0.0.1:{upstream.port}") as case:
        ran = case.python(
            """
one = b"GET http://127.0.0.1:%d/one HTTP/1.1\\r\\nHost: evil.example\\r\\n\\r\\n" % port
two = b"GET http://evil.example/two HTTP/1.1\\r\\nHost: evil.example\\r\\n\\r\\n"
print(raw(one + two + two, half=False).count(b"HTTP/1.1"))
""",
            port=upstream.port,
        )
        assert ran.stdout.strip() == b"1", ran
        ((path, headers),) = upstream.asked
        assert (path, headers["Host"]) == ("/one", f"127.0.0.1:{upstream.port}")


def test_denials_do_not_flood_the_record(stack: Stack) -> None:
    """A worker that tries without end is told of ten times at once; the rest are counted, not lost."""
    with licensed(stack, "ok.example") as case:
        ran = case.python(
            "print({status('evil.example:443') for _ in range(100)})\n"
            "import time; time.sleep(1.5)\nstatus('evil.example:443')"
        )
        assert ran.stdout.strip() == b"{'HTTP/1.1 403'}", ran
        events = case.egress(11)
        counted = sum(event.get("suppressed", 0) for event in events)
        assert len(events) + counted == 101
        assert len(events) < 30


def test_the_budget_is_cut_exactly(stack: Stack, upstream: Server) -> None:
    """Exactly as many bytes cross as the limit says, both ways and all connections together."""
    limit = 100_000
    with licensed(stack, f"127.0.0.1:{upstream.port}", limit=limit) as case:
        ran = case.python(
            """
got = 0
for _ in range(4):
    answer = raw(b"GET http://127.0.0.1:%d/30000 HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n" % port, half=False)
    got += 0 if b" 403 " in answer else len(answer)
print(got)
print(status(f"127.0.0.1:{port}"))
""",
            port=upstream.port,
        )
        lines = ran.stdout.splitlines()
        events = case.egress(5)
        assert sum(event["bytes_in"] + event["bytes_out"] for event in events) == limit
        assert int(lines[0]) == sum(event["bytes_in"] for event in events)
        assert lines[1] == b"HTTP/1.1 403"
        assert [event["verdict"] for event in events][-2:] == ["budget", "budget"]


def test_without_the_licence(stack: Stack, upstream: Server) -> None:
    """A worker without a list has neither proxy, nor variables, nor AF_INET."""
    with licensed(stack) as case:
        ran = case.python(
            """
print([name for name in os.environ if "proxy" in name.lower()])
try:
    socket.socket(socket.AF_INET)
except OSError as error:
    print(error.errno)
"""
        )
        assert ran.stdout.splitlines() == [b"[]", b"97"], ran  # EAFNOSUPPORT


def test_only_that_port(stack: Stack) -> None:
    """With a list alone a worker may connect to the proxy's port and listen on none."""
    with licensed(stack, "ok.example") as case:
        ran = case.python(
            """
def tried(what):
    try:
        what()
    except OSError as error:
        return error.errno
    return 0
sock = socket.socket()
print([tried(lambda: sock.bind(("127.0.0.1", 9))), tried(lambda: sock.bind(("127.0.0.1", 8080))),
       tried(lambda: socket.socket().connect(("127.0.0.1", 8080))),
       tried(lambda: socket.socket().connect(("127.0.0.1", 3128))),
       tried(lambda: socket.socket().connect(("8.8.8.8", 3128)))])
"""
        )
        answers = json.loads(ran.stdout or b"0")
        assert answers[:4] == [13, 13, 13, 0], ran  # EACCES by Landlock
        assert answers[4] == 101, ran  # ENETUNREACH: there is no way out of it


def test_two_workers_have_two_lists(stack: Stack, upstream: Server) -> None:
    """What one worker may reach, its neighbour may not."""
    with licensed(stack, f"127.0.0.1:{upstream.port}") as one, licensed(stack, "ok.example") as other:
        code = "print(status(f'127.0.0.1:{port}'))"
        assert one.python(code, port=upstream.port).stdout.strip() == b"HTTP/1.1 200"
        assert other.python(code, port=upstream.port).stdout.strip() == b"HTTP/1.1 403"


def proxy_of(stack: Stack) -> int:
    """Return the pid of the node's proxy."""
    parent = stack.processes["orchestrator"].pid
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if b"hayflick_orchestrator.egress" in Path(f"/proc/{child}/cmdline").read_bytes():
            return int(child)
    raise AssertionError("no proxy runs")


@pytest.mark.root
def test_the_proxy_has_no_privilege(own_stack: Stack, upstream: Server) -> None:
    """The proxy is a user of its own without capabilities, and starts only when somebody needs it."""
    plain = own_stack.launch()
    with pytest.raises(AssertionError, match="no proxy"):
        proxy_of(own_stack)
    own_stack.stop(plain)
    with licensed(own_stack, f"127.0.0.1:{upstream.port}") as case:
        case.python("status(f'127.0.0.1:{port}')", port=upstream.port)
        status = Path(f"/proc/{proxy_of(own_stack)}/status").read_text()
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert set(fields["Uid"].split()) == set(fields["Gid"].split())
        assert int(fields["Uid"].split()[0]) >= 100_000
        assert fields["Groups"].strip() == ""
        assert fields["NoNewPrivs"] == "1"
        assert {fields[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}


def test_a_dead_proxy_is_a_shut_door(own_stack: Stack, upstream: Server) -> None:
    """When the proxy dies its workers reach nothing; the next worker gets a new one."""
    with licensed(own_stack, f"127.0.0.1:{upstream.port}") as case:
        code = "print(status(f'127.0.0.1:{port}'))"
        assert case.python(code, port=upstream.port).stdout.strip() == b"HTTP/1.1 200"
        os.kill(proxy_of(own_stack), 9)
        ran = case.python("try: raw(b'x')\nexcept ConnectionRefusedError: print('refused')")
        assert ran.stdout.strip() == b"refused", ran
        with licensed(own_stack, f"127.0.0.1:{upstream.port}") as other:
            assert other.python(code, port=upstream.port).stdout.strip() == b"HTTP/1.1 200"


def test_the_door_ends_with_its_worker(stack: Stack) -> None:
    """The end of a worker cuts its connections outside, and says so."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        server.settimeout(20)
        with licensed(stack, f"127.0.0.1:{port}") as case:
            stream = stack.begin(
                case.worker,
                command(
                    "python",
                    "-c",
                    "import socket, time\n"
                    "sock = socket.create_connection(('127.0.0.1', 3128))\n"
                    f"sock.sendall(b'CONNECT 127.0.0.1:{port} HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n')\n"
                    "print(sock.recv(100), flush=True)\ntime.sleep(100)",
                ),
            )
            far, _ = server.accept()
        far.settimeout(20)
        with far, contextlib.suppress(ConnectionResetError):
            assert far.recv(1) == b""
        stream.cancel()
        assert case.egress(1)[0]["verdict"] in ("closed", "ended")
