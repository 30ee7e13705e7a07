"""What of the host must be after an attack as it was before."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

SETTINGS = (
    *("kernel/core_pattern", "kernel/hostname", "kernel/modprobe", "kernel/poweroff_cmd", "kernel/sysrq"),
    *("fs/suid_dumpable", "vm/overcommit_memory", "user/max_user_namespaces", "kernel/dmesg_restrict"),
)
SYSTEM_FILES = ("/etc/passwd", "/etc/shadow", "/etc/group", "/etc/ld.so.preload", "/bin/sh")
SYSTEM_DIRECTORIES = ("/", "/etc", "/usr", "/usr/bin", "/dev")
# Where others of this machine work too, what attacks make is known by its name.
SHARED_DIRECTORIES = ("/home", "/root", "/run", "/tmp", "/var/tmp")
OURS = "escape-"


def _mounts() -> object:
    return sorted(line.split(" ", 1)[1] for line in Path("/proc/self/mountinfo").read_text().splitlines())


def _devices() -> object:
    return sorted(name for name in os.listdir("/dev") if not name.startswith("pts"))


def _settings() -> object:
    return {
        name: Path("/proc/sys", name).read_text() for name in SETTINGS if Path("/proc/sys", name).exists()
    }


def _files() -> object:
    hashes = {}
    for path in SYSTEM_FILES:
        try:
            hashes[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        except OSError as error:  # an ordinary user reads no shadow
            hashes[path] = type(error).__name__
    listed = {path: _names(path) for path in SYSTEM_DIRECTORIES}
    ours = {path: [name for name in _names(path) if name.startswith(OURS)] for path in SHARED_DIRECTORIES}
    return hashes, listed, ours


def _names(path: str) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError as error:
        return [type(error).__name__]


def _disk() -> object:
    # What others write meanwhile is not ours to judge: the file systems, and that they have inodes left.
    stat = os.statvfs("/")
    return stat.f_blocks, stat.f_files, stat.f_ffree > 0


def _ipc() -> object:
    # Keys of ours begin alike; see arena.py.
    return [
        line.split()[:2]
        for name in ("shm", "sem", "msg")
        for line in Path(f"/proc/sysvipc/{name}").read_text().splitlines()[1:]
        if int(line.split()[0]) >> 16 == 0x4859
    ]


def _cores() -> object:
    return {
        path: [name for name in os.listdir(path) if name.startswith("core")] for path in ("/", os.getcwd())
    }


def _uids() -> object:
    return Path("/etc/subuid").read_text() if Path("/etc/subuid").exists() else ""


def _forks() -> object:
    return subprocess.run(["/bin/true"], check=False).returncode


FACTS: dict[str, Callable[[], object]] = {
    "mounts": _mounts,
    "devices": _devices,
    "settings": _settings,
    "files": _files,
    "disk": _disk,
    "ipc": _ipc,
    "cores": _cores,
    "uids": _uids,
    "forks": _forks,
}


def look(names: set[str]) -> dict[str, object]:
    """Return the facts *names* as they are now."""
    return {name: FACTS[name]() for name in sorted(names)}


def changed(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """Return the names of the facts that differ."""
    return [name for name, value in before.items() if after[name] != value]
