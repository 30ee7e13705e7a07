"""The hands: launches, feeds and ends workers on one node."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, BinaryIO, Literal, NoReturn

from hayflick.v1 import (
    controller_pb2,
    controller_pb2_grpc,
    orchestrator_pb2,
    orchestrator_pb2_grpc,
    resources_pb2,
)
from replication import _checks, _embedded, _files, _rpc, _wire
from replication._evidence import Evidence
from replication._files import FileSummary
from replication._records import RegistryEntry, Stage
from replication._task import Event, Output, Task, event_from_json
from replication.contract import Manifest, ResourceSpec
from replication.errors import HayflickError, InternalError, NotFound, ServiceUnavailable, WorkerEnded

if TYPE_CHECKING:
    from replication.observability import StructuredLogger
    from replication.worker import Worker

__all__ = ["ContainerRecord", "Evidence", "FileSummary", "SandboxOrchestrator"]

LAUNCH_SECONDS = 120.0
MAX_REASON_CHARS = 256
PAGE_SIZE = 1_000
MAX_REMEMBERED = 10_000


@dataclass(frozen=True)
class ContainerRecord:
    """A worker's sandbox, as one looks at it from outside.

    Attributes:
        manifest: What its worker was born with.
        resources: What it may use.
        status: Where its worker is in its life.
        started_at: When its init was ready, in UTC; of one that ended, when it
            was registered.
        reason: Why it ended; empty while it lives.
        host_pid: The process id of its init on the host; 0 when it ended.
        host_uid: The user and group id of its processes on the host.
        cgroup_path: Its path below every mounted cgroup hierarchy.
        build_seconds: From the fork to ready.
    """

    manifest: Manifest
    resources: ResourceSpec
    status: Stage
    started_at: datetime | None
    reason: str = ""
    host_pid: int = 0
    host_uid: int = 0
    cgroup_path: str = ""
    build_seconds: float = 0.0


class SandboxOrchestrator:
    """The orchestrator of one node.

    Args:
        logger: Kept as an attribute; the service logs by itself.
        address: Its ``unix:///…`` target; ``None``: what ``HAYFLICK_ORCHESTRATOR``
            says, or the one started for this program.

    Raises:
        ValueError: *address* is not a Unix socket.
        ServiceUnavailable: The embedded services did not start.
    """

    def __init__(self, logger: StructuredLogger | None = None, address: str | None = None) -> None:
        self.logger = logger
        self.endpoint = _embedded.resolve("orchestrator", address)
        self._connection = _rpc.connect(self.endpoint)
        self._stub = orchestrator_pb2_grpc.OrchestratorServiceStub(self._connection.channel)
        # What was launched by this object: a manifest while it lives as far as
        # known here, a record once it is known to have ended.
        self._launched: dict[str, Manifest | ContainerRecord] = {}

    def __repr__(self) -> str:
        return f"<SandboxOrchestrator at {self.endpoint.address}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a SandboxOrchestrator stays outside; a task has the worker it is given")

    @property
    def containers(self) -> Mapping[str, ContainerRecord]:
        """The sandboxes that live on the node now, by worker id, oldest first; then
        those launched by this object that have ended.
        """  # noqa: D205 -- one thought
        living = self._living()
        ended = {
            worker_id: self._ended(worker_id, known)
            for worker_id, known in list(self._launched.items())
            if worker_id not in living
        }
        return MappingProxyType({**living, **ended})

    def launch_worker(self, manifest: Manifest) -> None:
        """Register *manifest* with the controller and start its worker; return when it runs.

        Raises:
            ReplicationDenied: Policy says no, or the manifest is not good.
            LimitNotEnforceable: This machine lacks a layer of the sandbox.
            SandboxFailed, NodeFull: It could not be started; its slot was given back.
            ServiceUnavailable: A service is not there, or cannot record.
            ValueError: The manifest is not well-formed.
        """
        wire = _rpc.from_json(_wire.manifest_to_json(manifest), resources_pb2.Manifest())
        request = orchestrator_pb2.LaunchWorkerRequest(request_id=_rpc.request_id(), manifest=wire)
        try:
            self._connection.call(self._stub.LaunchWorker, request, LAUNCH_SECONDS)
        except (KeyboardInterrupt, ServiceUnavailable):
            # It may have been born all the same, and nobody would own it.
            with contextlib.suppress(HayflickError):
                self._stop(manifest.worker_id, resources_pb2.END_REASON_KILLED, "its launch was given up")
            raise
        while len(self._launched) >= MAX_REMEMBERED:
            del self._launched[next(iter(self._launched))]
        self._launched[manifest.worker_id] = manifest

    def run_task(self, worker_id: str, task: Task, on_event: Callable[[Event], None]) -> None:
        """Run *task* and hand over what happens; :meth:`Worker.perform_task` is what you want.

        An exception that leaves this, an interrupt too, hangs up and so ends the task.

        Raises:
            HayflickError: The task could not be run.
        """
        request = _rpc.from_json(task.to_json(worker_id), orchestrator_pb2.RunTaskRequest())
        with self._connection.stream(self._stub.RunTask, request) as responses:
            for response in responses:
                event = _event(response)
                if event is not None:
                    on_event(event)

    def put_file(
        self, worker: Worker | str, path: str, data: bytes | BinaryIO, *, executable: bool = False
    ) -> FileSummary:
        """Write a file into a worker's workspace: all of it, or nothing.

        Args:
            worker: Which, or its id.
            path: Relative to ``/workspace``, without ``..``; no link on the way is followed.
                Missing directories are made, and a file of that name is replaced.
            data: Bytes, or a file opened in binary mode, which is read to its end;
                1 GiB at most.
            executable: Whether it is a program.

        Raises:
            NotAllowed: ``FILE_REFUSED``: the worker has something else there.
            TooLarge: It finds no room in the workspace, or is over a limit.
            ReplicationDenied, WorkerEnded, NotFound: The worker is quarantined, ended, or not here.
            NodeFull: The worker has no process left, or four transfers going.
            TaskTimeout: Nothing moved for half a minute.
            ServiceUnavailable: A service is not there.
            ValueError: An argument is not valid.
        """
        source = _files.readable(data)
        requests = _files.requests(
            _worker_id(worker),
            _files.checked_path(path),
            source,
            executable=_checks.flag("executable", executable),
        )
        answer = self._connection.upload(self._stub.PutFile, requests)
        return FileSummary(answer.size_bytes, answer.sha256)

    def get_file(
        self,
        worker: Worker | str,
        path: str,
        *,
        max_bytes: int = _files.DEFAULT_GET_BYTES,
        into: BinaryIO | None = None,
    ) -> bytes:
        """Read a regular file from a worker's workspace.

        What is in it was made inside the sandbox: treat it as what a stranger wrote.

        Args:
            worker: Which, or its id.
            path: Relative to ``/workspace``, without ``..``; no link is followed.
            max_bytes: Refuse a larger file; 1 GiB at most.
            into: A file to write it to; then nothing is returned but ``b""``. When
                this raises, what was written to it is to be thrown away.

        Raises:
            NotFound: There is no such file, or no such worker.
            NotAllowed: ``FILE_REFUSED``: it is a link, a pipe, a socket or a directory.
            TooLarge: It is larger than *max_bytes*.
            HayflickError: As :meth:`put_file`.
        """
        request = orchestrator_pb2.GetFileRequest(
            worker_id=_worker_id(worker),
            path=_files.checked_path(path),
            max_bytes=_checks.integer("max_bytes", max_bytes, 1, _files.MAX_FILE_BYTES),
        )
        buffer = io.BytesIO()
        with self._connection.stream(self._stub.GetFile, request) as responses:
            _files.receive(responses, buffer if into is None else into)
        return buffer.getvalue()

    def kill_worker(self, worker_id: str, reason: str = "killed") -> None:
        """End a worker and all its descendants; return when all are seen dead.

        A worker that has ended stays as it is.

        Args:
            worker_id: Which.
            reason: In your words, for the audit log; 256 characters.

        Raises:
            NotFound: This node never ran such a worker.
            ServiceUnavailable: A service is not there.
        """
        try:
            self._stop(worker_id, resources_pb2.END_REASON_KILLED, reason)
        except WorkerEnded:
            return
        except NotFound:
            if worker_id not in self._launched:
                raise

    def shut_down_worker(self, worker_id: str, reason: str) -> None:
        """End a worker whose work is done, and all its descendants.

        Raises:
            NotFound, WorkerEnded: It has ended, or never ran here.
            ServiceUnavailable: A service is not there.
        """
        self._stop(worker_id, resources_pb2.END_REASON_COMPLETED, reason)

    def kill_all(self, reason: str = "killed") -> list[str]:
        """End every worker on the node, of every contract, and return their ids.

        Births go on; to stop those too, use the kill switch of the controller.

        Raises:
            ServiceUnavailable: A service is not there.
        """
        living = self._living()
        for worker_id, record in living.items():
            if record.manifest.parent_id not in living:  # the others end with their ancestors
                with contextlib.suppress(NotFound, WorkerEnded):
                    self._stop(worker_id, resources_pb2.END_REASON_KILLED, reason)
        return list(living)

    def evidence(self, worker_id: str) -> Evidence:
        """Return what was captured when a worker was last quarantined.

        A capture that is in progress is waited for.

        Raises:
            NotFound: No evidence of it is kept on this node.
            ServiceUnavailable: The service is not there.
        """
        request = orchestrator_pb2.GetEvidenceRequest(
            worker_id=_checks.text("worker_id", worker_id, 64, min_chars=1)
        )
        pieces: list[bytes] = []
        told = ""
        with self._connection.stream(self._stub.GetEvidence, request) as responses:
            for response in responses:
                pieces.append(response.data)
                told = response.summary.sha256 or told
        data = b"".join(pieces)
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 != told:
            raise InternalError(f"the evidence of {worker_id} did not arrive whole: {sha256} is not {told!r}")
        return Evidence(worker_id, data, sha256)

    def _stop(self, worker_id: str, why: resources_pb2.EndReason.ValueType, detail: str) -> None:
        request = orchestrator_pb2.StopWorkerRequest(
            request_id=_rpc.request_id(),
            worker_id=_checks.text("worker_id", worker_id, 64, min_chars=1),
            reason=why,
            detail=_checks.text("reason", detail, MAX_REASON_CHARS),
        )
        self._connection.call(self._stub.StopWorker, request)

    def _living(self) -> dict[str, ContainerRecord]:
        records: dict[str, ContainerRecord] = {}
        token = ""
        while True:
            request = orchestrator_pb2.ListSandboxesRequest(page_size=PAGE_SIZE, page_token=token)
            answer = self._connection.call(self._stub.ListSandboxes, request)
            for sandbox in answer.sandboxes:
                records[sandbox.worker.worker_id] = _living_record(sandbox)
            token = answer.next_page_token
            if not token:
                return records

    def _ended(self, worker_id: str, known: Manifest | ContainerRecord) -> ContainerRecord:
        if isinstance(known, ContainerRecord):
            return known
        entry = self._on_record(worker_id)
        record = ContainerRecord(
            manifest=known,
            resources=known.resources,
            status=Stage.ENDED,
            started_at=entry.created_at if entry else None,
            reason=entry.exit.reason.value if entry and entry.exit and entry.exit.reason else "",
        )
        if record.reason:
            self._launched[worker_id] = record
        return record

    def _on_record(self, worker_id: str) -> RegistryEntry | None:
        """Return what the controller knows of a worker, where a controller is known here."""
        with contextlib.suppress(HayflickError):
            address = self.endpoint.runtime.address("controller") if self.endpoint.runtime else None
            connection = _rpc.connect(_embedded.resolve("controller", address))
            stub = controller_pb2_grpc.ControllerServiceStub(connection.channel)
            request = controller_pb2.GetWorkerRequest(worker_id=worker_id)
            return _wire.worker_from_json(_rpc.to_json(connection.call(stub.GetWorker, request).worker))
        return None


def _worker_id(worker: Worker | str) -> str:
    return _checks.text("worker", getattr(worker, "worker_id", worker), 64, min_chars=1)


def _living_record(sandbox: orchestrator_pb2.Sandbox) -> ContainerRecord:
    entry = _wire.worker_from_json(_rpc.to_json(sandbox.worker))
    return ContainerRecord(
        manifest=entry.manifest,
        resources=entry.manifest.resources,
        status=entry.stage,
        started_at=_wire.instant(sandbox.ready_time.ToJsonString())
        if sandbox.HasField("ready_time")
        else None,
        host_pid=sandbox.host_pid,
        host_uid=sandbox.host_uid,
        cgroup_path=sandbox.cgroup_path,
        build_seconds=sandbox.build_time.ToNanoseconds() / 1_000_000_000,
    )


def _event(response: orchestrator_pb2.RunTaskResponse) -> Event | None:
    if response.HasField("output"):  # by the shortest way: there may be gigabytes of it
        is_stderr = response.output.stream == orchestrator_pb2.STREAM_STDERR
        stream: Literal["stdout", "stderr"] = "stderr" if is_stderr else "stdout"
        return Output(stream, response.output.data)
    return event_from_json(_rpc.to_json(response))
