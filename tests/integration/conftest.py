"""The three services as real processes, for tests that use them from outside."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # before gRPC is imported

import cloudpickle
import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from hayflick.v1 import (
    controller_pb2,
    controller_pb2_grpc,
    logger_pb2,
    logger_pb2_grpc,
    orchestrator_pb2_grpc,
)
from hayflick.v1 import orchestrator_pb2 as opb
from hayflick.v1.resources_pb2 import Contract, EndReason, Manifest, NetworkPolicy, Resources, Worker
from hayflick_sandbox import delegation
from hayflick_sandbox.cgroups import hierarchies, places

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

MIB = 1024 * 1024
START_SECONDS = 30.0
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def groups(pattern: str) -> list[Path]:
    """Return what is at *pattern* below ``hayflick/`` in every hierarchy that nodes here may use."""
    own = delegation.own_paths(Path("/proc/self/cgroup").read_text())
    tops = [one.root for mounted in hierarchies() for one in places(mounted, own)]
    return [path for top in tops for path in top.glob(f"hayflick/{pattern}")]


def request_id() -> str:
    """Return an id that no other request has."""
    return secrets.token_hex(8)


def duration(seconds: float) -> Duration:
    """Return *seconds* for the wire."""
    return Duration(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))


def reason_of(error: grpc.RpcError) -> str:
    """Return the stable reason that *error* carries."""
    assert isinstance(error, grpc.Call)
    status = rpc_status.from_call(error)
    assert status is not None, error
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        if detail.Unpack(info):
            return info.reason
    raise AssertionError(f"no reason in {error}")


@contextlib.contextmanager
def refused(reason: str) -> Iterator[None]:
    """Expect a call to be refused for *reason*."""
    with pytest.raises(grpc.RpcError) as caught:
        yield
    assert reason_of(caught.value) == reason, caught.value


def until(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    """Return the first true value of *condition*; fail when there is none in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)  # the world outside gives no event to wait for
    return value


@dataclass
class Ran:
    """What a task did."""

    stdout: bytes = b""
    stderr: bytes = b""
    result: opb.TaskResult = field(default_factory=opb.TaskResult)

    @property
    def outcome(self) -> str:
        """How it ended, by the short name."""
        return opb.TaskOutcome.Name(self.result.outcome).removeprefix("TASK_OUTCOME_")


def command(*argv: str, timeout: float | None = None) -> opb.Task:
    """Return a task that runs a program."""
    return opb.Task(command=opb.Command(argv=argv), timeout=None if timeout is None else duration(timeout))


def shell(script: str, timeout: float | None = None) -> opb.Task:
    """Return a task that runs a shell script."""
    return command("/bin/sh", "-c", script, timeout=timeout)


def call(function: Callable[[Any], Any], timeout: float | None = None) -> opb.Task:
    """Return a task that calls *function* with its worker."""
    # By value: the sandbox has no test modules.
    module = sys.modules[function.__module__]
    cloudpickle.register_pickle_by_value(module)
    try:
        pickled = cloudpickle.dumps(function)
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    return opb.Task(
        python=opb.PythonCallable(pickled=pickled, python_version=PYTHON),
        timeout=None if timeout is None else duration(timeout),
    )


