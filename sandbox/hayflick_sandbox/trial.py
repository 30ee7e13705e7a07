"""Namespaces, tried in a child that ends at once: entered, mapped, and mounted in.

Each of these can fail where the one before it did not. AppArmor lets a process
have its user namespace and takes the capabilities away; an engine's masks over
``/proc`` let everything pass but a fresh ``/proc``.
"""

from __future__ import annotations

import errno
import os
import struct

from hayflick_sandbox import syscalls
from hayflick_sandbox.refusals import Outcome
from hayflick_sandbox.subordinate import Grant, Ids, MapFailed, blocks, write_maps

NAMESPACES = (
    syscalls.CLONE_NEWUSER
    | syscalls.CLONE_NEWNS
    | syscalls.CLONE_NEWPID
    | syscalls.CLONE_NEWNET
    | syscalls.CLONE_NEWIPC
    | syscalls.CLONE_NEWUTS
    | syscalls.CLONE_NEWCGROUP
)
STEPS = ("privilege", "unshare", "map", "groups", "mount", "proc")
_WORD = struct.Struct("ii")
_PLACE = "/tmp"


def attempt(grant: Grant | None) -> Outcome:
    """Try namespaces as the zygote and its children use them.

    The caller must be single-threaded: it forks.

    Args:
        grant: The subordinate ids to map, or ``None`` to map this user alone.
    """
    reports, report = os.pipe2(os.O_CLOEXEC)
    go, let_go = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            os.close(let_go)
            _inside(report, go, own=None if grant else (os.getuid(), os.getgid()))
        finally:
            os._exit(0)
    os.close(report)
    os.close(go)
    try:
        outcome = _hear(reports)
        if outcome.step == "map" and not outcome.errno and grant is not None:
            # The highest block, as good as any: what is tried is whether maps can be written.
            uid, gid = blocks(grant)[0]
            try:
                write_maps(pid, grant, Ids(uid, 1), Ids(gid, 1))
            except MapFailed as error:
                return Outcome("map", errno.EPERM, str(error))
            os.write(let_go, b"1")
            outcome = _hear(reports)
        return outcome
    finally:
        os.close(reports)
        os.close(let_go)  # a child that waits for its map ends without one
        os.waitpid(pid, 0)


def _hear(reports: int) -> Outcome:
    packet = os.read(reports, _WORD.size)
    if len(packet) < _WORD.size:
        # It ended without a word: killed, as some seccomp profiles do.
        return Outcome("unshare", errno.EPERM)
    index, number = _WORD.unpack(packet)
    return Outcome(STEPS[index] if index >= 0 else "", number)


def _inside(report: int, go: int, *, own: tuple[int, int] | None) -> None:
    step = "privilege"
    try:
        if os.geteuid() == 0:
            # Root's zygote builds its template in the user namespace that it is in.
            syscalls.unshare(syscalls.CLONE_NEWNS)
        step = "unshare"
        syscalls.unshare(NAMESPACES)
        step = "map"
        if own is None:
            os.write(report, _WORD.pack(STEPS.index("map"), 0))
            if os.read(go, 1) != b"1":
                return
            step = "groups"
            os.setgroups([])
        else:
            _write("/proc/self/setgroups", "deny")
            _write("/proc/self/uid_map", f"0 {own[0]} 1")
            _write("/proc/self/gid_map", f"0 {own[1]} 1")
        step = "mount"
        syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        syscalls.mount("hayflick-trial", _PLACE, "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, "size=64k")
        step = "proc"
        os.mkdir(f"{_PLACE}/proc")
        number = _fresh_proc(f"{_PLACE}/proc")
        os.write(report, _WORD.pack(STEPS.index("proc") if number else -1, number))
    except OSError as error:
        os.write(report, _WORD.pack(STEPS.index(step), error.errno or errno.EIO))


def _fresh_proc(target: str) -> int:
    """Mount ``/proc`` as process 1 of the new pid namespace; return the errno, 0 for none."""
    pid = os.fork()
    if pid == 0:
        number = errno.EIO
        try:
            flags = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
            syscalls.mount("proc", target, "proc", flags, "subset=pid")
            number = 0
        except OSError as error:
            number = error.errno or errno.EIO
        finally:
            os._exit(number)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)
