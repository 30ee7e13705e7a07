"""Attacks by way of networks, sockets and IPC."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

from ..table import Row
from ..tools import Facts, Verdict, attempt, opened, summary, syscall, verdict

if TYPE_CHECKING:
    from ..arena import Arena


def connected(family: int, kind: int, address: object) -> str:
    """Connect; return "ok", or the name of the error."""

    def connect() -> None:
        with socket.socket(family, kind) as sock:
            sock.settimeout(2)
            sock.connect(address)

    return attempt(connect)


def reach_host_loopback(facts: Facts) -> Verdict:
    """Connect to a port that listens on the host's loopback; look for an interface."""
    tcp = connected(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", facts["tcp_port"]))
    with open("/proc/self/net/dev") as file:
        interfaces = [line.partition(":")[0].strip() for line in file if ":" in line]
    held = tcp in ("EAFNOSUPPORT", "ECONNREFUSED", "ENETUNREACH", "EACCES") and interfaces == ["lo"]
    return verdict(held, f"{tcp}; interfaces {interfaces if len(interfaces) < 4 else len(interfaces)}")


def reach_host_loopback_with_licence(facts: Facts) -> Verdict:
    """Connect to the host's loopback when one's own loopback is licensed."""
    tcp = connected(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", facts["tcp_port"]))
    return verdict(tcp in ("ECONNREFUSED", "ENETUNREACH", "EACCES"), tcp)


def reach_abstract_socket(facts: Facts) -> Verdict:
    """Connect to an abstract socket of the host."""
    answer = connected(socket.AF_UNIX, socket.SOCK_STREAM, "\0" + facts["abstract"])
    return verdict(answer in ("ECONNREFUSED", "EPERM"), answer)


def reach_path_sockets(facts: Facts) -> Verdict:
    """Connect to sockets in the host's file system: the services', and one that anybody may open."""
    tries = {
        path.replace(facts["directory"], "…"): connected(socket.AF_UNIX, socket.SOCK_STREAM, path)
        for path in (*facts["sockets"], "/run/dbus/system_bus_socket", "/var/run/docker.sock")
    }
    return verdict(set(tries.values()) <= {"ENOENT", "EACCES"}, summary(tries))


def use_special_files(facts: Facts) -> Verdict:
    """Use what anybody may use and a shown path holds: a socket, a pipe, and a device of the host."""
    there = facts["special_files"]
    directory = os.open(there, os.O_PATH | os.O_DIRECTORY)
    os.symlink(f"{there}/open.sock", "/tmp/escape-link")
    tries = {
        "socket": connected(socket.AF_UNIX, socket.SOCK_STREAM, f"{there}/open.sock"),
        "by a link": connected(socket.AF_UNIX, socket.SOCK_STREAM, "/tmp/escape-link"),
        "by a descriptor": connected(
            socket.AF_UNIX, socket.SOCK_STREAM, f"/proc/self/fd/{directory}/open.sock"
        ),
        "pipe": opened(f"{there}/pipe", os.O_WRONLY),
        "pipe, both ends": opened(f"{there}/pipe", os.O_RDWR),
    }
    if not facts["rootless"]:
        tries["device"] = opened(f"{there}/null", os.O_RDWR)
    readable = opened(f"{there}/secret", os.O_RDONLY)
    return verdict(
        set(tries.values()) == {"EACCES"} and readable == "ok", f"{summary(tries)}; a file: {readable}"
    )


def reach_metadata(facts: Facts) -> Verdict:
    """Reach the metadata addresses and a resolver, by datagrams that need no answer; none is sent."""
    targets = {"169.254.169.254": 80, "1.1.1.1": 53, "10.0.0.1": 53}
    tries = {
        host: connected(socket.AF_INET, socket.SOCK_DGRAM, (host, port)) for host, port in targets.items()
    }
    tries["fd00:ec2::254"] = connected(socket.AF_INET6, socket.SOCK_DGRAM, ("fd00:ec2::254", 80))
    with open("/etc/resolv.conf") as file:
        resolvers = file.read().strip()
    refusals = {"ENETUNREACH", "EAFNOSUPPORT", "EADDRNOTAVAIL", "EHOSTUNREACH"}
    return verdict(
        set(tries.values()) <= refusals and not resolvers,
        f"{summary(tries)}; resolvers {resolvers or 'none'}",
    )


def ask_the_proxy(facts: Facts) -> Verdict:
    """Ask the proxy for the host's loopback by every spelling."""
    port = facts["tcp_port"]

    def say(data: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", 3128), timeout=2) as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            got = b""
            try:
                while piece := sock.recv(4_096):
                    got += piece
            except (ConnectionResetError, TimeoutError):
                pass
        return got

    spellings = (
        *(b"127.0.0.1", b"localhost", b"LOCALHOST.", b"127.1", b"2130706433", b"0x7f000001", b"0177.0.0.1"),
        *(b"[::1]", b"[::ffff:127.0.0.1]", b"0.0.0.0", b"169.254.169.254", b"127.0.0.1\0.ok.invalid"),
        *(b"ok.invalid\0.localhost", b"ok.invalid@127.0.0.1", b"127.0.0.1#.ok.invalid", b"evil.ok.invalid"),
        *(
            b"127.0.0.1/.ok.invalid",
            b"ok.invalid.localhost",
            b"127.0.0.1\r\nHost: ok.invalid",
            b"ok.\xc4\xb1nvalid",
        ),
    )
    tries = {}
    for name in spellings:
        status = say(b"CONNECT %b:%d HTTP/1.1\r\nHost: ok.invalid\r\n\r\n" % (name, port))
        tries[name.decode(errors="replace")] = status[9:12].decode(errors="replace") or "closed"
    page = say(b"GET http://ok.invalid@127.0.0.1:%d/ HTTP/1.1\r\nHost: ok.invalid\r\n\r\n" % port)
    tries["a page"] = page[9:12].decode(errors="replace") or "closed"
    number = port.to_bytes(2, "big")
    for name, address in (
        ("4", b"\1\x7f\0\0\1"),
        ("name", b"\3\x09127.0.0.1"),
        ("6", b"\4" + bytes(15) + b"\1"),
    ):
        answer = say(b"\5\1\0\5\1\0" + address + number)
        tries[f"socks {name}"] = f"socks {answer[3]}" if len(answer) > 3 else "closed"
    reached = [name for name, answer in tries.items() if answer in ("200", "socks 0")]
    return verdict(not reached, summary(tries)) | {"tries": len(tries)}


def get_past_the_proxy(arena: Arena, words: tuple[str, ...]) -> Verdict:
    """Reach the host's loopback through a proxy that lists another name, and leave no trace."""
    network = {"allowed_hosts": [f"ok.invalid:{arena.facts['tcp_port']}"]}
    worker = arena.launch(words, network=network)
    answer = arena.attack(worker, {"ask": ask_the_proxy}, {})["ask"]
    assert "error" not in answer, answer
    recorded = arena.stack.events(worker.worker_id).count("egress")
    return verdict(answer["held"] and recorded > 0, f"{answer['seen']}; {recorded} on record")


def make_ipc(facts: Facts) -> Verdict:
    """Make a System V segment, a semaphore and a queue with known keys."""
    key = facts["ipc_key"]
    tries = {
        "shmget": syscall(facts, "shmget", key, 4096, 0o1666),
        "semget": syscall(facts, "semget", key, 1, 0o1666),
        "msgget": syscall(facts, "msgget", key, 0o1666),
    }
    return verdict(set(tries.values()) == {"ok"}, summary(tries))


def find_ipc(facts: Facts) -> Verdict:
    """Find what a sister made, by its key."""
    key = facts["ipc_key"]
    tries = {
        "shmget": syscall(facts, "shmget", key, 0, 0),
        "semget": syscall(facts, "semget", key, 0, 0),
        "msgget": syscall(facts, "msgget", key, 0),
        "mq_open": syscall(facts, "mq_open", b"escape", 0, 0, None),
    }
    return verdict(facts["first"]["held"] and set(tries.values()) == {"ENOENT"}, summary(tries))


def inherit_descriptors(facts: Facts) -> Verdict:
    """Find a descriptor beside stdio and one's own."""
    # Of the harness: the task's control stream, and the pipe of this attack's verdict.
    known = {0, 1, 2, *facts["own_descriptors"]}
    found = {}
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in known:
            try:
                found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
            except FileNotFoundError:
                continue  # the listing's own
    return verdict(not found, f"beyond stdio and control: {found or 'none'}")


def inherit_environment(facts: Facts) -> Verdict:
    """Find the services' secrets in the environment or the arguments of any process."""
    canary = facts["environment_canary"]
    names = sorted(name for name in os.environ if name != "LC_CTYPE")
    texts = [repr(dict(os.environ))]
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        for name in ("environ", "cmdline"):
            try:
                with open(f"/proc/{pid}/{name}", "rb") as file:
                    texts.append(repr(file.read()))
            except OSError:
                continue  # init keeps its own to itself
    found = sum(canary in text for text in texts)
    expected = {"HOME", "LANG", "PATH", "PWD", "TMPDIR", "USER"}
    return verdict(
        not found and set(names) <= expected | set(facts["licensed_variables"]),
        f"canary in {found} places; {', '.join(names)}",
    )


SHARED_NET = ("host-net", "no-seccomp", "no-landlock")

ROWS = [
    Row(
        49,
        get_past_the_proxy,
        ("allow-list proxy", "network namespace", "Landlock"),
        ("proxy-lists-loopback",),
        where="outside",
    ),
    Row(45, reach_host_loopback, ("seccomp", "Landlock", "network namespace"), SHARED_NET),
    Row(
        45,
        reach_host_loopback_with_licence,
        ("Landlock", "network namespace"),
        ("host-net", "no-landlock"),
        resources={"network": {"allow_loopback": True}},
    ),
    Row(46, reach_abstract_socket, ("Landlock scope", "network namespace"), ("host-net", "no-landlock")),
    Row(47, reach_path_sockets, ("mounts",), ("canary-readable", "canary-owned")),
    Row(
        47,
        use_special_files,
        ("id-mapped mounts", "nodev"),
        ("canary-readable", "canary-owned"),
        faults=("canary-readable",),
        needs=("idmapped-mounts",),
        limits_of_it="a pipe that anybody may read can be read",
    ),
    Row(48, reach_metadata, ("seccomp", "network namespace"), ("metadata-on-lo", "no-seccomp")),
    Row(51, find_ipc, ("ipc namespace",), ("shared-ipc",), first=make_ipc, host=("ipc",)),
    Row(62, inherit_descriptors, ("close_range at birth", "close_range at each task"), ("keep-descriptors",)),
    Row(63, inherit_environment, ("environment by allow-list",), ("inherit-environment",)),
]
