"""``python -m hayflick_orchestrator``: the zygote first, then gRPC.

A process with threads cannot be forked safely, and gRPC starts threads, so the
one process that forks is started before gRPC is even imported. Nothing above
:func:`main` may import it, directly or not; a test holds us to that.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import resource
import signal
import sys
import time
from typing import TYPE_CHECKING

from hayflick_orchestrator.config import Config
from hayflick_rpc.config import load
from hayflick_sandbox.cgroups import Tree
from hayflick_sandbox.doctor import try_launch
from hayflick_sandbox.identities import IdentitiesExhausted, UidRange, claim_range, parse_range
from hayflick_sandbox.probe import GRADED, INDISPENSABLE, Layer, LimitNotEnforceable, probe, require
from hayflick_sandbox.zygote_client import Zygote, ZygoteDied

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# What a predecessor left dies at once; its control groups may stay busy a moment.
RECLAIM_SECONDS = 5.0
POLL_SECONDS = 0.01


def main(argv: Sequence[str] | None = None) -> int:
    """Run one node's orchestrator; return its exit status."""
    # Read by gRPC when it is imported: we never fork, so its handlers only cost.
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    config = load(Config, argv, prog="hayflick_orchestrator", env_prefix="HAYFLICK_ORCHESTRATOR_")
    _raise_descriptor_limit()
    with contextlib.ExitStack() as undo:
        try:
            tree, lock = claim(config.node_id)
            undo.callback(_give_back, tree, lock)
            layers = probe(tree)
            absent = [layer.name for layer in layers if not layer.enforced]
            judge(layers, config.allow_degraded)  # before anything is started: a wrong name is an error
            within = parse_range(config.uid_range) if config.uid_range else None
            uids = claim_range(subordinate="uid-range" not in absent, within=within)
            undo.callback(uids.close)
            # Started without what is missing, so that GetNode can tell what that
            # is; the host launches nothing for as long as anything is.
            zygote = start_zygote(tree, uids, layers)
            undo.callback(zygote.wait_closed)
            undo.callback(zygote.close)
            layers = (*layers, try_launch(zygote, tree, uids, layers=layers))
            missing, degraded = judge(layers, config.allow_degraded)
        except (OSError, ValueError, ZygoteDied, IdentitiesExhausted) as error:
            print(f"hayflick_orchestrator: cannot start: {error}", file=sys.stderr)
            return 1
        undo.pop_all()  # from here on the zygote removes the groups, however this process ends

    from hayflick_orchestrator.app import Orchestrator  # imports gRPC: only now
    from hayflick_rpc.server import set_up_logging

    set_up_logging("hayflick_orchestrator")

    async def run() -> int:
        orchestrator = Orchestrator(
            config, zygote, tree, uids, layers=layers, missing=missing, degraded=degraded
        )
        return await orchestrator.run()

    try:
        return asyncio.run(run())
    except OSError as error:
        print(f"hayflick_orchestrator: {error}", file=sys.stderr)
        return 1
    finally:
        zygote.close()
        zygote.wait_closed()
        if lock is not None:
            os.close(lock)


def start_zygote(tree: Tree, uids: UidRange, layers: Sequence[Layer]) -> Zygote:
    """Start the node's zygote without the layers that are missing.

    Raises:
        ZygoteDied: it could not start; the text has the layer that is why, and its
            remedy, where one of those without which there is no sandbox is missing.
    """
    absent = [layer for layer in layers if not layer.enforced]
    try:
        return Zygote.start(tree=tree, uids=uids, degraded=[layer.name for layer in absent])
    except ZygoteDied as error:
        for layer in absent:
            if layer.name in INDISPENSABLE:
                raise ZygoteDied(f"{error}\n{layer.name}: {layer.detail}\n→ {layer.remedy}") from None
        raise


def claim(node_id: str) -> tuple[Tree, int | None]:
    """Return the control groups of this node, empty and this process's alone, and what locks them.

    A predecessor whose zygote was killed together with it leaves its groups
    behind, perhaps with processes in them: nobody would ever stop those, so
    they are killed here.

    Raises:
        OSError: EBUSY when another orchestrator of this name runs on this
            machine, or what a predecessor left cannot be killed.
    """
    tree = Tree.create(node_id)
    root = next(iter(tree.roots.values()), None)
    if root is None:
        return tree, None
    lock = _lock(root)
    deadline = time.monotonic() + RECLAIM_SECONDS
    for left in _left_behind(tree):
        if not tree.kill(left):
            for pid in tree.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        while True:
            try:
                tree.remove(left)
            except OSError as error:
                if error.errno not in (errno.EBUSY, errno.ENOTEMPTY) or time.monotonic() > deadline:
                    raise
                time.sleep(POLL_SECONDS)
            else:
                break
    return tree, lock


def _give_back(tree: Tree, lock: int | None) -> None:
    """Remove the groups of a node that did not start, then let go of its name."""
    # A group that is still busy stays for the next orchestrator of this name;
    # the reason for the failed start must be heard all the same.
    with contextlib.suppress(OSError):
        tree.close()
    if lock is not None:
        os.close(lock)


def _lock(root: Path) -> int:
    # The lock is on the directory itself, so it is there exactly where the
    # groups are, for whoever shares them, and it ends with its holder.
    lock = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise OSError(f"another orchestrator on this machine holds the node name {root.name}") from None
    return lock


def _left_behind(tree: Tree) -> list[str]:
    return sorted({entry.name for root in tree.roots.values() for entry in root.iterdir() if entry.is_dir()})


def judge(
    layers: Sequence[Layer], allow_degraded: Sequence[str]
) -> tuple[tuple[Layer, ...], tuple[str, ...]]:
    """Return the layers without which nothing may be launched, and those let go by name.

    Raises:
        ValueError: *allow_degraded* names no layer, or one that cannot be let go.
    """
    try:
        return (), require(layers, allow_degraded)
    except LimitNotEnforceable:
        # The service starts all the same, so that GetNode can tell what is missing.
        absent = [layer for layer in layers if not layer.enforced]
        return (
            tuple(layer for layer in absent if layer.name not in {*allow_degraded, *GRADED}),
            tuple(layer.name for layer in absent if layer.name in {*allow_degraded, *GRADED}),
        )


def _raise_descriptor_limit() -> None:
    # Three descriptors a worker, four a task: the usual soft limit of 1,024 is
    # for programs that use select(2).
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    sys.exit(main())
