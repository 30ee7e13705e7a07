"""A worker, as its owner and as itself see it.

Cheap to import, inside a sandbox as well, where the ``worker`` that a task is
given is a :class:`Worker` too.
"""

# ruff: noqa: TRY004 -- users are promised one kind of error for every bad value

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, Self, TypeAlias

from replication import _checks, _error_table
from replication._manifest import Manifest
from replication._records import EndReason, Stage, Usage, WorkerExit, WorkerState
from replication._task import Event, Task, call_task, command_task, finish
from replication.contract import ReplicationContract, ResourceSpec
from replication.errors import NotFound, ReplicationDenied, WorkerEnded

if TYPE_CHECKING:
    from types import TracebackType

    from replication._files import FileSummary
    from replication.controller import Controller
    from replication.observability import StructuredLogger
    from replication.orchestrator import SandboxOrchestrator

__all__ = ["EndReason", "Stage", "TaskFunction", "Usage", "Worker", "WorkerExit", "WorkerState"]

MAX_REASON_CHARS = 256
DEFAULT_GET_BYTES = 64 * 1024 * 1024

TaskFunction: TypeAlias = Callable[["Worker"], Any]
"""What a worker can be given to do; its value must be JSON."""


class Worker:
    """A process of its own in a sandbox of its own, born under a contract.

    Making one registers *manifest* with the controller and starts the sandbox; it
    is running when this returns. As a context manager it is shut down at the end.

    Args:
        manifest: From :meth:`Controller.issue_manifest`; good once.
        contract: The contract it was issued under.
        controller: The controller that issued it.
        orchestrator: The orchestrator of the node to run on.
        logger: Kept as an attribute; the services log by themselves.

    Raises:
        ReplicationDenied: Policy says no.
        LimitNotEnforceable: This machine lacks a layer of the sandbox.
        ServiceUnavailable: A service is not there.
        ValueError: The arguments do not belong together.
    """

    manifest: Manifest
    """What it was born with."""
    contract: ReplicationContract
    controller: Controller
    orchestrator: SandboxOrchestrator
    logger: StructuredLogger | None

    def __init__(
        self,
        manifest: Manifest,
        contract: ReplicationContract,
        controller: Controller,
        orchestrator: SandboxOrchestrator,
        logger: StructuredLogger | None = None,
    ) -> None:
        if not isinstance(manifest, Manifest):
            raise ValueError(f"manifest: must be a Manifest, not {type(manifest).__name__}")
        if contract is not controller.contract and contract != controller.contract:
            raise ValueError("contract: is not the contract of this controller")
        if not controller.shares_services_with(orchestrator):
            raise ValueError("orchestrator: belongs to other services than the controller")
        self.manifest = manifest
        self.contract = contract
        self.controller = controller
        self.orchestrator = orchestrator
        self.logger = logger
        orchestrator.launch_worker(manifest)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.worker_id} depth={self.manifest.depth}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Worker stays where it is; a task is given its own worker as an argument")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.shutdown("completed" if kind is None else f"its owner raised {kind.__name__}")

    @property
    def worker_id(self) -> str:
        """Its identity, from its manifest."""
        return self.manifest.worker_id

    @property
    def state(self) -> WorkerState:
        """Where it is in its life, asked of the controller now."""
        return self.controller.worker(self.worker_id)

    def perform_task(
        self,
        task: TaskFunction,
        timeout_seconds: float | None = None,
        *,
        keep_worker_on_error: bool = False,
    ) -> Any:  # noqa: ANN401 -- any JSON value
        """Call *task* inside the sandbox, with the worker as its argument, and return its value.

        What it prints appears on ``sys.stdout`` and ``sys.stderr`` as it comes.
        An interrupt (Ctrl-C) ends the task.

        Args:
            task: Travels by value. Its return value must be JSON.
            timeout_seconds: How long it may run; ``None``: as long as the worker lives.
            keep_worker_on_error: Whether the worker lives on when the task fails.

        Raises:
            ReplicationDenied: The worker's life is over: ``WORKER_EXPIRED`` or
                ``KILL_SWITCH_ENGAGED``.
            TaskError: It raised.
            TaskTimeout: It ran longer than allowed.
            TaskKilled: A signal or one of its limits ended it.
            WorkerEnded: The worker has ended otherwise.
            NotPicklable, TooLarge: *task* cannot travel.
            ServiceUnavailable: A service is not there.
        """
        return self._perform(
            call_task(task, timeout_seconds=timeout_seconds, keep_worker_on_error=keep_worker_on_error)
        )

    def perform_command(
        self,
        argv: Sequence[str],
        timeout_seconds: float | None = None,
        *,
        environment: Mapping[str, str] | None = None,
        keep_worker_on_error: bool = False,
    ) -> None:
        """Run a program that the sandbox can see, and return when it exited with 0.

        Args:
            argv: The program and its arguments; there is no shell.
            timeout_seconds: How long it may run; ``None``: as long as the worker lives.
            environment: Added to the sandbox's own small environment.
            keep_worker_on_error: Whether the worker lives on when it fails.

        Raises:
            TaskError: It exited with another code, which is in ``exit_code``.
            HayflickError: As :meth:`perform_task` raises.
            ValueError: An argument is not valid.
        """
        self._perform(
            command_task(
                argv,
                environment=environment,
                timeout_seconds=timeout_seconds,
                keep_worker_on_error=keep_worker_on_error,
            )
        )

    def put_file(self, path: str, data: bytes | BinaryIO, *, executable: bool = False) -> FileSummary:
        """Write a file into the worker's workspace, as :meth:`SandboxOrchestrator.put_file`."""
        return self.orchestrator.put_file(self, path, data, executable=executable)

    def get_file(
        self, path: str, *, max_bytes: int = DEFAULT_GET_BYTES, into: BinaryIO | None = None
    ) -> bytes:
        """Read a file from the worker's workspace, as :meth:`SandboxOrchestrator.get_file`."""
        return self.orchestrator.get_file(self, path, max_bytes=max_bytes, into=into)

    def maybe_replicate(
        self,
        reason: str,
        state_snapshot: Mapping[str, Any] | None = None,
        resources: ResourceSpec | None = None,
    ) -> Worker | None:
        """Ask for a child; return ``None`` when policy says no.

        Args and other errors are those of :meth:`replicate`, which says why not.
        """
        try:
            return self.replicate(reason, state_snapshot, resources)
        except ReplicationDenied:
            return None

    def replicate(
        self,
        reason: str,
        state_snapshot: Mapping[str, Any] | None = None,
        resources: ResourceSpec | None = None,
    ) -> Worker:
        """Ask for a child and return it, running.

        Args:
            reason: Why, for the audit log; 256 characters.
            state_snapshot: What the child starts from: JSON values, 1 MiB at most;
                ``None``: what this worker started from.
            resources: What the child may use; ``None``: what this worker may use.

        Raises:
            ReplicationDenied: Policy says no; ``reason`` says which rule.
            LimitNotEnforceable: This machine lacks a layer of the sandbox.
            ServiceUnavailable: A service is not there.
            ValueError: An argument is not valid.
        """
        _checks.text("reason", reason, MAX_REASON_CHARS)
        if resources is not None and not isinstance(resources, ResourceSpec):
            raise ValueError(f"resources: must be a ResourceSpec, not {resources!r}")
        snapshot = self.manifest.state_snapshot if state_snapshot is None else state_snapshot
        # Not what it was born with: some of that may have been taken from it since.
        return self._replicate(reason, snapshot, resources)

    def shutdown(self, reason: str = "completed") -> None:
        """End the worker and all its descendants; a worker that has ended stays as it is.

        When this returns, none of their processes runs, and the end is on record.

        Args:
            reason: In your words, for the audit log; 256 characters.

        Raises:
            ServiceUnavailable: A service is not there.
        """
        _checks.text("reason", reason, MAX_REASON_CHARS)
        try:
            self._stop(reason)
        except (WorkerEnded, NotFound, ReplicationDenied):
            return  # it ended before

    def _perform(self, task: Task) -> Any:  # noqa: ANN401 -- any JSON value
        try:
            return finish(lambda on_event: self._run(task, on_event), self.worker_id)
        except (WorkerEnded, NotFound):
            # The orchestrator forgets the dead; the controller has them on record.
            state = self.state
            if state.stage is Stage.QUARANTINED:
                raise ReplicationDenied(
                    f"worker {self.worker_id} is quarantined",
                    reason="QUARANTINED",
                    details={"worker_id": self.worker_id},
                ) from None
            if state.exit is None:
                raise
            raise _error_table.ended(self.worker_id, state.exit.reason, state.exit.detail) from None

    # How it is done: from outside here, from inside in replication._inside.

    def _run(self, task: Task, on_event: Callable[[Event], None]) -> None:
        self.orchestrator.run_task(self.worker_id, task, on_event)

    def _replicate(self, reason: str, snapshot: Mapping[str, Any], resources: ResourceSpec | None) -> Worker:
        manifest = self.controller.issue_manifest(
            parent_id=self.worker_id,
            depth=self.manifest.depth + 1,
            state_snapshot=snapshot,
            resources=resources,
            reason=reason,
        )
        return Worker(manifest, self.contract, self.controller, self.orchestrator, self.logger)

    def _stop(self, reason: str) -> None:
        self.orchestrator.shut_down_worker(self.worker_id, reason)
