"""An orchestrator whose zygote, limits and kills a test can weaken: ``python orchestrator.py DIRECTORY …``.

Test code alone: production has no switch for any of it. ``zygote.py`` beside it
tells what the words mean and what always stays.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from hayflick_sandbox import cgroups, zygote_client

DIRECTORY = Path(sys.argv[1])
ZYGOTE = Path(__file__).with_name("zygote.py")


def keep(self: socket.socket, size: int, flags: int = 0) -> bytes:
    """Receive, and take and keep the descriptors that come along."""
    ancillary = socket.CMSG_SPACE(64) if "keep-sent-descriptors" in words() else 0
    return self.recvmsg(size, ancillary, flags)[0]


def words() -> frozenset[str]:
    """Return the words in force."""
    return frozenset(json.loads((DIRECTORY / "weakening.json").read_text()))


def weaken() -> None:
    """Weaken this process."""
    zygote_client.COMMAND = (sys.executable, "-I", str(ZYGOTE), str(DIRECTORY))
    real_add, real_kill = cgroups.Tree.add, cgroups.Tree.kill
    real_start = zygote_client.Zygote.start
    real_signal = signal.pidfd_send_signal

    def add(self: cgroups.Tree, path: str, limits: Any = None, *rest: Any, **more: Any) -> None:
        if limits is not None and "loose-limits" in words():
            limits = dataclasses.replace(
                limits,
                memory_bytes=limits.memory_bytes * 8,
                pids=limits.pids * 8,
                cpu_millis=min(limits.cpu_millis * 20, 1_024_000),
            )
        real_add(self, path, limits, *rest, **more)

    def kill(self: cgroups.Tree, path: str) -> bool:
        now = words()
        if "polite-kill" in now:
            return True
        return False if "no-tree-kill" in now else real_kill(self, path)

    def send(descriptor: int, number: int, *rest: Any) -> None:
        if number == signal.SIGKILL and "polite-kill" in words():
            number = signal.SIGTERM
        real_signal(descriptor, number, *rest)

    def start(**options: Any) -> zygote_client.Zygote:
        zygote = real_start(**options)
        # Only now may anything be imported that imports gRPC.
        from hayflick_orchestrator import attestation, launcher
        from hayflick_orchestrator.calls import WorkerCalls

        # The node would find its own holes, and start nobody in them.
        attestation.require = launcher.require = lambda *_: None  # type: ignore[assignment]

        real_descendant = WorkerCalls._descendant

        def descendant(self: WorkerCalls, caller: Any, worker_id: str) -> Any:
            if "anybody-is-a-descendant" in words():
                return self._population.get(worker_id)
            return real_descendant(self, caller, worker_id)

        WorkerCalls._descendant = descendant  # type: ignore[method-assign]
        return zygote

    zygote_client.Zygote.start = start  # type: ignore[method-assign,assignment]
    socket.socket.recv = keep  # type: ignore[method-assign,assignment]
    cgroups.Tree.add = add  # type: ignore[method-assign]
    cgroups.Tree.kill = kill  # type: ignore[method-assign]
    signal.pidfd_send_signal = send


if __name__ == "__main__":
    from hayflick_orchestrator.__main__ import main

    weaken()
    sys.exit(main(sys.argv[2:]))
