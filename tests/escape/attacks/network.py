"""Attacks by way of networks, sockets and IPC."""

from __future__ import annotations

import os
import socket

from ..table import Row
from ..tools import Facts, Verdict, attempt, summary, syscall, verdict


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
    Row(45, reach_host_loopback, ("seccomp", "Landlock", "network namespace"), SHARED_NET),
    Row(
        45,
        reach_host_loopback_with_licence,
        ("Landlock", "network namespace"),
        ("host-net", "no-landlock"),
        resources={"network": {"allow_loopback": True}},
    ),
    Row(46, reach_abstract_socket, ("Landlock scope", "network namespace"), ("host-net", "no-landlock")),
    Row(47, reach_path_sockets, ("mounts",), ("canary-readable",)),
    Row(48, reach_metadata, ("seccomp", "network namespace"), ("metadata-on-lo", "no-seccomp")),
    Row(51, find_ipc, ("ipc namespace",), ("shared-ipc",), first=make_ipc, host=("ipc",)),
    Row(62, inherit_descriptors, ("close_range at birth", "close_range at each task"), ("keep-descriptors",)),
    Row(63, inherit_environment, ("environment by allow-list",), ("inherit-environment",)),
]
