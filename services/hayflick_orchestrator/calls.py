"""What a worker may ask of its orchestrator: itself, a child, its descendants.

The caller is never named in a request: it is whoever the line was made for.
Serves the frames of a task's control stream as well as gRPC.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from typing import TYPE_CHECKING, TypeVar

from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from google.protobuf.message import Message

from hayflick.v1 import worker_pb2
from hayflick.v1.controller_pb2 import IssueManifestRequest
from hayflick.v1.errors_pb2 import ErrorReason
from hayflick.v1.resources_pb2 import EndReason
from hayflick.v1.resources_pb2 import Worker as WorkerMessage
from hayflick_orchestrator.idempotency import Once
from hayflick_orchestrator.lifecycle import Ask
from hayflick_orchestrator.requests import checked_detail
from hayflick_rpc.errors import HayflickError, invalid_field
from hayflick_rpc.wire import require_request_id

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from hayflick_orchestrator.control import Dispatch, Emit, Json
    from hayflick_orchestrator.controller_client import ControllerClient
    from hayflick_orchestrator.launcher import Launcher
    from hayflick_orchestrator.supervisor import Everyone, Supervisor
    from hayflick_orchestrator.tasks import TaskRun
    from hayflick_orchestrator.worker_tasks import WorkerTasks
    from hayflick_orchestrator.workers import Worker

M = TypeVar("M", bound=Message)


class WorkerCalls:
    """WorkerService without a transport."""

    def __init__(
        self,
        population: Everyone,
        supervisor: Supervisor,
        launcher: Launcher,
        *,
        tasks: WorkerTasks,
        controller: ControllerClient,
        on_launch: Callable[[], None],
    ) -> None:
        self._population = population
        self._supervisor = supervisor
        self._launcher = launcher
        self._tasks = tasks
        self._controller = controller
        self._on_launch = on_launch
        self._once = Once()

    async def get_self(self, caller: Worker) -> worker_pb2.GetSelfResponse:
        """Tell the caller who it is."""
        return worker_pb2.GetSelfResponse(worker=caller.message())

    async def replicate(
        self, caller: Worker, request: worker_pb2.ReplicateRequest
    ) -> worker_pb2.ReplicateResponse:
        """Give the caller a child, if its contract allows one.

        Raises:
            HayflickError: CONTROLLER_NOT_ALLOWED; whatever denies the birth or
                keeps it from happening.
        """
        _require_allowed(caller)
        request_id = own_request_id(caller, request.request_id)

        async def work() -> worker_pb2.ReplicateResponse:
            async with caller.births.one():
                await _released(caller)
                self._launcher.require_open()
                caller.require_running()
                manifest = await self._controller.issue(
                    IssueManifestRequest(
                        request_id=request_id,
                        contract_id=caller.contract_id,
                        parent_id=caller.worker_id,
                        state_snapshot_json=request.state_snapshot_json,
                        resources=request.resources if request.HasField("resources") else None,
                        reason=request.reason,
                    )
                )
                child = await self._launcher.launch(manifest)
            self._on_launch()
            return worker_pb2.ReplicateResponse(worker=child.message())

        return await self._once.run("Replicate", request_id, request, work)

    async def run_descendant_task(
        self, caller: Worker, request: worker_pb2.RunDescendantTaskRequest, started: Callable[[TaskRun], None]
    ) -> AsyncGenerator[worker_pb2.RunDescendantTaskResponse, None]:
        """Run a task in a descendant of the caller and yield what it does.

        Raises:
            HayflickError: CONTROLLER_NOT_ALLOWED, NOT_A_DESCENDANT, and as
                ``OrchestratorService.RunTask``.
        """
        _require_allowed(caller)
        await _released(caller)
        worker = self._descendant(caller, request.worker_id)
        events = self._tasks.stream(
            worker, request.task, keep_worker_on_error=request.keep_worker_on_error, started=started
        )
        async with contextlib.aclosing(events):
            async for event in events:
                yield worker_pb2.RunDescendantTaskResponse(event=event)

    async def shutdown(
        self, caller: Worker, request: worker_pb2.ShutdownRequest
    ) -> worker_pb2.ShutdownResponse:
        """End the caller or a descendant of it.

        Raises:
            HayflickError: CONTROLLER_NOT_ALLOWED or NOT_A_DESCENDANT for another
                than the caller itself.
        """
        require_request_id(request.request_id)
        ask = Ask(EndReason.END_REASON_COMPLETED, checked_detail(request.detail))
        await _released(caller)
        if request.worker_id in ("", caller.worker_id):
            worker = caller
        else:
            _require_allowed(caller)
            ended = self._ended_descendant(caller, request.worker_id)
            if ended is not None:
                return worker_pb2.ShutdownResponse(worker=ended)
            worker = self._descendant(caller, request.worker_id)
        self._supervisor.ask_end(worker, ask)
        # The caller's own end cancels this wait, never the end itself.
        return worker_pb2.ShutdownResponse(worker=await asyncio.shield(worker.ended))

    def _descendant(self, caller: Worker, worker_id: str) -> Worker:
        worker = self._population.get(worker_id)
        if worker is None or not self._population.is_descendant(worker_id, caller.worker_id):
            # The same words for one that is not there and one that is not
            # theirs: a worker learns nothing of strangers.
            raise HayflickError(
                ErrorReason.ERROR_REASON_NOT_A_DESCENDANT,
                f"{worker_id[:64]!r} is not a living descendant of {caller.worker_id}",
                metadata={"worker_id": worker_id[:64]},
            )
        return worker

    def _ended_descendant(self, caller: Worker, worker_id: str) -> WorkerMessage | None:
        """Return the record of a descendant that ended already."""
        first = record = self._population.remembered(worker_id)
        while record is not None and record.parent_id:
            if record.parent_id == caller.worker_id:
                return first
            alive = self._population.get(record.parent_id)
            record = alive.record if alive is not None else self._population.remembered(record.parent_id)
        return None

    def dispatch_for(self, caller: Worker) -> Dispatch:
        """Return what answers the calls that *caller*'s tasks make in frames."""

        async def dispatch(method: str, request: Json, emit: Emit) -> Json:
            match method:
                case "GetSelf":
                    parse(request, worker_pb2.GetSelfRequest())
                    return MessageToDict(await self.get_self(caller))
                case "Replicate":
                    return MessageToDict(
                        await self.replicate(caller, parse(request, worker_pb2.ReplicateRequest()))
                    )
                case "Shutdown":
                    return MessageToDict(
                        await self.shutdown(caller, parse(request, worker_pb2.ShutdownRequest()))
                    )
                case "RunDescendantTask":
                    wanted = parse(request, worker_pb2.RunDescendantTaskRequest())
                    events = self.run_descendant_task(caller, wanted, lambda _: None)
                    async with contextlib.aclosing(events):
                        async for event in events:
                            await emit(MessageToDict(event))
                    return {}
                case _:
                    raise invalid_field("method", f"WorkerService has no method {method[:64]!r}")

        return dispatch


def own_request_id(caller: Worker, request_id: str) -> str:
    """Return a request_id for the controller that no other worker's choice can meet."""
    require_request_id(request_id)
    digest = hashlib.sha256(f"{caller.worker_id}/{request_id}".encode()).hexdigest()
    return f"w-{digest[:48]}"


def parse(request: Json, message: M) -> M:
    """Fill *message* from the proto3 JSON in *request*.

    Raises:
        HayflickError: INVALID_FIELD.
    """
    try:
        return ParseDict(request, message)
    except (ParseError, RecursionError, TypeError, ValueError) as error:
        raise invalid_field("request", f"is not a {message.DESCRIPTOR.name}: {error}"[:512]) from None


async def _released(caller: Worker) -> None:
    """Wait out the caller's quarantine: a call that came in just before it is not acted upon in it."""
    await caller.sandbox.gate.passage((caller.sandbox.dead,))


def _require_allowed(caller: Worker) -> None:
    if not caller.may_call:
        raise HayflickError(
            ErrorReason.ERROR_REASON_CONTROLLER_NOT_ALLOWED,
            "this worker's network policy does not allow it to replicate or to drive descendants",
            metadata={"worker_id": caller.worker_id},
        )
