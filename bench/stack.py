"""Three services with settings of their own; each can be stopped and killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

STOP_SECONDS = 20
NEEDS: Mapping[str, Sequence[str]] = {
    "logger": (),
    "controller": ("logger",),
    "orchestrator": ("controller", "logger"),
}


class Stack:
    """See the module.

    Args:
        settings: Further command-line settings by service and name.
    """

    def __init__(self, settings: Mapping[str, Mapping[str, str]]) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="hayflick-bench-"))
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        try:
            for name, needs in NEEDS.items():
                self._start(name, needs, settings.get(name, {}))
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> Mapping[str, int]:
        """The process of each service, by its name."""
        return {name: process.pid for name, process in self._processes.items()}

    def address(self, name: str) -> str:
        """Return where the service called *name* listens."""
        return f"unix://{self.directory}/{name}.sock"

    def send(self, name: str, number: signal.Signals) -> None:
        """Send a signal to the service called *name*."""
        self._processes[name].send_signal(number)

    def close(self) -> None:
        """End what still runs, in order, and leave nothing."""
        for process in reversed(self._processes.values()):
            process.send_signal(signal.SIGCONT)
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
        shutil.rmtree(self.directory)

    def _start(self, name: str, needs: Sequence[str], settings: Mapping[str, str]) -> None:
        command = [sys.executable, "-m", f"hayflick_{name}", "--listen", self.address(name)]
        command += ["--data-dir", str(self.directory / name)]
        for needed in needs:
            command += [f"--{needed}", self.address(needed)]
        if name == "orchestrator":
            command += ["--node-id", f"bench-{os.getpid()}"]
        for setting, value in settings.items():
            command += [f"--{setting}", value]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._processes[name] = process
        assert process.stdout is not None
        assert process.stdout.readline(), f"{name} did not start"
