"""Mounts that map no owner: what is shown by one is read as others may read it, and written by nobody.

A read-only mount refuses to write files, but neither to connect to a socket that
lies there nor to open a pipe for writing: both change nothing on disk. What refuses
them is that the kernel writes to no inode whose owner the mount does not map
(fs/namei.c, inode_permission, HAS_UNMAPPED_ID), and it asks that of a connect(2) too
(net/unix/af_unix.c, unix_find_bsd). So what workers are shown is mounted with a map
of one user id that owns no file. Nobody owns anything there, whatever the mode says.

It takes CAP_SYS_ADMIN where the file system was mounted, so an ordinary user has none
of it, and a file system that can be mounted so: mount_setattr(2), "ID-mapped mounts".
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

from hayflick_sandbox import syscalls

# The kernel's highest but the last two, which stand for nobody (4294967294 in NFS) and for "no id".
UNUSED_ID = 0xFFFF_FFFD


def user_namespace() -> int:
    """Return a descriptor of a new user namespace that maps :data:`UNUSED_ID` to itself, and no other id.

    The caller must be single-threaded: it forks.

    Raises:
        OSError: the kernel gives no user namespace, or the caller may not map the id.
    """
    said, say = os.pipe2(os.O_CLOEXEC)
    wait, let_go = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            os.close(let_go)  # so that it ends with its parent
            number = 0
            try:
                syscalls.unshare(syscalls.CLONE_NEWUSER)
            except OSError as error:
                number = error.errno or errno.EIO
            os.write(say, bytes([number]))
            os.read(wait, 1)
        finally:
            os._exit(0)
    os.close(say)
    os.close(wait)
    try:
        answer = os.read(said, 1)
        if answer != b"\0":
            number = answer[0] if answer else errno.EPERM
            raise OSError(number, os.strerror(number), "unshare")
        for kind in ("uid", "gid"):
            descriptor = os.open(f"/proc/{pid}/{kind}_map", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(descriptor, f"{UNUSED_ID} {UNUSED_ID} 1".encode())
            finally:
                os.close(descriptor)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(said)
        os.close(let_go)
        os.waitpid(pid, 0)


def mapped(source: int, owner: int, attributes: int) -> int:
    """Return a descriptor of a mount of *source* and of all that is mounted below it, not yet attached.

    Args:
        source: A descriptor of a file or directory, of this mount namespace.
        owner: Of the user namespace whose map the mount shall have.
        attributes: ``MOUNT_ATTR_*`` beside the map.

    Raises:
        OSError: EINVAL when one of the file systems cannot be mounted so, EPERM when the caller may not.
    """
    tree = syscalls.open_tree(source, syscalls.OPEN_TREE_CLONE | syscalls.AT_RECURSIVE)
    try:
        syscalls.mount_setattr_of(tree, attributes | syscalls.MOUNT_ATTR_IDMAP, userns_fd=owner)
    except OSError:
        os.close(tree)
        raise
    return tree


def try_each(paths: Iterable[str]) -> tuple[str, int]:
    """Try to map *paths* as a template would, attaching nothing.

    The caller must be single-threaded: it forks.

    Returns:
        The first path that cannot be, and the kernel's errno; ``("", 0)`` when all can,
        and an errno with no path when none can.
    """
    try:
        owner = user_namespace()
    except OSError as error:
        return "", error.errno or errno.EIO
    try:
        for path in paths:
            source = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                os.close(mapped(source, owner, syscalls.MOUNT_ATTR_RDONLY))
            except OSError as error:
                return path, error.errno or errno.EIO
            finally:
                os.close(source)
    finally:
        os.close(owner)
    return "", 0


__all__ = ["UNUSED_ID", "mapped", "try_each", "user_namespace"]
