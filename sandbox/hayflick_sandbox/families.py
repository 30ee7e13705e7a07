"""Which processes a task left, by a mark that none of them can take off.

A process can leave its parent, its group and its session, but not its resource
limits: those go with every fork and exec, and without a capability a hard
limit can only be lowered. So each task gets a serial number and carries it in
two limits that mean nothing to the kernel any more: one holds the serial, the
other a constant less the serial. A process that lowers either can only widen
the range of serials that it may have begun with; it cannot leave its own.
"""

from __future__ import annotations

import os
import resource
import signal

# asm-generic/resource.h; the resource module does not name them. File locks are
# not counted since Linux 2.6 (getrlimit(2)); real-time CPU time is counted for
# real-time schedulers alone, which RLIMIT_RTPRIO=0 refuses to workers.
RLIMIT_LOCKS, RLIMIT_RTTIME = 10, 15
_HARD = 1


def _own_total() -> int:
    hard = resource.getrlimit(RLIMIT_RTTIME)[_HARD]
    return 1 << 40 if hard == resource.RLIM_INFINITY else hard


# What both limits of a process that touched neither add up to.
TOTAL = _own_total()
# A pass can miss one process, where process numbers begin anew. Not two in a row.
CALM_PASSES = 2


def mark(serial: int) -> None:
    """Give this process, and all it will ever fork, to the task *serial*.

    Raises:
        ValueError: the limits that the orchestrator was started with leave no room.
    """
    resource.setrlimit(RLIMIT_LOCKS, (serial, serial))
    resource.setrlimit(RLIMIT_RTTIME, (TOTAL - serial, TOTAL - serial))


def may_belong(serial: int, locks: int, rttime: int) -> bool:
    """Return whether a process with these hard limits can have begun as one of the task *serial*."""
    if resource.RLIM_INFINITY in (locks, rttime):
        return False  # never marked: init
    return locks <= serial <= TOTAL - rttime


def members(serial: int) -> set[int]:
    """Return every process that can be of the task *serial*, the unreaped dead included."""
    own = os.getpid()
    found = set()
    for name in os.listdir("/proc"):
        if not name.isdigit() or (pid := int(name)) == own:
            continue
        try:
            locks = resource.prlimit(pid, RLIMIT_LOCKS)[_HARD]
            rttime = resource.prlimit(pid, RLIMIT_RTTIME)[_HARD]
        except ProcessLookupError:
            continue  # reaped meanwhile
        if may_belong(serial, locks, rttime):
            found.add(pid)
    return found


def send(pids: set[int], number: int) -> None:
    """Send a signal to each of *pids* that still is."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def kill(serial: int) -> None:
    """Kill every process of the task *serial*; when this returns, none can fork any more.

    The caller must be their init, and reap nobody meanwhile. Then whoever dies
    keeps its number and its place under the pids limit, so a family that forks
    as fast as it is killed runs out of places; and a pass that finds nobody new
    has seen all, because new numbers lie ahead of where /proc is being read.
    """
    seen: set[int] = set()
    calm = 0
    while calm < CALM_PASSES:
        found = members(serial)
        send(found, signal.SIGKILL)
        calm = 0 if found - seen else calm + 1
        seen |= found
