"""Where bundles are kept: files of this user alone, within a total, the oldest removed first."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import tarfile
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hayflick_orchestrator.evidence.bundle import SUMMARY, Bundle

if TYPE_CHECKING:
    from pathlib import Path

# The time orders them, the worker is for people.
_NAME = re.compile(r"\d{20}-[A-Za-z0-9_.-]{1,64}\.tar\.gz")
MAX_SUMMARY_BYTES = 4 * 1024 * 1024


class StoreFull(Exception):
    """A bundle is larger than all that may be kept."""


@dataclass(slots=True)
class _Kept:
    size_bytes: int
    worker_ids: tuple[str, ...]


class Store:
    """The bundles of one node.

    Args:
        directory: Made when it is not there, for this user alone.
        total_bytes: What the bundles may have together.

    Raises:
        OSError: the directory cannot be made or read.
    """

    def __init__(self, directory: Path, total_bytes: int) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._total_bytes = total_bytes
        self._kept: dict[str, _Kept] = {}
        self._newest: dict[str, str] = {}
        with os.scandir(self._directory) as entries:
            found = [(entry.name, entry.stat(follow_symlinks=False).st_size) for entry in entries]
        for name, size_bytes in sorted(found):
            if name.endswith(".part"):  # its writer did not live to finish it
                os.unlink(name, dir_fd=self._directory)
            elif _NAME.fullmatch(name):
                self._note(name, _Kept(size_bytes, self._worker_ids(name)))

    def put(self, worker_id: str, worker_ids: tuple[str, ...], bundle: Bundle) -> None:
        """Keep *bundle*, durably, as the newest of *worker_ids*.

        Args:
            worker_id: The worker that was frozen.
            worker_ids: Whom the bundle shows.
            bundle: What is kept.

        Raises:
            StoreFull: it is larger than the total.
            OSError: it cannot be written; nothing is left of it.
        """
        size_bytes = len(bundle.data)
        if size_bytes > self._total_bytes:
            raise StoreFull(f"a bundle of {size_bytes} bytes is over the total of {self._total_bytes}")
        # Before, not after: at no time is there more than the total.
        while self._kept and sum(one.size_bytes for one in self._kept.values()) + size_bytes > (
            self._total_bytes
        ):
            self._remove(min(self._kept))
        name = f"{time.time_ns():020d}-{worker_id}.tar.gz"
        part = f"{secrets.token_hex(8)}.part"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(part, flags, 0o600, dir_fd=self._directory)
        try:
            try:
                view = memoryview(bundle.data)
                while view:
                    view = view[os.write(descriptor, view) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.rename(part, name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            os.fsync(self._directory)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part, dir_fd=self._directory)
            raise
        self._note(name, _Kept(size_bytes, worker_ids))

    def open(self, worker_id: str) -> int | None:
        """Return a descriptor of the newest bundle that shows a worker; ``None`` when there is none.

        It can be read to its end also when the bundle is removed meanwhile.
        """
        name = self._newest.get(worker_id)
        if name is None:
            return None
        try:
            return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory)
        except FileNotFoundError:
            self._forget(name)
            return None

    def close(self) -> None:
        """Let go of the directory; what is in it stays."""
        os.close(self._directory)

    def _note(self, name: str, kept: _Kept) -> None:
        self._kept[name] = kept
        for worker_id in kept.worker_ids:
            self._newest[worker_id] = name

    def _remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._directory)
        self._forget(name)

    def _forget(self, name: str) -> None:
        kept = self._kept.pop(name, None)
        for worker_id in kept.worker_ids if kept is not None else ():
            # An older one of the same worker is older still, and gone before.
            if self._newest.get(worker_id) == name:
                del self._newest[worker_id]

    def _worker_ids(self, name: str) -> tuple[str, ...]:
        """Return whom a bundle of a former run shows; nobody when it cannot be read."""
        try:
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory)
            with os.fdopen(descriptor, "rb") as file, tarfile.open(fileobj=file, mode="r|gz") as tar:
                first = tar.next()
                data = tar.extractfile(first) if first is not None and first.name == SUMMARY else None
                summary = json.loads(data.read(MAX_SUMMARY_BYTES)) if data is not None else {}
            return tuple(str(worker_id) for worker_id in summary.get("worker_ids", ()))
        except (OSError, EOFError, ValueError, tarfile.TarError):
            return ()
