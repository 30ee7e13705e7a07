"""Fresh network namespaces, made ahead of need.

Making one is the dearest part of a sandbox, so the zygote makes a few whenever
it has nothing else to do. They belong to the zygote's user namespace and not
to the worker's: a worker in one holds no power over it whatever its
capabilities (network_namespaces(7)).
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Iterable

from hayflick_sandbox import outside_network, syscalls
from hayflick_sandbox.template import HOST_PROC

SPARES = 16

# linux/sockios.h, linux/if.h
_SIOCSIFFLAGS = 0x8914
_IFF_UP, _IFF_RUNNING = 0x1, 0x40


class Networks:
    """The zygote's stock of unused network namespaces."""

    def __init__(self) -> None:
        self._spares: list[int] = []
        self._refused = False

    @property
    def wanting(self) -> bool:
        """Whether there is room for another spare."""
        return len(self._spares) < SPARES and not self._refused

    def stock(self) -> None:
        """Make one spare, if the kernel lets us; else do without until one was needed."""
        try:
            self.make()
        except OSError:
            # Spares only save time: no worker that lives may end for want of one.
            self._refused = True

    def make(self) -> None:
        """Make one spare; this process stays in it until it enters another."""
        syscalls.unshare(syscalls.CLONE_NEWNET)
        path = f"{HOST_PROC}/{os.getpid()}/ns/net"
        self._spares.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))

    def enter_fresh(self, *, loopback: bool) -> None:
        """Enter a namespace that nobody was in, so that the next fork is born there.

        Args:
            loopback: Whether its loopback interface is brought up.

        Raises:
            OSError: the kernel has no room for another network namespace.
        """
        if not self._spares:
            self.make()
        self._refused = False
        self._enter(self._spares.pop(0), loopback=loopback)

    def enter_outside(self, owner: int | None, unreachable: Iterable[str]) -> None:
        """Enter a new namespace that :mod:`~hayflick_sandbox.outside_network` made and fenced.

        Raises:
            OSError: the kernel has no room for it, or refused.
        """
        self._enter(outside_network.make(owner), loopback=True)
        outside_network.fence(unreachable)

    def _enter(self, network: int, *, loopback: bool) -> None:
        try:
            syscalls.setns(network, syscalls.CLONE_NEWNET)
        finally:
            os.close(network)
        if loopback:
            request = struct.pack("16sh14x", b"lo", _IFF_UP | _IFF_RUNNING)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                fcntl.ioctl(sock, _SIOCSIFFLAGS, request)
