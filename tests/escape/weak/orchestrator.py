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
from typing import TYPE_CHECKING, Any

from hayflick_sandbox import cgroups, frames, zygote_client

if TYPE_CHECKING:
    from hayflick_sandbox.messages import Finding

DIRECTORY = Path(sys.argv[1])
ZYGOTE = Path(__file__).with_name("zygote.py")


def words() -> frozenset[str]:
    """Return the words in force."""
    return frozenset(json.loads((DIRECTORY / "weakening.json").read_text()))


def keep(self: socket.socket, size: int, flags: int = 0) -> bytes:
    """Receive, and take and keep the descriptors that come along."""
    ancillary = socket.CMSG_SPACE(64) if "keep-sent-descriptors" in words() else 0
    return self.recvmsg(size, ancillary, flags)[0]


def weaken_groups() -> None:
    """Give workers more than their limits say, and contracts more than their terms."""
    real_add, real_kill = cgroups.Tree.add, cgroups.Tree.kill
    real_hierarchies = cgroups.hierarchies

    def hierarchies(*arguments: Any) -> list[cgroups.Hierarchy]:
        found = real_hierarchies(*arguments)
        if "no-memory-groups" in words():
            found = [dataclasses.replace(one, controllers=one.controllers - {"memory"}) for one in found]
        return [one for one in found if one.version == 2 or one.controllers]

    def add(self: cgroups.Tree, path: str, limits: Any = None, bounds: Any = None) -> None:
        now = words()
        if limits is not None and "loose-limits" in now:
            limits = dataclasses.replace(
                limits,
                memory_bytes=limits.memory_bytes * 8,
                pids=limits.pids * 8,
                cpu_millis=min(limits.cpu_millis * 20, 1_024_000),
            )
        real_add(self, path, limits, None if "no-bounds" in now else bounds)

    def kill(self: cgroups.Tree, path: str) -> bool:
        now = words()
        if "polite-kill" in now:
            return True
        return False if "no-tree-kill" in now else real_kill(self, path)

    cgroups.hierarchies = hierarchies
    cgroups.Tree.add = add  # type: ignore[method-assign]
    cgroups.Tree.kill = kill  # type: ignore[method-assign]


def weaken_signals() -> None:
    """Ask where the real one kills."""
    real = signal.pidfd_send_signal

    def send(descriptor: int, number: int, *rest: Any) -> None:
        if number == signal.SIGKILL and "polite-kill" in words():
            number = signal.SIGTERM
        real(descriptor, number, *rest)

    signal.pidfd_send_signal = send


def weaken_services() -> None:
    """Say that each sandbox holds, believe a worker about whom it may touch, and let it print without end."""
    from hayflick_orchestrator import egress_client
    from hayflick_orchestrator.calls import WorkerCalls
    from hayflick_orchestrator.host import Host
    from hayflick_orchestrator.launcher import Launcher
    from hayflick_orchestrator.tasks import TaskRun

    real_examine = Host._examine

    def examine(self: Host, *arguments: Any) -> tuple[Finding, ...]:
        # The node would find its own holes, and controller and node would both end the worker.
        found = real_examine(self, *arguments)
        honest = not words() or "judged" in words()
        return found if honest else tuple(one._replace(held=True) for one in found)

    Host._examine = examine  # type: ignore[method-assign]
    real_descendant, real_run = WorkerCalls._descendant, TaskRun.__init__
    real_terms, real_narrower = egress_client._terms, Launcher._require_narrower

    def descendant(self: WorkerCalls, caller: Any, worker_id: str) -> Any:
        if "anybody-is-a-descendant" in words():
            return self._population.get(worker_id)
        return real_descendant(self, caller, worker_id)

    def run(self: TaskRun, *arguments: Any, **more: Any) -> None:
        real_run(self, *arguments, **more)
        if "no-output-limit" in words():
            self._output_left_bytes = None

    def terms(hosts: Any, limit_bytes: int) -> dict[str, Any]:
        if "proxy-lists-loopback" in words():
            hosts = [*hosts, *(f"127.0.0.1:{host.rpartition(':')[2]}" for host in hosts)]
        return real_terms(hosts, limit_bytes)

    def compare(self: Launcher, *arguments: Any) -> None:
        if "no-narrowing" not in words():
            real_narrower(self, *arguments)

    egress_client._terms = terms
    Launcher._require_narrower = compare  # type: ignore[method-assign]
    WorkerCalls._descendant = descendant  # type: ignore[method-assign]
    TaskRun.__init__ = run  # type: ignore[method-assign]


def weaken_budgets() -> None:
    """Spend what is spent already, and count nothing."""
    from hayflick_orchestrator import attempts, tripwires
    from hayflick_orchestrator.denials import Budget
    from hayflick_rpc import fields

    real_take, real_count = Budget.take, frames._require_few_values
    spent = {
        "tell-every-denial": tripwires.EVENTS_AT_ONCE,
        "refuse-without-pause": attempts.REFUSALS_AT_ONCE,
    }

    def take(self: Budget, now: float) -> bool:
        return real_take(self, now) or any(
            word in words() and self._most == most for word, most in spent.items()
        )

    def count(head: bytes) -> None:
        if "parse-anything" not in words():
            real_count(head)

    real_few = fields.has_few

    def few(*arguments: Any) -> bool:
        return "parse-anything" in words() or real_few(*arguments)

    fields.has_few = few
    Budget.take = take  # type: ignore[method-assign]
    frames._require_few_values = count


def blind() -> None:
    """Take sandboxes without a listener: without a filter there is none."""
    from hayflick_orchestrator.tripwires import Tripwires

    real = Tripwires.watch

    def watch(self: Tripwires, sandbox: Any) -> None:
        self._listening = False
        real(self, sandbox)

    Tripwires.watch = watch  # type: ignore[method-assign]


def weaken_zygote() -> None:
    """Start the weak one, and only then what imports gRPC."""
    zygote_client.COMMAND = (sys.executable, "-I", str(ZYGOTE), str(DIRECTORY))
    real = zygote_client.Zygote.start

    def start(**options: Any) -> zygote_client.Zygote:
        zygote = real(**options)
        weaken_services()
        weaken_budgets()
        blind()
        return zygote

    zygote_client.Zygote.start = start  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    from hayflick_orchestrator.__main__ import main

    socket.socket.recv = keep  # type: ignore[method-assign,assignment]
    weaken_groups()
    weaken_signals()
    weaken_zygote()
    sys.exit(main(sys.argv[2:]))
