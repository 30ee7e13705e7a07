"""The small process that keeps the embedded services: ``python -m replication._supervisor``.

The user's program starts it, and it starts the three services. It holds one end
of a pipe, its lifeline: when the program ends, however it ends, the pipe does
too, and this process stops the services in order and removes their directory.
Each service has a lifeline of its own, so that none outlives this process either.

Imports the standard library alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NAMES = ("logger", "controller", "orchestrator")
"""In the order in which they start; each needs those before it."""

START_SECONDS = 30.0
STOP_SECONDS = 20.0
LOG_TAIL_BYTES = 4_096


class StartFailed(Exception):
    """A service did not come up; ``log`` is the end of what it wrote."""

    def __init__(self, service: str, message: str, log: str) -> None:
        super().__init__(f"{service}: {message}")
        self.service = service
        self.log = log


@dataclass(frozen=True)
class Service:
    """A service that was started."""

    name: str
    process: subprocess.Popen[bytes]
    pidfd: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the services until the lifeline ends; return 0 when they were started."""
    parser = argparse.ArgumentParser(prog="replication._supervisor", description=__doc__)
    parser.add_argument("--directory", type=Path, required=True, help="the services' own; removed at the end")
    parser.add_argument("--lifeline-fd", type=int, required=True, help="end-of-file here means: stop")
    parser.add_argument("--node-id", required=True, help="the orchestrator's name")
    parser.add_argument("--allow-degraded", default="", help="sandbox layers to do without, comma-separated")
    options = parser.parse_args(argv)
    services: list[Service] = []
    # A signal wakes the poll; what it was does not matter, all mean: stop.
    wakeup, wakeup_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(wakeup_writer)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    try:
        try:
            _start(options, services)
        except StartFailed as failure:
            _say({"failed": str(failure), "service": failure.service, "log": failure.log})
            return 1
        _say({"ready": {service.name: service.process.pid for service in services}})
        if _wait(options.lifeline_fd, wakeup, services):
            # A service ended by itself. Nothing may run half governed, so the
            # others end too; the logs stay until the program has gone.
            _stop(services)
            _wait(options.lifeline_fd, wakeup, [])
        return 0
    finally:
        _stop(services)
        shutil.rmtree(options.directory, ignore_errors=True)


def address(directory: Path, name: str) -> str:
    """Return where the service called *name* listens."""
    return f"unix://{directory}/{name}.sock"


def _start(options: argparse.Namespace, services: list[Service]) -> None:
    """Start each service when the one before it listens, and add it to *services*.

    Raises:
        StartFailed: One did not come up.
    """
    lifelines = {name: os.pipe2(os.O_CLOEXEC) for name in NAMES}
    for position, name in enumerate(NAMES):
        # A service also holds the lifelines of those that it needs, so that
        # they outlive it and can record how it ended.
        held = [lifelines[before][1] for before in NAMES[:position]]
        service = _launch(name, options, lifelines[name][0], held)
        services.append(service)  # before it is ready, so that a failed start is cleaned up
        _await_ready(service, options.directory)
    for reader, _ in lifelines.values():
        os.close(reader)


def _launch(name: str, options: argparse.Namespace, lifeline: int, held: Sequence[int]) -> Service:
    directory: Path = options.directory
    command = [
        *(sys.executable, "-P", "-m", f"hayflick_{name}"),
        *("--listen", address(directory, name)),
        *("--data-dir", str(directory / name)),
        *("--lifeline-fd", str(lifeline)),
    ]
    for needed in NAMES[: NAMES.index(name)]:
        command += [f"--{needed}", address(directory, needed)]
    if name == "orchestrator":
        command += ["--node-id", options.node_id]
        if options.allow_degraded:
            command += ["--allow-degraded", options.allow_degraded]
    with (directory / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            pass_fds=(lifeline, *held),
        )
    return Service(name, process, os.pidfd_open(process.pid))


def _await_ready(service: Service, directory: Path) -> None:
    """Wait until *service* says that it listens.

    Raises:
        StartFailed: It ended, or did not say so in time.
    """
    assert service.process.stdout is not None
    output = service.process.stdout.fileno()
    deadline = time.monotonic() + START_SECONDS
    said = b""
    while b" listening on " not in said or not said.endswith(b"\n"):
        ready, _, _ = select.select([output], [], [], max(0.0, deadline - time.monotonic()))
        chunk = os.read(output, 4_096) if ready else b""
        if not chunk:
            how = "ended before it listened" if ready else f"does not listen after {START_SECONDS:g} s"
            raise StartFailed(service.name, how, _tail(directory / f"{service.name}.log"))
        said += chunk


def _wait(lifeline: int, wakeup: int, services: Sequence[Service]) -> bool:
    """Wait for the lifeline's end or a signal; return true when a service ended first."""
    poll = select.poll()
    poll.register(lifeline, select.POLLIN)
    poll.register(wakeup, select.POLLIN)
    pidfds = {service.pidfd for service in services}
    outputs = {service.process.stdout.fileno() for service in services if service.process.stdout}
    for descriptor in pidfds | outputs:
        poll.register(descriptor, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor in outputs:
                if not os.read(descriptor, 65_536):  # nobody needs it, but a full pipe would stop the service
                    poll.unregister(descriptor)
            else:
                return descriptor in pidfds


def _stop(services: list[Service]) -> None:
    """End the services, the last started first, and wait for each."""
    while services:
        service = services.pop()
        service.process.terminate()
        try:
            service.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            service.process.kill()
            service.process.wait()
        if service.process.stdout is not None:
            service.process.stdout.close()
        os.close(service.pidfd)


def _tail(log: Path) -> str:
    with contextlib.suppress(OSError):
        return log.read_bytes()[-LOG_TAIL_BYTES:].decode("utf-8", "backslashreplace").strip()
    return ""


def _say(what: dict[str, object]) -> None:
    # A program that has gone already needs to hear nothing.
    with contextlib.suppress(OSError):
        os.write(sys.stdout.fileno(), json.dumps(what).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main())