class Stack:
    """A logger, a controller and an orchestrator, and stubs to call them."""

    def __init__(
        self, directory: Path, *, node_prefix: Sequence[str] = (), **settings: Mapping[str, str]
    ) -> None:
        self.directory = directory
        self._node_prefix = tuple(node_prefix)
        self.node_id = f"test-{os.getpid()}-{secrets.token_hex(3)}"
        self._settings = settings
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self._channels: list[grpc.Channel] = []
        try:
            self._start_all()
        except BaseException:
            self.abandon()
            raise

    def _start_all(self) -> None:
        for name in ("logger", "controller", "orchestrator"):
            self.start(name)
        self.logger = logger_pb2_grpc.LoggerServiceStub(self.channel("logger"))
        self.controller = controller_pb2_grpc.ControllerServiceStub(self.channel("controller"))
        self.orchestrator = orchestrator_pb2_grpc.OrchestratorServiceStub(self.channel("orchestrator"))
        until(self._decides)

    def _decides(self) -> bool:
        """Return whether the controller has its node and its logger."""
        try:
            self.contract()
        except grpc.RpcError as error:
            if reason_of(error) != "AUDIT_UNAVAILABLE":
                raise
            return False
        return bool(self.controller.ListNodes(controller_pb2.ListNodesRequest()).nodes)

    def address(self, name: str) -> str:
        """Return where a service listens."""
        return f"unix://{self.directory}/{name}.sock"

    def channel(self, name: str) -> grpc.Channel:
        """Return a channel to a service."""
        options = [("grpc.max_receive_message_length", 32 * MIB), ("grpc.max_send_message_length", 256 * MIB)]
        channel = grpc.insecure_channel(self.address(name), options=options)
        self._channels.append(channel)
        return channel

    def program(self, name: str) -> list[str]:
        """Return what of Python is run for a service."""
        return ["-m", f"hayflick_{name}"]

    def start(self, name: str, node_id: str | None = None) -> subprocess.Popen[str]:
        """Start a service and wait until it listens."""
        argv = ["--listen", self.address(name), "--data-dir", str(self.directory / name)]
        if name != "logger":
            argv += ["--logger", self.address("logger")]
        if name == "orchestrator":
            argv += ["--controller", self.address("controller"), "--node-id", node_id or self.node_id]
        for option, value in self._settings.get(name, {}).items():
            argv += [f"--{option}", value]
        prefix = self._node_prefix if name == "orchestrator" else ()
        with (self.directory / f"{name}.log").open("a") as log:
            process = subprocess.Popen(
                [*prefix, sys.executable, *self.program(name), *argv],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd="/",
            )
        self.processes[name] = process
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "listening on" in line, (name, line, self.log(name))
        return process

    def log(self, name: str) -> str:
        """Return what a service wrote to its log."""
        return (self.directory / f"{name}.log").read_text()

    def end(self, name: str, number: int = signal.SIGTERM) -> int:
        """Signal a service and return its exit status."""
        process = self.processes.pop(name)
        process.send_signal(number)
        try:
            status = process.wait(20)
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
        return status

    def abandon(self) -> None:
        """End everything without a question."""
        for channel in self._channels:
            channel.close()
        for process in self.processes.values():
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()

    def close(self) -> None:
        """End everything, and check that nothing is left."""
        try:
            for channel in self._channels:
                channel.close()
            statuses = {
                name: self.end(name)
                for name in ("orchestrator", "controller", "logger")
                if name in self.processes
            }
        finally:
            self.abandon()
        assert set(statuses.values()) <= {0}, (statuses, self.log("orchestrator"))
        assert self.left_behind() == []

    def left_behind(self) -> list[str]:
        """Return what a stack that ended should not have left: control groups, processes, sockets."""
        return [str(path) for path in groups(self.node_id)] + [
            str(path) for path in self.directory.glob("*.sock")
        ]

    # What tests do all the time

    def contract(self, **fields: Any) -> str:
        """Return a new contract's id."""
        wanted: dict[str, Any] = {"max_depth": 3, "max_replicas": 20, "cooldown": Duration(), **fields}
        request = controller_pb2.CreateContractRequest(request_id=request_id(), contract=Contract(**wanted))
        return str(self.controller.CreateContract(request).contract.contract_id)

    def manifest(self, contract_id: str, parent_id: str = "", **resources: Any) -> Manifest:
        """Return a manifest for a small worker."""
        wanted: dict[str, Any] = {
            "cpu_millis": 1_000,
            "memory_limit_bytes": 64 * MIB,
            "network": NetworkPolicy(allow_controller=True),
            **resources,
        }
        request = controller_pb2.IssueManifestRequest(
            request_id=request_id(),
            contract_id=contract_id,
            parent_id=parent_id,
            state_snapshot_json='{"job": "test"}',
            resources=Resources(**wanted),
        )
        return self.controller.IssueManifest(request).manifest

    def launch(self, contract_id: str | None = None, parent_id: str = "", **resources: Any) -> Worker:
        """Return a new worker."""
        manifest = self.manifest(contract_id or self.contract(), parent_id, **resources)
        request = opb.LaunchWorkerRequest(request_id=request_id(), manifest=manifest)
        return self.orchestrator.LaunchWorker(request).worker

    def run(self, worker: Worker, task: opb.Task, *, keep: bool = False) -> Ran:
        """Run a task to its end."""
        ran = Ran()
        request = opb.RunTaskRequest(worker_id=worker.worker_id, task=task, keep_worker_on_error=keep)
        for response in self.orchestrator.RunTask(request):
            if response.output.stream == opb.Stream.STREAM_STDOUT:
                ran.stdout += response.output.data
            elif response.output.stream == opb.Stream.STREAM_STDERR:
                ran.stderr += response.output.data
            if response.HasField("result"):
                ran.result.CopyFrom(response.result)
        return ran

    def begin(self, worker: Worker, task: opb.Task) -> Any:
        """Start a task and return its stream once it printed something."""
        stream = self.orchestrator.RunTask(opb.RunTaskRequest(worker_id=worker.worker_id, task=task))
        assert next(stream).HasField("started")
        assert next(stream).HasField("output")
        return stream

    def stop(self, worker: Worker, **fields: Any) -> Worker:
        """Stop a worker."""
        request = opb.StopWorkerRequest(request_id=request_id(), worker_id=worker.worker_id, **fields)
        return self.orchestrator.StopWorker(request).worker

    def worker(self, worker_id: str) -> Worker:
        """Return a worker as the controller knows it."""
        return self.controller.GetWorker(controller_pb2.GetWorkerRequest(worker_id=worker_id)).worker

    def end_reason(self, worker_id: str) -> str:
        """Return why a worker ended, once the controller knows."""
        worker = until(lambda: (found := self.worker(worker_id)).HasField("exit") and found)
        return EndReason.Name(worker.exit.reason).removeprefix("END_REASON_")

    def kill(self, **scope: Any) -> controller_pb2.EngageKillSwitchResponse:
        """Engage the kill switch over a scope."""
        request = controller_pb2.EngageKillSwitchRequest(
            request_id=request_id(), scope=controller_pb2.Scope(**scope), reason="test"
        )
        return self.controller.EngageKillSwitch(request)

    def events(self, worker_id: str) -> list[str]:
        """Return the names of a worker's events, in order."""
        request = logger_pb2.ListEventsRequest(filter=logger_pb2.EventFilter(worker_id=worker_id))
        return [recorded.event.event for recorded in self.logger.ListEvents(request).events]

    def sandboxes(self) -> dict[str, opb.Sandbox]:
        """Return the sandboxes that live, by worker."""
        listed = self.orchestrator.ListSandboxes(opb.ListSandboxesRequest(page_size=1_000)).sandboxes
        return {sandbox.worker.worker_id: sandbox for sandbox in listed}


@contextlib.contextmanager
def running_stack(*, node_prefix: Sequence[str] = (), **settings: Mapping[str, str]) -> Iterator[Stack]:
    """Run a stack in a directory of its own; *node_prefix* is a command that runs its orchestrator."""
    # Not pytest's tmp_path: a socket's path has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="hayflick-") as directory:
        stack = Stack(Path(directory), node_prefix=node_prefix, **settings)
        try:
            yield stack
        finally:
            stack.close()


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """One stack for all tests that leave it as they found it."""
    with running_stack() as running:
        yield running


@pytest.fixture
def own_stack() -> Iterator[Stack]:
    """A stack for one test, that it may break."""
    with running_stack() as running:
        yield running
