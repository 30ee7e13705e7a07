"""A small disk of the logger's own, in a mount namespace that outlives the logger."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

SIZE_MIB = 32


def possible() -> bool:
    """Return whether this user may mount one."""
    return os.geteuid() == 0 and all(shutil.which(tool) for tool in ("unshare", "nsenter"))


class Disk:
    """A tmpfs at *path*, seen by those alone who enter; gone with this object, or this process."""

    def __init__(self, path: Path) -> None:
        script = (
            'mkdir -m 700 "$0" && mount -t tmpfs -o size="$1",mode=0700 hayflick-chaos "$0"'
            " && echo ready && exec cat"
        )
        self._keeper = subprocess.Popen(
            [
                *("unshare", "--mount", "--propagation", "private"),
                *("sh", "-c", script, str(path), f"{SIZE_MIB}m"),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._keeper.stdout is not None
        assert self._keeper.stdout.readline() == b"ready\n"
        self.inside = ["nsenter", f"--mount=/proc/{self._keeper.pid}/ns/mnt", "--"]
        self.path = Path(f"/proc/{self._keeper.pid}/root{path}")

    def fill(self) -> None:
        """Leave no room for another byte."""
        with (self.path / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(b"\0" * 4_096):
                pass

    def empty(self) -> None:
        """Make room again."""
        (self.path / "filler").unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount, by ending the last process that sees it."""
        assert self._keeper.stdin is not None
        assert self._keeper.stdout is not None
        self._keeper.stdin.close()
        self._keeper.wait(20)
        self._keeper.stdout.close()
