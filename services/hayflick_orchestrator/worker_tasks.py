"""Tasks of workers: may it run, run it, judge how it ended, and what that means for the worker."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

from google.protobuf.json_format import MessageToDict

from hayflick.v1.errors_pb2 import ErrorReason
from hayflick.v1.orchestrator_pb2 import (
    RunTaskResponse,
    Stream,
    Task,
    TaskException,
    TaskOutcome,
    TaskOutput,
    TaskResult,
    TaskStarted,
)
from hayflick.v1.resources_pb2 import EndReason
from hayflick_orchestrator.exits import TaskFacts, ask_after_task, judge_task
from hayflick_orchestrator.lifecycle import Ask
from hayflick_orchestrator.requests import task_spec
from hayflick_orchestrator.sandboxes import SandboxError
from hayflick_orchestrator.tasks import Output, TaskEnd, TaskRun
from hayflick_rpc import wire
from hayflick_rpc.errors import HayflickError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from hayflick_orchestrator.control import Dispatch
    from hayflick_orchestrator.records import Records
    from hayflick_orchestrator.supervisor import Supervisor
    from hayflick_orchestrator.workers import Worker

# A task costs the orchestrator up to four descriptors and a frame of memory.
MAX_TASKS_PER_WORKER = 64
# How long a result waits for the end of the worker that the task brought about.
WORKER_END_SECONDS = 5.0

DEFAULT_OUTPUT_BYTES = 1024 * 1024 * 1024
# Where this layer is missing, RLIMIT_AS stands in.
MEMORY_LAYER = "memory"

_STREAMS = {Output.STDOUT: Stream.STREAM_STDOUT, Output.STDERR: Stream.STREAM_STDERR}


class WorkerTasks:
    """Runs tasks in workers.

    Attributes:
        dispatch_for: Makes what answers the calls of a worker's tasks; set once
            by whoever wires the service, because calls may run tasks in turn.
    """

    def __init__(self, supervisor: Supervisor, records: Records) -> None:
        self._supervisor = supervisor
        self._records = records
        self.dispatch_for: Callable[[Worker], Dispatch] | None = None

    def start(self, worker: Worker, task: Task) -> TaskRun:
        """Start *task* in *worker*.

        Raises:
            HayflickError: WORKER_EXPIRED, KILL_SWITCH_ENGAGED, QUARANTINED or
                WORKER_NOT_RUNNING; INVALID_FIELD, TOO_LARGE or
                PYTHON_VERSION_MISMATCH; NODE_FULL; SANDBOX_FAILED.
        """
        if worker.expired() and not worker.life.ending:
            # The timer is about to fire; whoever asks now must not slip past it.
            self._supervisor.ask_end(
                worker, Ask(EndReason.END_REASON_EXPIRED, "its life by contract is over")
            )
        worker.require_running()
        info = {"worker": MessageToDict(worker.message())} if task.HasField("python") else {}
        spec = replace(
            task_spec(task, info),
            output_limit_bytes=worker.record.resources.output_limit_bytes or DEFAULT_OUTPUT_BYTES,
        )
        if len(worker.sandbox.tasks) >= MAX_TASKS_PER_WORKER:
            raise HayflickError(
                ErrorReason.ERROR_REASON_NODE_FULL,
                f"worker {worker.worker_id} runs {MAX_TASKS_PER_WORKER} tasks already",
                metadata={"limit": "tasks_per_worker"},
            )
        dispatch = self.dispatch_for(worker) if self.dispatch_for is not None else None
        run = TaskRun(worker.sandbox, spec, dispatch)
        try:
            run.start()
        except (SandboxError, OSError) as error:
            raise HayflickError(
                ErrorReason.ERROR_REASON_SANDBOX_FAILED,
                f"the task could not be started: {error}",
                metadata={"step": "run task", "errno": str(error.errno or 0)},
            ) from error
        self._records.task_started(worker.record, run.task_id, spec.kind)
        return run

    async def stream(
        self, worker: Worker, task: Task, *, keep_worker_on_error: bool, started: Callable[[TaskRun], None]
    ) -> AsyncGenerator[RunTaskResponse, None]:
        """Run *task* in *worker* and yield what it does; closing the iterator ends the task.

        Args:
            worker: Where.
            task: What.
            keep_worker_on_error: Whether the worker lives on when the task fails.
            started: Told of the run, to be able to cancel it from elsewhere.

        Raises:
            HayflickError: as :meth:`start`.
        """
        run = self.start(worker, task)
        started(run)
        finished = False
        try:
            yield RunTaskResponse(started=TaskStarted(task_id=run.task_id))
            # Closed here and now, so that its readers are gone before its pipes.
            async with contextlib.aclosing(run.chunks()) as chunks:
                async for output, data in chunks:
                    yield RunTaskResponse(output=TaskOutput(stream=_STREAMS[output], data=data))
            result = await self._finish(worker, task, run, keep_worker_on_error=keep_worker_on_error)
            finished = True
            yield RunTaskResponse(result=result)
        finally:
            if not finished:
                run.cancel()
                # Seen to its end by someone who is not being cancelled.
                self._supervisor.spawn(
                    self._finish(worker, task, run, keep_worker_on_error=True), f"task {run.task_id}"
                )

    async def run_main(self, worker: Worker, run: TaskRun, task: Task) -> None:
        """See a main task to its end, and the worker with it."""
        await run.discard_output()
        result = await self._finish(worker, task, run, keep_worker_on_error=False)
        if result.outcome == TaskOutcome.TASK_OUTCOME_SUCCEEDED:
            self._supervisor.ask_end(worker, Ask(EndReason.END_REASON_COMPLETED, "its main task succeeded"))

    async def _finish(
        self, worker: Worker, task: Task, run: TaskRun, *, keep_worker_on_error: bool
    ) -> TaskResult:
        end = await run.end()
        oom_kills = self._supervisor.check_memory(worker)
        facts = _facts(worker, task, end, oom_kills)
        outcome = judge_task(facts)
        self._records.task_finished(
            worker.record,
            run.task_id,
            outcome=TaskOutcome.Name(outcome).removeprefix("TASK_OUTCOME_").lower(),
            reason=end.violation,
            cpu_seconds=end.cpu_seconds,
            elapsed_seconds=end.elapsed_seconds,
        )
        ask = ask_after_task(
            outcome,
            keep_worker_on_error=keep_worker_on_error,
            violation=end.violation,
            oom_kills=oom_kills,
        )
        if ask is not None:
            self._supervisor.ask_end(worker, ask)
        end_reason = EndReason.END_REASON_UNSPECIFIED
        if worker.life.ending and (ask is not None or facts.worker_ended):
            # The caller shall find the worker as the result says.
            await asyncio.wait({worker.ended}, timeout=WORKER_END_SECONDS)
            if worker.verdict.done():
                end_reason = worker.verdict.result().reason
            elif worker.life.ask is not None:
                end_reason = worker.life.ask.reason
        return _result(outcome, end, end_reason)


def _facts(worker: Worker, task: Task, end: TaskEnd, oom_kills: int) -> TaskFacts:
    return TaskFacts(
        callable_task=task.HasField("python"),
        worker_ended=worker.life.ending,
        cancelled=end.cancelled,
        timed_out=end.timed_out,
        output_exceeded=end.output_exceeded,
        violation=end.violation,
        oom_kills=oom_kills,
        exit_code=end.exit_code,
        signal=end.signal,
        cpu_seconds=end.cpu_seconds,
        cpu_limit_seconds=worker.cpu_limit_seconds,
        has_value=end.value_json is not None,
        has_exception=end.raised is not None,
        address_space_full=_ran_into_address_space(worker, end),
    )


def _ran_into_address_space(worker: Worker, end: TaskEnd) -> bool:
    # Where control groups limit memory, no allocation fails: the kernel kills.
    limited = MEMORY_LAYER in worker.record.degraded_layers
    return limited and end.raised is not None and end.raised.type == "builtins.MemoryError"


def _result(outcome: TaskOutcome.ValueType, end: TaskEnd, end_reason: EndReason.ValueType) -> TaskResult:
    result = TaskResult(
        outcome=outcome,
        exit_code=end.exit_code or 0,
        signal=end.signal or 0,
        cpu_time=wire.duration(end.cpu_seconds),
        elapsed=wire.duration(end.elapsed_seconds),
        end_reason=end_reason,
    )
    if outcome == TaskOutcome.TASK_OUTCOME_SUCCEEDED:
        result.value_json = end.value_json or ""
    elif end.violation:
        # Said by us, not by the task, so it carries our name.
        result.exception.CopyFrom(TaskException(type="hayflick.ProtocolViolation", message=end.violation))
    elif end.raised is not None:
        result.exception.CopyFrom(
            TaskException(type=end.raised.type, message=end.raised.message, traceback=end.raised.traceback)
        )
    return result
