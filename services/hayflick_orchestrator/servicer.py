"""OrchestratorService: translates between the wire and the parts, and decides nothing."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import grpc

from hayflick.v1 import orchestrator_pb2 as pb
from hayflick.v1 import orchestrator_pb2_grpc
from hayflick_orchestrator.idempotency import Once
from hayflick_orchestrator.requests import PYTHON_VERSION, stop_ask, task_spec
from hayflick_orchestrator.workers import Worker, refusal_after, worker_unknown
from hayflick_rpc import wire
from hayflick_rpc.attestation import grade_of
from hayflick_rpc.errors import invalid_field
from hayflick_sandbox import grades

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from hayflick.v1.resources_pb2 import DenialCount
    from hayflick_orchestrator.config import Config
    from hayflick_orchestrator.evidence.desk import EvidenceDesk
    from hayflick_orchestrator.launcher import Launcher
    from hayflick_orchestrator.supervisor import Everyone, Supervisor
    from hayflick_orchestrator.tasks import TaskRun
    from hayflick_orchestrator.transfers import Transfers
    from hayflick_orchestrator.worker_tasks import WorkerTasks
    from hayflick_sandbox.probe import Layer

Context = grpc.aio.ServicerContext[Any, Any]


# A page ends early rather than outgrow a message: each worker's snapshot may be a megabyte.
MAX_PAGE_BYTES = 8 * 1024 * 1024


class OrchestratorServicer(orchestrator_pb2_grpc.OrchestratorServiceServicer):
    """The service on its socket."""

    def __init__(
        self,
        config: Config,
        population: Everyone,
        supervisor: Supervisor,
        launcher: Launcher,
        tasks: WorkerTasks,
        *,
        transfers: Transfers,
        evidence: EvidenceDesk,
        layers: Sequence[Layer],
        public_key: bytes,
        denials: Callable[[Worker], list[DenialCount]],
        on_launch: Callable[[], None],
    ) -> None:
        self._config = config
        self._population = population
        self._supervisor = supervisor
        self._launcher = launcher
        self._tasks = tasks
        self._transfers = transfers
        self._evidence = evidence
        self._layers = tuple(layers)
        self._public_key = public_key
        self._denials = denials
        self._on_launch = on_launch
        self._once = Once()

    async def LaunchWorker(  # noqa: N802 -- protoc names it
        self, request: pb.LaunchWorkerRequest, context: Context
    ) -> pb.LaunchWorkerResponse:
        """Registers a manifest and starts its worker."""
        del context
        if not request.HasField("manifest"):
            raise invalid_field("manifest", "is required")
        if request.HasField("main_task"):
            task_spec(request.main_task, {})  # said before a slot is taken

        async def work() -> pb.LaunchWorkerResponse:
            worker = await self._launcher.launch(request.manifest)
            if request.HasField("main_task"):
                run = self._tasks.start(worker, request.main_task)
                self._supervisor.spawn(
                    self._tasks.run_main(worker, run, request.main_task), f"main task of {worker.worker_id}"
                )
            self._on_launch()
            return pb.LaunchWorkerResponse(worker=worker.message())

        return await self._once.run("LaunchWorker", request.request_id, request, work)

    async def RunTask(  # noqa: N802 -- protoc names it
        self, request: pb.RunTaskRequest, context: Context
    ) -> AsyncIterator[pb.RunTaskResponse]:
        """Runs a task in a worker and streams what it does."""
        worker = self._living(request.worker_id)

        def started(run: TaskRun) -> None:
            # The stream below also notices a hang-up, but only when it next
            # has something to say.
            context.add_done_callback(lambda _: run.cancel())  # type: ignore[arg-type]

        events = self._tasks.stream(
            worker, request.task, keep_worker_on_error=request.keep_worker_on_error, started=started
        )
        async with contextlib.aclosing(events):
            async for event in events:
                yield event

    async def StopWorker(  # noqa: N802 -- protoc names it
        self, request: pb.StopWorkerRequest, context: Context
    ) -> pb.StopWorkerResponse:
        """Ends a worker and its descendants."""
        del context
        ask, grace_seconds = stop_ask(request)
        wire.require_id("worker_id", request.worker_id)

        async def work() -> pb.StopWorkerResponse:
            worker = self._population.get(request.worker_id)
            if worker is None:
                ended = self._population.remembered(request.worker_id)
                if ended is None:
                    raise worker_unknown(request.worker_id)
                return pb.StopWorkerResponse(worker=ended)
            return pb.StopWorkerResponse(worker=await self._supervisor.end(worker, ask, grace_seconds))

        return await self._once.run("StopWorker", request.request_id, request, work)

    async def ListSandboxes(  # noqa: N802 -- protoc names it
        self, request: pb.ListSandboxesRequest, context: Context
    ) -> pb.ListSandboxesResponse:
        """Lists the sandboxes that live on this node."""
        del context
        size = wire.page_size(request.page_size)
        mark = wire.fingerprint("ListSandboxes")
        position = wire.decode_page_token(request.page_token, mark)
        after = position[0] if position else 0
        if not isinstance(after, int):
            raise invalid_field("page_token", "is not one of this listing")
        rest = sorted((w for w in self._population if w.serial > after), key=lambda worker: worker.serial)
        answer, left = pb.ListSandboxesResponse(), MAX_PAGE_BYTES
        for worker in rest[:size]:
            sandbox = worker.sandbox_message()
            sandbox.denials.extend(self._denials(worker))
            left -= sandbox.ByteSize()
            if left < 0 and answer.sandboxes:
                break
            answer.sandboxes.append(sandbox)
            last = worker.serial
        if len(answer.sandboxes) < len(rest):
            answer.next_page_token = wire.encode_page_token(mark, last)
        return answer

    async def PutFile(  # noqa: N802 -- protoc names it
        self, request_iterator: AsyncIterator[pb.PutFileRequest], context: Context
    ) -> pb.PutFileResponse:
        """Writes a file into a worker's workspace."""
        del context
        parts = aiter(request_iterator)
        async for first in parts:
            if not first.HasField("header"):
                break
            return await self._transfers.put(self._living(first.header.worker_id), first.header, parts)
        raise invalid_field("header", "must come first")

    async def GetFile(  # noqa: N802 -- protoc names it
        self, request: pb.GetFileRequest, context: Context
    ) -> AsyncIterator[pb.GetFileResponse]:
        """Reads a file from a worker's workspace."""
        del context
        responses = self._transfers.get(self._living(request.worker_id), request)
        async with contextlib.aclosing(responses):
            async for response in responses:
                yield response

    async def GetEvidence(  # noqa: N802 -- protoc names it
        self, request: pb.GetEvidenceRequest, context: Context
    ) -> AsyncIterator[pb.GetEvidenceResponse]:
        """Reads the bundle of evidence of a worker."""
        del context
        wire.require_id("worker_id", request.worker_id)
        responses = self._evidence.get(request.worker_id)
        async with contextlib.aclosing(responses):
            async for response in responses:
                yield response

    async def GetNode(  # noqa: N802 -- protoc names it
        self, request: pb.GetNodeRequest, context: Context
    ) -> pb.GetNodeResponse:
        """Says what this node can enforce."""
        del request, context
        return pb.GetNodeResponse(
            node_id=self._config.node_id,
            python_version=PYTHON_VERSION,
            layers=[
                pb.Layer(name=layer.name, enforced=layer.enforced, detail=layer.detail, remedy=layer.remedy)
                for layer in self._layers
            ],
            allow_degraded=self._config.allow_degraded,
            grade=grade_of(grades.best(layer.name for layer in self._layers if not layer.enforced)),
            attestation_public_key=self._public_key,
        )

    def _living(self, worker_id: str) -> Worker:
        wire.require_id("worker_id", worker_id)
        worker = self._population.get(worker_id)
        if worker is not None:
            return worker
        ended = self._population.remembered(worker_id)
        if ended is None:
            raise worker_unknown(worker_id)
        raise refusal_after(worker_id, ended.exit.reason, ended.state)
