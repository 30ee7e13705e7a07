"""The ways out that a licence gives: sockets made inside the sandbox and answered outside it.

A listening socket belongs to the namespaces it was made in, and whoever holds
its descriptor may accept on it from anywhere. So init makes it where only the
worker can reach it, and hands the descriptor to the orchestrator with its
:class:`~hayflick_sandbox.messages.Ready`: who calls is known by the door they
came through, and nothing of the host is shown inside. Once the orchestrator
closes it, the door is gone for good, for the worker can make no other there.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from hayflick_sandbox.template import HOST_PROC, NEW_ROOT

PROXY_ADDRESS = ("127.0.0.1", 3128)
WORKER_SERVICE_PATH = "/run/hayflick/worker.sock"
# How many callers may wait to be accepted; further ones wait in connect(2).
BACKLOG = 16


@dataclass(frozen=True, slots=True)
class OpenWorkerService:
    """A socket in a directory of the root, which will be read-only before the worker lives."""

    def describe(self) -> str:
        """Say it."""
        return f"listen at {WORKER_SERVICE_PATH} and hand the socket to the orchestrator"

    def apply(self) -> dict[str, int]:
        """Do it."""
        path = NEW_ROOT + WORKER_SERVICE_PATH
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(path)
        listener.listen(BACKLOG)
        return {"worker_service": listener.detach()}


@dataclass(frozen=True, slots=True)
class OpenProxy:
    """A port on the loopback of the worker's own network namespace, which has nothing but that."""

    def describe(self) -> str:
        """Say it."""
        host, port = PROXY_ADDRESS
        return (
            f"listen at {host}:{port}, in the worker's own network, and hand the socket to the orchestrator"
        )

    def apply(self) -> dict[str, int]:
        """Do it."""
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.bind(PROXY_ADDRESS)
        listener.listen(BACKLOG)
        return {"proxy": listener.detach()}


@dataclass(frozen=True, slots=True)
class HandOverNetwork:
    """The worker's network namespace itself, for whoever connects it to the world."""

    def describe(self) -> str:
        """Say it."""
        return "hand the worker's network namespace to the orchestrator, to be connected"

    def apply(self) -> dict[str, int]:
        """Do it."""
        return {"network": os.open(f"{HOST_PROC}/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)}
