"""Runs a service whose wall clock somebody sets: ``python stepped.py FILE MODULE ARGUMENT…``.

FILE holds, as a little-endian double, by how many seconds the clock was set
forward or back. The machine's own clock is nobody's to set in a test; a service
asks for it in Python alone, through what is replaced here before its first import.
gRPC is left alone: it adds its timeouts to ``time.time`` in Python and compares
them with the true time in C, and no machine ever has two wall clocks.
"""

from __future__ import annotations

import datetime as dt
import importlib
import os
import runpy
import struct
import sys
import time
from typing import Any


def install(path: str) -> None:
    """Let every question for the wall clock be answered with the step in *path* added."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    true_time, true_ns = time.time, time.time_ns

    def step() -> float:
        return float(struct.unpack("<d", os.pread(descriptor, 8, 0))[0])

    class Stepped(dt.datetime):
        """The class that everybody imports from now on."""

        @classmethod
        def now(cls, tz: Any = None) -> Any:
            """Return the stepped time."""
            return cls.fromtimestamp(true_time() + step(), tz)

    time.time = lambda: true_time() + step()
    importlib.import_module("hayflick_rpc.clock")  # takes it as it is now, for good
    time.time = true_time
    time.time_ns = lambda: true_ns() + round(step() * 1e9)
    dt.datetime = Stepped  # type: ignore[misc]


if __name__ == "__main__":
    install(sys.argv[1])
    module = sys.argv[2]
    sys.argv = [module, *sys.argv[3:]]
    sys.path.pop(0)  # this directory's modules are not the service's
    runpy.run_module(module, run_name="__main__", alter_sys=True)
