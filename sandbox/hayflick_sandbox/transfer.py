"""A file into or out of the workspace, by a process of the worker's own confinement.

Whatever link, pipe or device a worker plants, it is this process that meets it:
it sees what the worker sees and may do what the worker may. It runs no user
code, nobody in the sandbox can look into it, and it says how it fared by its
exit code, an errno, which only init passes on. A worker can give a file any
content, and it can kill this process; that is all.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
from typing import NoReturn

from hayflick_sandbox import syscalls, tasks
from hayflick_sandbox.messages import Transfer

WORKSPACE = "/workspace"
CHUNK_BYTES = 64 * 1024
# How many bytes were sent, as the sender's last word: big-endian.
COUNT_BYTES = 8
# Where tasks.arrange puts what came with the order.
DATA_FD, COUNT_FD = 1, 2

_BENEATH = (
    syscalls.RESOLVE_BENEATH
    | syscalls.RESOLVE_NO_SYMLINKS
    | syscalls.RESOLVE_NO_MAGICLINKS
    | syscalls.RESOLVE_NO_XDEV
)


def run(order: Transfer, descriptors: list[int], serial: int) -> NoReturn:
    """Carry out *order* in a process just forked from init. Never returns."""
    status = errno.EIO
    try:
        tasks.arrange(descriptors, serial, None)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_IGN)  # EPIPE and EFBIG say more
        root = os.open(WORKSPACE, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        if order.kind == "get":
            _get(root, order.path, order.max_bytes)
        else:
            _put(root, order.path, executable=order.executable, max_bytes=order.max_bytes)
        status = 0
    except OSError as error:
        status = error.errno or errno.EIO
    except MemoryError:
        status = errno.ENOMEM
    finally:
        os._exit(status)


def _get(root: int, path: str, max_bytes: int) -> None:
    # Not blocking, so that a pipe without a writer does not hold us.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
    file = syscalls.openat2(root, path, flags, _BENEATH)
    if _require_regular(os.fstat(file)).st_size > max_bytes:
        raise OSError(errno.EFBIG, "the file is too large")
    left = max_bytes
    while data := os.read(file, CHUNK_BYTES):
        left -= len(data)
        if left < 0:
            raise OSError(errno.EFBIG, "the file grew too large")
        _write(DATA_FD, data)


def _put(root: int, path: str, *, executable: bool, max_bytes: int) -> None:
    *parents, name = path.split("/")
    directory = root
    for parent in parents:
        directory = _enter(directory, parent)
    _require_replaceable(directory, name)
    # Without a name until it is whole: there is nothing to clear away, whenever we end.
    mode = 0o700 if executable else 0o600
    file = os.open(".", os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, mode, dir_fd=directory)
    count = 0
    while data := os.read(DATA_FD, CHUNK_BYTES):
        count += len(data)
        if count > max_bytes:
            raise OSError(errno.EFBIG, "the file is too large")
        _write(file, data)
    # An end of the data without this word is a sender that broke off.
    if os.read(COUNT_FD, COUNT_BYTES) != count.to_bytes(COUNT_BYTES, "big"):
        raise OSError(errno.ECANCELED, "the sender broke off")
    _name(file, directory, name)


def _enter(directory: int, name: str) -> int:
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
    try:
        return syscalls.openat2(directory, name, flags, _BENEATH)
    except FileNotFoundError:
        os.mkdir(name, 0o700, dir_fd=directory)
    return syscalls.openat2(directory, name, flags, _BENEATH)


def _require_replaceable(directory: int, name: str) -> None:
    try:
        _require_regular(os.lstat(name, dir_fd=directory))
    except FileNotFoundError:
        return


def _require_regular(info: os.stat_result) -> os.stat_result:
    if stat.S_ISLNK(info.st_mode):
        raise OSError(errno.ELOOP, "a link")
    if stat.S_ISDIR(info.st_mode):
        raise OSError(errno.EISDIR, "a directory")
    if not stat.S_ISREG(info.st_mode):
        raise OSError(errno.ENXIO, "a pipe, a socket or a device")
    return info


def _name(file: int, directory: int, name: str) -> None:
    """Give the nameless *file* its name at once, in place of what had it."""
    source = f"/proc/self/fd/{file}"
    try:
        os.link(source, name, dst_dir_fd=directory, follow_symlinks=True)
    except FileExistsError:
        # A link cannot replace, but a rename can. It replaces the name itself,
        # whatever the worker made of it meanwhile.
        passing = f".hayflick-{os.urandom(8).hex()}"
        os.link(source, passing, dst_dir_fd=directory, follow_symlinks=True)
        try:
            os.rename(passing, name, src_dir_fd=directory, dst_dir_fd=directory)
        except OSError:
            os.unlink(passing, dir_fd=directory)
            raise


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
