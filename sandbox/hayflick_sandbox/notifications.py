"""Seccomp's listener: what a filter sends to its supervisor, and the answer.

Structures and requests are linux/seccomp.h's; seccomp_unotify(2). The kernel may
make the structures larger than they are here, so it is asked for their sizes.
The caller's memory is never read: it could change between the look and the
answer, and an answer is always a refusal, so there is nothing to look for.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from dataclasses import dataclass
from functools import cache

import prctl

from hayflick_sandbox import syscalls

# id, pid, flags; then struct seccomp_data: number, architecture, instruction pointer, arguments.
_NOTIFICATION = struct.Struct("=QIIiIQ6Q")
# id, value, error, flags. The flag that would let the call go on is never set.
_RESPONSE = struct.Struct("=Qqii")
_MAGIC = ord("!")
_READ_WRITE = 3


@dataclass(frozen=True, slots=True)
class Notification:
    """One system call that waits for its answer.

    Attributes:
        id: The kernel's, for the answer.
        number: Of the call, on this architecture.
        arguments: All six, as the registers held them.
    """

    id: int
    number: int
    arguments: tuple[int, ...]


@cache
def _sizes() -> tuple[int, int]:
    theirs, response, _ = syscalls.seccomp_get_notif_sizes()
    return max(theirs, _NOTIFICATION.size), max(response, _RESPONSE.size)


def _request(number: int, size: int) -> int:
    # asm-generic/ioctl.h, which x86-64 and 64-bit Arm share.
    return _READ_WRITE << 30 | size << 16 | _MAGIC << 8 | number


def receive(listener: int) -> Notification | None:
    """Return the next call that waits; ``None`` when it was interrupted or killed meanwhile.

    Blocks unless the listener was seen to be readable: then there is a call, or
    the kernel remembers that there was one.

    Raises:
        OSError: *listener* is no listener.
    """
    buffer = bytearray(_sizes()[0])  # the kernel wants it zeroed
    try:
        fcntl.ioctl(listener, _request(0, _NOTIFICATION.size), buffer, True)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINTR):
            return None
        raise
    identity, _, _, number, _, _, *arguments = _NOTIFICATION.unpack_from(buffer)
    return Notification(identity, number, tuple(arguments))


def refuse(listener: int, notification: Notification, number: int) -> bool:
    """Answer a call with errno *number*; return whether its caller was still there.

    Raises:
        OSError: *listener* is no listener.
    """
    buffer = bytearray(_sizes()[1])
    _RESPONSE.pack_into(buffer, 0, notification.id, 0, -number, 0)
    try:
        fcntl.ioctl(listener, _request(1, _RESPONSE.size), buffer, True)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINPROGRESS):
            return False
        raise
    return True


def try_listener() -> int:
    """Return 0 when this kernel gives a process like this one a listener, or why not: an errno.

    Tried in a child that ends at once; call it from a single-threaded process.
    """
    pid = os.fork()
    if pid == 0:
        status = 255
        try:
            prctl.set_no_new_privs(1)
            syscalls.seccomp_set_mode_filter(_ALLOW_ALL, listener=True)
            _sizes()
            status = 0
        except OSError as error:
            status = error.errno or 255
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


# One instruction, BPF_RET | BPF_K: SECCOMP_RET_ALLOW (linux/filter.h).
_ALLOW_ALL = struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000)
