"""Cgroups that were delegated to us: where they are, and how to stand in them.

Whoever may not write at the top of a hierarchy may still own the cgroup that it
was started in: a systemd service with ``Delegate=yes``, a container's own
cgroup, a directory that an administrator gave away. Version 2 then has two rules
of its own (cgroups(7), and "Delegation" in the kernel's cgroup-v2.rst):

* a cgroup hands controllers down only while no process is in it itself, so the
  processes there move to a leaf beside the workers, and back at the end;
* a process moves, or is born, only where the common ancestor of both places is
  writable too, which the delegated cgroup is.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

SERVICES = "hayflick-services"
# A process that forks just then leaves one behind; each round moves what is new.
ROUNDS = 100


def own_paths(text: str) -> dict[str, str]:
    """Return our path in each hierarchy by controller, "" for version 2, of ``/proc/self/cgroup``."""
    paths: dict[str, str] = {}
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), path))
    return paths


def own_directory(mount: Path, mounted: str, path: str) -> Path | None:
    """Return the directory of our own cgroup, or ``None`` where this mount does not show it.

    Args:
        mount: The mount point.
        mounted: What of the hierarchy is mounted there (field 4 of proc_pid_mountinfo(5)).
        path: Our path in the hierarchy, as ``/proc/self/cgroup`` has it.
    """
    # The kernel writes "/.." where a cgroup namespace ends below us.
    if not path.startswith("/") or ".." in PurePosixPath(path).parts:
        return None
    top = PurePosixPath(mounted)
    if top != PurePosixPath("/") and top not in (PurePosixPath(path), *PurePosixPath(path).parents):
        return None
    directory = mount / PurePosixPath(path).relative_to(top)
    # A process that was moved aside belongs to the cgroup that it was moved from.
    return directory.parent if directory.name == SERVICES else directory


def is_handed(top: Path) -> bool:
    """Return whether *top* is a cgroup that somebody handed to us, and not the machine's own root."""
    # Only the root of the whole hierarchy has no type (cgroup-v2.rst, "cgroup.type").
    files = ("cgroup.procs", "cgroup.subtree_control")
    return (top / "cgroup.type").exists() and all(os.access(top / name, os.W_OK) for name in files)


def hand_down(top: Path, wanted: frozenset[str]) -> None:
    """Have *top* hand those of *wanted* that it has to its children, moving its processes aside.

    Raises:
        OSError: the kernel refused; EBUSY when processes came faster than they were moved.
    """
    with _alone(top):
        missing = (wanted & _words(top / "cgroup.controllers")) - _words(top / "cgroup.subtree_control")
        if not missing:
            return
        (top / SERVICES).mkdir(exist_ok=True)
        for left in reversed(range(ROUNDS)):
            _move(top, top / SERVICES)
            try:
                _write(top / "cgroup.subtree_control", " ".join(f"+{name}" for name in sorted(missing)))
            except OSError as error:
                if error.errno != errno.EBUSY or not left:
                    _withdraw(top, wanted)
                    raise
            else:
                return


def take_back(top: Path, workers: Path, wanted: frozenset[str]) -> None:
    """Undo :func:`hand_down` once nobody else needs it: *workers*, below *top*, is gone.

    Raises:
        OSError: the kernel refused.
    """
    if (top / SERVICES).is_dir():
        with _alone(top):
            if not workers.exists():
                _withdraw(top, wanted)


def _withdraw(top: Path, wanted: frozenset[str]) -> None:
    given = wanted & _words(top / "cgroup.subtree_control")
    if given:
        _write(top / "cgroup.subtree_control", " ".join(f"-{name}" for name in sorted(given)))
    aside = top / SERVICES
    for left in reversed(range(ROUNDS)):
        _move(aside, top)
        try:
            aside.rmdir()
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY or not left:
                raise
        else:
            return


def _move(source: Path, target: Path) -> None:
    for pid in (source / "cgroup.procs").read_text().split():
        with contextlib.suppress(ProcessLookupError):
            _write(target / "cgroup.procs", pid)


@contextlib.contextmanager
def _alone(top: Path) -> Iterator[None]:
    """Keep other nodes in the same cgroup from doing the opposite meanwhile."""
    descriptor = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _words(path: Path) -> frozenset[str]:
    return frozenset(path.read_text().split())


def _write(path: Path, value: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, value.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)
