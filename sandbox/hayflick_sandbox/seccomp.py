"""The system call policy, from a file that people can read to BPF that the kernel runs.

Two filters are stacked, because the kernel takes the stricter answer of all:

* the *allowances* let listed calls pass and answer ENOSYS to all others;
* the *refusals*, installed after it, answer EPERM by name and by argument.

libseccomp alone cannot say "this call, but not with that argument" and leave
another error for the rest; two filters can. Where both give an errno, the
kernel reports that of the filter installed last (seccomp(2)). A foreign
architecture, and the x32 numbers of our own, end the process.
"""

from __future__ import annotations

import errno
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyseccomp

from hayflick_sandbox import syscalls

AF_UNIX, AF_INET, AF_INET6 = 1, 2, 10
# The default of the socket's type, TCP and UDP.
INET_PROTOCOLS = frozenset({0, 6, 17})
_LOW_32 = 0xFFFFFFFF
_EPERM = pyseccomp.ERRNO(errno.EPERM)

# linux/prctl.h, linux/seccomp.h, asm-generic/ioctls.h, linux/tiocl.h
PR_SET_SECUREBITS, PR_SET_MM = 28, 35
SECCOMP_FILTER_FLAG_NEW_LISTENER = 1 << 3
TIOCSTI, TIOCLINUX, TIOCCONS = 0x5412, 0x541C, 0x541D
RLIMIT_CORE = 4

NAMESPACE_FLAGS = (
    syscalls.CLONE_NEWNS,
    syscalls.CLONE_NEWCGROUP,
    syscalls.CLONE_NEWUTS,
    syscalls.CLONE_NEWIPC,
    syscalls.CLONE_NEWUSER,
    syscalls.CLONE_NEWPID,
    syscalls.CLONE_NEWNET,
)


@dataclass(frozen=True, slots=True)
class Group:
    """Calls that are treated alike, and why."""

    name: str
    reason: str
    calls: tuple[str, ...]


def document() -> dict[str, Any]:
    """Return the policy file as it stands."""
    # Not importlib.resources: it brings tempfile, zipfile and their kin into the zygote.
    with open(os.path.join(os.path.dirname(__file__), "seccomp.toml"), "rb") as file:
        return tomllib.load(file)


def groups(policy: Mapping[str, Any]) -> Iterator[Group]:
    """Yield the groups of *policy* that are allowed."""
    for name, group in policy["allow"].items():
        yield Group(name, group["reason"], tuple(group["calls"]))


def compile_filters(*, inet: bool) -> tuple[bytes, bytes]:
    """Return the two compiled filters, in the order to install them.

    Args:
        inet: Whether AF_INET and AF_INET6 sockets may be made.

    Raises:
        OSError: libseccomp refused a rule.
    """
    policy = document()
    return _export(_allowances(policy)), _export(_refusals(policy, inet=inet))


def _allowances(policy: Mapping[str, Any]) -> pyseccomp.SyscallFilter:
    rules = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.ENOSYS))
    for group in groups(policy):
        for name in group.calls:
            _add(rules, pyseccomp.ALLOW, name)
    _add(rules, pyseccomp.ALLOW, "socket")
    for name, values in policy["allow_values"].items():
        for value in values:
            _add(rules, pyseccomp.ALLOW, name, pyseccomp.Arg(0, pyseccomp.EQ, value))
    return rules


def _refusals(policy: Mapping[str, Any], *, inet: bool) -> pyseccomp.SyscallFilter:
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    for names in policy["refuse"].values():
        for name in names:
            _add(rules, _EPERM, name)
    for flag in NAMESPACE_FLAGS:
        _add(rules, _EPERM, "clone", _has_bits(0, flag, flag))
    _refuse_others(
        rules, "socket", 0, {AF_UNIX, AF_INET, AF_INET6} if inet else {AF_UNIX}, errno.EAFNOSUPPORT
    )
    if inet:
        # SCTP, MPTCP and their kin would have the kernel load modules for a worker.
        for family in (AF_INET, AF_INET6):
            licensed = pyseccomp.Arg(0, pyseccomp.EQ, family)
            _refuse_others(rules, "socket", 2, INET_PROTOCOLS, errno.EPROTONOSUPPORT, licensed)
    _refuse_others(rules, "socketpair", 0, {AF_UNIX}, errno.EAFNOSUPPORT)
    for request in (TIOCSTI, TIOCLINUX, TIOCCONS):
        # The kernel reads 32 bits of the request; so must we (CVE-2019-10063).
        _add(rules, _EPERM, "ioctl", _has_bits(1, _LOW_32, request))
    for option in (PR_SET_SECUREBITS, PR_SET_MM):
        _add(rules, _EPERM, "prctl", _has_bits(0, _LOW_32, option))
    listener = SECCOMP_FILTER_FLAG_NEW_LISTENER
    _add(rules, _EPERM, "seccomp", _has_bits(1, listener, listener))
    # Another process's limits, and the one that keeps core dumps off the host.
    something = pyseccomp.Arg(2, pyseccomp.NE, 0)
    _add(rules, _EPERM, "prlimit64", pyseccomp.Arg(0, pyseccomp.NE, 0), something)
    _add(rules, _EPERM, "prlimit64", _has_bits(1, _LOW_32, RLIMIT_CORE), something)
    _add(rules, _EPERM, "setrlimit", _has_bits(0, _LOW_32, RLIMIT_CORE))
    return rules


def _refuse_others(
    rules: pyseccomp.SyscallFilter,
    call: str,
    argument: int,
    allowed: frozenset[int] | set[int],
    number: int,
    *conditions: pyseccomp.Arg,
) -> None:
    """Answer errno *number* to every value of *argument* but *allowed*: the gaps, then all above.

    The comparison is over 64 bits while the kernel reads 32, so a value with high
    bits set falls in the last range and is refused.
    """
    refuse = pyseccomp.ERRNO(number)
    ordered = sorted(allowed)
    for value in range(ordered[-1]):
        if value not in allowed:
            _add(rules, refuse, call, *conditions, pyseccomp.Arg(argument, pyseccomp.EQ, value))
    _add(rules, refuse, call, *conditions, pyseccomp.Arg(argument, pyseccomp.GT, ordered[-1]))


def _has_bits(argument: int, mask: int, value: int) -> pyseccomp.Arg:
    return pyseccomp.Arg(argument, pyseccomp.MASKED_EQ, mask, value)


def _add(rules: pyseccomp.SyscallFilter, action: int, name: str, *arguments: pyseccomp.Arg) -> None:
    """Add a rule for *name*, unless this architecture never had that call."""
    try:
        number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
    except ValueError:
        return
    if number < 0:
        return  # libseccomp knows the name, this architecture does not have the call
    rules.add_rule(action, number, *arguments)


def _export(rules: pyseccomp.SyscallFilter) -> bytes:
    # A binary tree instead of a list (libseccomp 2.5): the kernel walks the
    # program once for every call number when it is installed, and so do calls.
    rules.set_attr(pyseccomp.Attr.CTL_OPTIMIZE, 2)
    # By default libseccomp ends only the thread that tried.
    rules.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.KILL_PROCESS)
    descriptor = os.memfd_create("seccomp-bpf")
    with os.fdopen(descriptor, "rb") as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()
