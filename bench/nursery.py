"""Sandboxes without services: what the zygote alone costs."""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import socket
import time
from collections.abc import Iterator

from hayflick_sandbox import messages
from hayflick_sandbox.cgroups import Tree
from hayflick_sandbox.identities import UidRange
from hayflick_sandbox.policy import Limits, Policy
from hayflick_sandbox.probe import probe, require
from hayflick_sandbox.zygote_client import Exited, Started, Zygote

MEMORY_BYTES = 64 * 1024 * 1024


class Nursery:
    """Sandboxes straight from a zygote, without services."""

    def __init__(self, tree: Tree, uids: UidRange, zygote: Zygote) -> None:
        self.tree, self.uids, self.zygote = tree, uids, zygote
        self.live: list[tuple[Started, socket.socket]] = []

    @classmethod
    @contextlib.contextmanager
    def open(cls) -> Iterator[Nursery]:
        """Yield an empty nursery."""
        tree = Tree.create(f"bench-{os.getpid()}")
        try:
            degraded = require(probe(tree), ())
            uids = UidRange.claim()
            zygote = Zygote.start(tree=tree, degraded=degraded)
            try:
                yield cls(tree, uids, zygote)
            finally:
                zygote.close()
                zygote.wait_closed()
                uids.close()
        finally:
            tree.close()

    def launch(self) -> float:
        """Start one sandbox; return the seconds from the request to its ready message."""
        name = secrets.token_hex(8)
        began = time.perf_counter()
        self.tree.add(name, Limits(memory_bytes=MEMORY_BYTES))
        channel = self.zygote.launch(name, Policy(), name, self.uids.lease(), beat_seconds=5.0)
        event = self._event()
        assert isinstance(event, Started), event
        message: object = None
        while not isinstance(message, messages.Ready):
            wait_readable(channel)
            message = messages.parse_from_init(channel.recv(messages.MAX_PACKET_BYTES))
            assert isinstance(message, messages.Probed | messages.Ready), message
        took = time.perf_counter() - began
        self.live.append((event, channel))
        return took

    def kill(self) -> float:
        """Kill all in one write; return the seconds until the last pidfd is readable."""
        poller = select.poll()
        for started, _ in self.live:
            poller.register(started.pidfd, select.POLLIN)
        left = len(self.live)
        began = time.perf_counter()
        self.tree.kill("")
        while left:
            for descriptor, _ in poller.poll():
                poller.unregister(descriptor)
                left -= 1
        took = time.perf_counter() - began
        while self.live:
            if isinstance(self._event(), Exited):
                started, channel = self.live.pop()
                os.close(started.pidfd)
                channel.close()
        return took

    def _event(self) -> object:
        while (event := self.zygote.receive()) is None:
            wait_readable(self.zygote.socket)
        return event


def wait_readable(sock: socket.socket) -> None:
    """Wait until *sock* has something to read; select(2) cannot count beyond 1,023."""
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    poller.poll()
