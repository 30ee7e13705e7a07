"""All services as real processes, that can be broken one by one and put together again."""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import struct
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

import grpc

from hayflick.v1 import (
    controller_pb2,
    controller_pb2_grpc,
    logger_pb2_grpc,
    orchestrator_pb2_grpc,
)

from .disk import Disk, possible
from .kernel import children
from .relay import Relay

if TYPE_CHECKING:
    from postgres_cluster import Cluster

START_SECONDS = 60.0
STEPPED = Path(__file__).parents[1] / "support/stepped.py"
CHANNEL = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.enable_http_proxy", 0),
]


@dataclass(frozen=True)
class Size:
    """What a run consists of.

    Attributes:
        controllers: How many; several need a database server.
        orchestrators: How many nodes.
        lease_seconds: How long a node may go on unheard.
        beat_seconds: How often it beats.
    """

    controllers: int = 1
    orchestrators: int = 1
    lease_seconds: float = 3.0
    beat_seconds: float = 0.5


@dataclass
class Fleet:
    """See the module.

    Args:
        directory: A short one: a socket's path has at most 107 bytes.
        size: Of what.
        cluster: The database server; none for SQLite.
    """

    directory: Path
    size: Size
    cluster: Cluster | None = None
    processes: dict[str, subprocess.Popen[str]] = field(default_factory=dict)
    relays: dict[str, Relay] = field(default_factory=dict)
    disk: Disk | None = None

    def __post_init__(self) -> None:
        self._mark = f"chaos-{os.getpid()}-{secrets.token_hex(3)}"
        self._clock = self.directory / "clock"
        self.step_clock(0.0)
        self.controllers = [f"controller-{number}" for number in range(self.size.controllers)]
        self.orchestrators = [f"orchestrator-{number}" for number in range(self.size.orchestrators)]
        self.names = ["logger", *self.controllers, *self.orchestrators]
        self._database = self.cluster.new_database() if self.cluster else None
        self._channels: list[grpc.Channel] = []

    def __enter__(self) -> Self:
        """Start everything."""
        try:
            if possible():
                self.disk = Disk(self.directory / "logger")
            for number, name in enumerate(self.orchestrators):
                controller = self.controllers[number % len(self.controllers)]
                self.relays[name] = Relay(self.socket(f"{name}-relay"), self.socket(controller))
            self.mend()
        except BaseException:
            self.__exit__()
            raise
        self.logger = logger_pb2_grpc.LoggerServiceStub(self._channel("logger"))
        self.stubs = [
            controller_pb2_grpc.ControllerServiceStub(self._channel(name)) for name in self.controllers
        ]
        self.nodes = {
            name: orchestrator_pb2_grpc.OrchestratorServiceStub(self._channel(name))
            for name in self.orchestrators
        }
        return self

    def __exit__(self, *_: object) -> None:
        """End everything without a question."""
        for channel in self._channels:
            channel.close()
        for name in reversed(self.names):
            if (process := self.processes.pop(name, None)) is not None:
                process.kill()
                process.wait()
                assert process.stdout is not None
                process.stdout.close()
        for relay in self.relays.values():
            relay.close()
        if self.disk is not None:
            self.disk.close()

    def socket(self, name: str) -> Path:
        """Return where a service listens."""
        return self.directory / f"{name}.sock"

    def node_id(self, orchestrator: str) -> str:
        """Return the name of a node."""
        return f"{self._mark}-{orchestrator.rpartition('-')[2]}"

    @property
    def node_ids(self) -> list[str]:
        """The names of all nodes."""
        return [self.node_id(name) for name in self.orchestrators]

    @property
    def logger_directory(self) -> Path:
        """Where the log is, as this process sees it."""
        return self.disk.path if self.disk is not None else self.directory / "logger"

    def step_clock(self, seconds: float) -> None:
        """Set the services' wall clock to be *seconds* ahead of the true one."""
        self._clock.write_bytes(struct.pack("<d", seconds))

    def zygote(self, orchestrator: str) -> list[int]:
        """Return the process that forks a node's workers."""
        return children(self.processes[orchestrator].pid)

    def alive(self, name: str) -> bool:
        """Return whether a service's process lives."""
        process = self.processes.get(name)
        return process is not None and process.poll() is None

    def mend(self) -> None:
        """Start whatever does not run, the first thing first.

        Raises:
            AssertionError: It does not start in time; its log is in the text.
        """
        deadline = time.monotonic() + START_SECONDS
        while self.cluster is not None and not self.cluster.running:
            try:
                self.cluster.start()
            except RuntimeError:  # what it was killed with is not all gone yet
                self.cluster.stop()
                assert time.monotonic() < deadline
        for name in self.names:
            deadline = time.monotonic() + START_SECONDS
            while not self.alive(name):
                assert time.monotonic() < deadline, (name, self.log(name)[-3_000:])
                self._start(name)

    def wait_ready(self, seconds: float = START_SECONDS) -> None:
        """Return once every node is connected."""
        deadline = time.monotonic() + seconds
        waiting = set(self.node_ids)
        while waiting:
            assert time.monotonic() < deadline, (waiting, self.log("controller-0")[-2_000:])
            for stub in self.stubs:
                with contextlib.suppress(grpc.RpcError):
                    listed = stub.ListNodes(controller_pb2.ListNodesRequest(), timeout=2).nodes
                    waiting -= {node.node_id for node in listed}
            time.sleep(0.05)

    def end(self) -> dict[str, int]:
        """End everything in order, as SIGTERM does; return the exit statuses."""
        statuses = {}
        for name in reversed(self.names):
            process = self.processes[name]
            process.send_signal(signal.SIGTERM)
            statuses[name] = process.wait(30)
        return statuses

    def log(self, name: str) -> str:
        """Return what a service wrote to standard error, over all its starts."""
        path = self.directory / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def _channel(self, name: str) -> grpc.Channel:
        channel = grpc.insecure_channel(f"unix://{self.socket(name)}", options=CHANNEL)
        self._channels.append(channel)
        return channel

    def _start(self, name: str) -> None:
        service = name.partition("-")[0]
        before = self.processes.pop(name, None)
        if before is not None and before.stdout is not None:
            before.stdout.close()
        inside = self.disk.inside if service == "logger" and self.disk is not None else []
        command = [sys.executable, str(STEPPED), str(self._clock), f"hayflick_{service}"]
        with (self.directory / f"{name}.log").open("a") as log:
            process = subprocess.Popen(
                [*inside, *command, *self._arguments(name, service)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd="/",
            )
        self.processes[name] = process
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], START_SECONDS)
        if not ready or "listening on" not in process.stdout.readline():
            process.kill()  # another start may do better
            process.wait()

    def _arguments(self, name: str, service: str) -> list[str]:
        found = ["--listen", f"unix://{self.socket(name)}", "--data-dir", str(self.directory / name)]
        if service == "logger":
            return [*found, "--drain-seconds", "0.5"]
        found += ["--logger", f"unix://{self.socket('logger')}"]
        if service == "orchestrator":
            return [
                *found,
                *("--controller", f"unix://{self.socket(f'{name}-relay')}"),
                *("--node-id", self.node_id(name)),
                *("--heartbeat-timeout-seconds", "4"),
            ]
        found += ["--lease-seconds", str(self.size.lease_seconds), "--drain-seconds", "1"]
        found += ["--beat-interval-seconds", str(self.size.beat_seconds), "--audit-timeout-seconds", "2"]
        found += ["--flush-interval-seconds", "1"]
        return found if self._database is None else [*found, "--database", self._database]
