"""The peer beside which sandboxes are measured, where it is installed."""

from __future__ import annotations

import shutil
import subprocess
import time

COMMAND = ("bwrap", "--unshare-all", "--ro-bind", "/", "/", "/bin/true")


def installed() -> bool:
    """Say whether this machine has the peer."""
    return shutil.which(COMMAND[0]) is not None


def run() -> float:
    """Run the peer once; return its seconds."""
    began = time.perf_counter()
    subprocess.run(COMMAND, check=True)
    return time.perf_counter() - began
