"""Reads what the kernel holds a worker to: proc_pid_status(5), proc_pid_limits(5), proc_pid_net(5)."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from hayflick_orchestrator.narrowing import KernelFacts

if TYPE_CHECKING:
    from hayflick_sandbox.cgroups import Tree
    from hayflick_sandbox.policy import Policy

MAX_TEXT_BYTES = 16 * 1024
_CAPABILITIES = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
# The table is set in columns ("%-25s %-20s %-20s", fs/proc/base.c): a name, the soft and the hard limit.
_NAME, _HARD = slice(0, 26), slice(47, 67)


def read(tree: Tree, path: str, pid: int, pidfd: int, policy: Policy) -> KernelFacts:
    """Return the facts of the worker at *path*, whose init is *pid*.

    Args:
        tree: This node's control groups.
        path: Where the worker's are.
        pid: Of its init on this host.
        pidfd: The same process; proves that *pid* was not given to another meanwhile.
        policy: What its sandbox was built from, for what the kernel shows to nobody outside.

    Raises:
        OSError: it is gone.
    """
    status = _status(_text(f"/proc/{pid}/status"))
    usable = interfaces(_text(f"/proc/{pid}/net/dev"), _text(f"/proc/{pid}/net/fib_trie"))
    if policy.proxy and not policy.loopback:
        usable -= {"lo"}  # serves the door to the proxy alone, whose reach the controller compared
    facts = KernelFacts(
        cgroup=tree.limits(path),
        rlimits=rlimits(_text(f"/proc/{pid}/limits")),
        capabilities={name: int(status[name], 16) for name in _CAPABILITIES},
        no_new_privs=status["NoNewPrivs"] == "1",
        seccomp_mode=int(status["Seccomp"]),
        seccomp_filters=int(status["Seccomp_filters"]),
        interfaces=usable,
        licences=frozenset({"inet"} if policy.inet else ()),
        sizes={
            "workspace_bytes": policy.limits.workspace_bytes,
            "tmp_bytes": policy.limits.tmp_bytes,
            "cpu_time_seconds": policy.limits.cpu_time_seconds,
        },
    )
    signal.pidfd_send_signal(pidfd, 0)
    return facts


@functools.lru_cache(maxsize=256)  # workers are of few kinds
def rlimits(text: str) -> Mapping[str, int | None]:
    """Return the hard limits in the text of ``/proc/PID/limits``; ``None`` for unlimited."""
    rows = ((line[_NAME].rstrip(), line[_HARD].rstrip()) for line in text.splitlines()[1:])
    return MappingProxyType({name: None if hard == "unlimited" else int(hard) for name, hard in rows})


def interfaces(dev: str, fib_trie: str) -> frozenset[str]:
    """Return the interfaces in the text of ``/proc/PID/net/dev``, ``lo`` only when it is up.

    Args:
        dev: Two lines of headings, then one for each interface.
        fib_trie: Its routes; 127.0.0.1 is local there when the loopback is up.
    """
    names = {line.partition(":")[0].strip() for line in dev.splitlines()[2:]}
    if "127.0.0.1" not in fib_trie:
        names.discard("lo")
    return frozenset(names)


def _status(text: str) -> dict[str, str]:
    # What we ask for stands together, and at the end.
    return dict(line.split(":\t", 1) for line in text[text.index("CapInh") :].splitlines() if ":\t" in line)


def _text(path: str) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, MAX_TEXT_BYTES).decode()
    finally:
        os.close(descriptor)
