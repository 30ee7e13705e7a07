"""Landlock: the file hierarchy, TCP and scopes, decided a second time by another part of the kernel.

Rights and scopes grow with the ABI; https://docs.kernel.org/userspace-api/landlock.html.
Everything that the running kernel can handle is handled, never a lesser set, up to
ABI 8. The right of ABI 9, to reach a socket by its name, is not asked for yet: a
worker's own doors need rules for it, which want a kernel to be tried on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache

from hayflick_sandbox import syscalls

EXECUTE = 1 << 0
WRITE_FILE = 1 << 1
READ_FILE = 1 << 2
READ_DIR = 1 << 3
REMOVE_DIR = 1 << 4
REMOVE_FILE = 1 << 5
MAKE_CHAR = 1 << 6
MAKE_DIR = 1 << 7
MAKE_REG = 1 << 8
MAKE_SOCK = 1 << 9
MAKE_FIFO = 1 << 10
MAKE_BLOCK = 1 << 11
MAKE_SYM = 1 << 12
REFER = 1 << 13  # ABI 2
TRUNCATE = 1 << 14  # ABI 3
IOCTL_DEV = 1 << 15  # ABI 5

BIND_TCP = 1 << 0  # ABI 4
CONNECT_TCP = 1 << 1

SCOPE_ABSTRACT_UNIX_SOCKET = 1 << 0  # ABI 6
SCOPE_SIGNAL = 1 << 1

READ = EXECUTE | READ_FILE | READ_DIR
DEVICE = READ_FILE | WRITE_FILE | READ_DIR | TRUNCATE | IOCTL_DEV
FILE_ONLY = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
WRITE = (
    *(WRITE_FILE, REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG, MAKE_SOCK, MAKE_FIFO, MAKE_SYM),
    *(REFER, TRUNCATE),
)
READ_WRITE = READ | sum(WRITE)

# What an ABI added to what the sandbox asks for.
FEATURES = {
    2: "moves between directories",
    3: "truncation",
    4: "TCP",
    5: "device ioctls",
    6: "scopes for signals and abstract sockets",
}

# Size of struct landlock_ruleset_attr by ABI: fs, then net, then scoped.
_SIZES = {1: 8, 2: 8, 3: 8, 4: 16, 5: 16}
_LAST_SIZE = 24


@cache
def abi() -> int:
    """Return the kernel's Landlock ABI, or 0 where there is none."""
    try:
        return syscalls.landlock_abi()
    except OSError:
        return 0


def handled(version: int) -> tuple[int, int, int]:
    """Return all rights on files, on TCP, and all scopes that ABI *version* can handle."""
    files = (1 << 13) - 1
    files |= (REFER if version >= 2 else 0) | (TRUNCATE if version >= 3 else 0)
    files |= IOCTL_DEV if version >= 5 else 0
    tcp = BIND_TCP | CONNECT_TCP if version >= 4 else 0
    scopes = SCOPE_ABSTRACT_UNIX_SOCKET | SCOPE_SIGNAL if version >= 6 else 0
    return files, tcp, scopes


def restrict(paths: Mapping[str, int], *, tcp: bool, connect_port: int | None = None) -> None:
    """Confine this process: only *paths*, with the rights given, and TCP only with *tcp*.

    Without it, connections to *connect_port* may be made all the same.

    Raises:
        OSError: the kernel has no Landlock, or refused a rule.
    """
    version = abi()
    files, net, scopes = handled(version)
    ruleset = syscalls.landlock_create_ruleset(
        files, 0 if tcp else net, scopes, size=_SIZES.get(version, _LAST_SIZE)
    )
    try:
        for path, rights in paths.items():
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                syscalls.landlock_add_rule(ruleset, descriptor, rights & files)
            finally:
                os.close(descriptor)
        if net and not tcp and connect_port is not None:
            syscalls.landlock_add_port_rule(ruleset, connect_port, CONNECT_TCP)
        syscalls.landlock_restrict_self(ruleset)
    finally:
        os.close(ruleset)
