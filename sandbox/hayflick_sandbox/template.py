"""The root that every sandbox is cut from, built once by the zygote in a mount namespace of its own.

It holds what a worker may read, bound read-only, and nothing else of the host.
Each sandbox copies this small namespace instead of the host's whole mount
table, and because its user namespace is another one, the kernel locks what it
inherits: read-only stays read-only whatever happens inside
(mount_namespaces(7), "Restrictions on mount namespaces").
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hayflick_sandbox import idmaps, syscalls

WORKER_UID = 1_000
WORK = "/.hayflick"
NEW_ROOT = f"{WORK}/new"
HOST_PROC = f"{WORK}/proc"
# Any directory that exists does: our own mount namespace covers it, nobody else sees.
STAGE = "/tmp"

DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
DEVICE_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
}
# With usr-merge these are links into /usr; without, directories to bind.
USR_LINKS = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
ETC_BINDS = ("/etc/alternatives", "/etc/ssl/certs")
ETC_COPIES = ("/etc/ld.so.cache", "/etc/localtime", "/etc/ssl/openssl.cnf", "/etc/mime.types")
RESOLV_OUTSIDE = "resolv.outside.conf"
# A forwarder that whoever connects a worker to the world provides (RFC 2544's block: nobody's address).
RESOLVER = "198.18.0.53"
ETC_FILES = {
    "passwd": (
        f"root:x:0:0:root:/:/usr/sbin/nologin\nworker:x:{WORKER_UID}:{WORKER_UID}::/workspace:/bin/sh\n"
    ),
    "group": f"root:x:0:\nworker:x:{WORKER_UID}:\n",
    "hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    "resolv.conf": "",
    RESOLV_OUTSIDE: f"nameserver {RESOLVER}\n",
}
_SEALED = syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSUID


@dataclass(frozen=True, slots=True)
class Template:
    """What the built template offers to the sandboxes cut from it."""

    binds: tuple[str, ...]
    links: tuple[tuple[str, str], ...]

    @property
    def shown(self) -> tuple[str, ...]:
        """Every path of the host that is shown, devices apart."""
        return (*self.binds, *filter(os.path.exists, ETC_BINDS))


def readable_paths(extra: Iterable[str] = ()) -> Template:
    """Return what a worker may read: the system's /usr, and this Python with its packages."""
    links: list[tuple[str, str]] = []
    wanted = {"/usr", *extra}
    for path in USR_LINKS:
        if os.path.islink(path):
            links.append((path, os.readlink(path)))
        elif os.path.isdir(path):
            wanted.add(path)
    # Without -I or -P, the first entry is the script's directory or the working one.
    modules = sys.path if sys.flags.safe_path else sys.path[1:]
    wanted.update({sys.prefix, sys.base_prefix, sys.exec_prefix, *modules})
    real = sorted(path for path in {os.path.abspath(one) for one in wanted if one} if os.path.exists(path))
    kept: list[str] = []
    for path in real:
        if path == "/":
            raise ValueError("sys.path: '/' would show the worker the whole host")
        if not any(path == one or path.startswith(one + "/") for one in kept):
            kept.append(path)
    return Template(tuple(kept), tuple(links))


def build(template: Template, *, idmapped: bool) -> None:
    """Build the template and make it this process's root.

    The caller must be alone in a new mount namespace, with CAP_SYS_ADMIN over it.

    Args:
        template: What to show.
        idmapped: Whether to show it through mounts that map no owner (:mod:`~hayflick_sandbox.idmaps`).

    Raises:
        OSError: the kernel refused a step; its path says which.
    """
    syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    # Open first: the stage may cover one of them, and a descriptor still leads there.
    sources = {path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path in (*template.shown, "/proc")}
    devices = {name: os.open(f"/dev/{name}", os.O_PATH | os.O_CLOEXEC) for name in DEVICES}
    copies = {path: Path(path).read_bytes() for path in ETC_COPIES if os.path.isfile(path)}
    proc = sources.pop("/proc")
    owner = idmaps.user_namespace() if idmapped else None
    flags = syscalls.MS_NOSUID | syscalls.MS_NODEV
    syscalls.mount("hayflick-template", STAGE, "tmpfs", flags, "mode=755,size=16m,nr_inodes=4096")

    for path, target in template.links:
        os.symlink(target, STAGE + path)
    for path, source in sources.items():
        _show(source, STAGE + path, owner)
    if owner is not None:
        os.close(owner)
    _bind(proc, STAGE + HOST_PROC)
    Path(STAGE + NEW_ROOT).mkdir()
    _fill_etc(copies)
    for name, source in devices.items():
        _bind(source, f"{STAGE}/dev/{name}")
    for name, target in DEVICE_LINKS.items():
        os.symlink(target, f"{STAGE}/dev/{name}")
    Path(f"{STAGE}/dev/shm").mkdir()
    for directory in ("tmp", "workspace", "proc"):
        Path(STAGE, directory).mkdir(exist_ok=True)

    for name in devices:
        # Read-only keeps their inodes' times from being a channel; data still flows.
        flags = _SEALED | syscalls.MOUNT_ATTR_NOEXEC
        syscalls.mount_setattr(f"{STAGE}/dev/{name}", flags, recursive=False)
    for descriptor in (*sources.values(), *devices.values(), proc):
        os.close(descriptor)
    os.chdir(STAGE)
    syscalls.pivot_root(".", ".")
    syscalls.umount2(".", syscalls.MNT_DETACH)
    os.chdir("/")
    syscalls.mount_setattr("/", _SEALED, recursive=False)


def _fill_etc(copies: dict[str, bytes]) -> None:
    etc = Path(STAGE, "etc")
    etc.mkdir(exist_ok=True)
    for name, text in ETC_FILES.items():
        (etc / name).write_text(text, encoding="utf-8")
    for path, data in copies.items():
        target = Path(STAGE + path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)


def _show(source: int, target: str, owner: int | None) -> None:
    """Show what a worker may read, with the maps of the user namespace *owner* if there is one."""
    attributes = _SEALED | syscalls.MOUNT_ATTR_NODEV
    if owner is None:
        _bind(source, target)
        syscalls.mount_setattr(target, attributes, recursive=True)
        return
    _make_mount_point(source, target)
    try:
        tree = idmaps.mapped(source, owner, attributes)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.readlink(f"/proc/self/fd/{source}")) from None
    try:
        syscalls.move_mount(tree, target)
    finally:
        os.close(tree)


def _bind(source: int, target: str) -> None:
    _make_mount_point(source, target)
    syscalls.mount(f"/proc/self/fd/{source}", target, None, syscalls.MS_BIND | syscalls.MS_REC)


def _make_mount_point(source: int, target: str) -> None:
    if os.path.isdir(f"/proc/self/fd/{source}"):
        os.makedirs(target, mode=0o755, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))


__all__ = [
    "HOST_PROC",
    "NEW_ROOT",
    "RESOLVER",
    "RESOLV_OUTSIDE",
    "WORKER_UID",
    "Template",
    "build",
    "readable_paths",
]
