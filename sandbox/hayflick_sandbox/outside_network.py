"""A network namespace that somebody outside may connect to the world: made, owned and fenced here.

It belongs to a user namespace of its own, made by an unprivileged host user, so
that whoever connects it (pasta(1)) needs no power over anything else. The
worker is in neither and holds no power over either. What it shall not reach is
fenced off by routes that lead nowhere, before anybody is in it: more specific
than any default route, they hold whatever is configured later.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Iterable

from hayflick_sandbox import syscalls
from hayflick_sandbox.template import HOST_PROC

# Link-local, and in it what clouds call metadata.
NEVER = ("169.254.0.0/16",)

_NS_GET_USERNS = 0xB701  # linux/nsfs.h
# linux/netlink.h, linux/rtnetlink.h
_RTM_NEWROUTE, _NLM_F = 24, 0x1 | 0x4 | 0x400  # request, acknowledge, create
_RT_TABLE_MAIN, _RTPROT_STATIC, _RTN_BLACKHOLE, _RTA_DST = 254, 4, 6, 1
_HEADER, _ROUTE, _ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=8BI"), struct.Struct("=HH")


def make(owner: int | None) -> int:
    """Return a descriptor of a new network namespace, owned by a new user namespace of *owner*.

    Args:
        owner: A host uid, or ``None`` for whoever runs this node.

    Raises:
        OSError: the kernel has no room for it, or refused.
    """
    done_read, done_write = os.pipe2(os.O_CLOEXEC)
    go_read, go_write = os.pipe2(os.O_CLOEXEC)
    try:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                if owner is not None:
                    os.setresgid(owner, owner, owner)
                    os.setresuid(owner, owner, owner)
                syscalls.unshare(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNET)
                os.write(done_write, b"1")
                os.close(go_write)
                os.read(go_read, 1)
                status = 0
            finally:
                os._exit(status)
        os.close(done_write)
        done_write = -1
        try:
            if os.read(done_read, 1) != b"1":
                raise OSError(1, "no user and network namespace could be made", "unshare")
            for name, text in (
                ("setgroups", "deny"),
                ("uid_map", f"0 {owner or 0} 1"),
                ("gid_map", f"0 {owner or 0} 1"),
            ):
                descriptor = os.open(f"{HOST_PROC}/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
                try:
                    os.write(descriptor, text.encode())
                finally:
                    os.close(descriptor)
            return os.open(f"{HOST_PROC}/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(go_write)
            go_write = -1
            os.waitpid(pid, 0)
    finally:
        for descriptor in (done_read, done_write, go_read, go_write):
            if descriptor >= 0:
                os.close(descriptor)


def owner_of(network: int) -> int:
    """Return a descriptor of the user namespace that owns the namespace *network* (ioctl_nsfs(2))."""
    return fcntl.ioctl(network, _NS_GET_USERNS)


def fence(prefixes: Iterable[str]) -> None:
    """Lead what goes to *prefixes* nowhere, in the network namespace that this process is in.

    Raises:
        OSError: the kernel refused, or one is no IPv4 prefix.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        for number, text in enumerate(prefixes, 1):
            sock.send(_blackhole(text, number))
            answer = sock.recv(4_096)
            (code,) = struct.unpack_from("=i", answer, _HEADER.size)
            if code:
                raise OSError(-code, os.strerror(-code), f"route to {text}")


def _blackhole(prefix: str, sequence: int) -> bytes:
    address, _, length = prefix.partition("/")
    route = _ROUTE.pack(
        socket.AF_INET,
        int(length),
        *(0, 0),
        _RT_TABLE_MAIN,
        _RTPROT_STATIC,
        0,
        _RTN_BLACKHOLE,
        0,
    )
    target = _ATTRIBUTE.pack(_ATTRIBUTE.size + 4, _RTA_DST) + socket.inet_aton(address)
    size = _HEADER.size + len(route) + len(target)
    return _HEADER.pack(size, _RTM_NEWROUTE, _NLM_F, sequence, 0) + route + target
