"""What runs inside a sandbox: a user's callable, with its own worker as argument.

Preloaded by the zygote and forked into every worker, so it imports the standard
library, cloudpickle and the light modules of this package; never gRPC or
protobuf. A test holds it to that.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import cloudpickle

from replication import _checks, _error_table, _wire
from replication._manifest import MAX_SNAPSHOT_BYTES
from replication._task import Event, Task, event_from_json
from replication.errors import NotAllowed, ServiceUnavailable
from replication.worker import Worker

if TYPE_CHECKING:
    from replication._records import RegistryEntry, WorkerState
    from replication.contract import ResourceSpec


class CallError(Exception):
    """What a channel raises when the orchestrator says no."""

    reason: str
    message: str
    metadata: Mapping[str, str]
    retry_after_seconds: float | None


class Channel(Protocol):
    """The worker's own line to its orchestrator, which knows who is on it."""

    CallError: type[CallError]

    def call(
        self,
        method: str,
        request: dict[str, Any],
        on_event: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """Call *method* of ``hayflick.v1.WorkerService``, in proto3 JSON."""


def run(payload: bytes, channel: Channel, info: Mapping[str, Any]) -> Any:  # noqa: ANN401 -- any JSON value
    """Unpickle a task and call it with the worker it runs in.

    Args:
        payload: The task, as :func:`replication._callables.pickle_callable` made it.
        channel: The line to the orchestrator.
        info: ``worker``: a ``hayflick.v1.Worker`` in proto3 JSON.

    Returns:
        What the task returned.
    """
    record = info.get("worker") or channel.call("GetSelf", {})["worker"]
    worker = InsideWorker(channel, _wire.worker_from_json(record), is_self=True)
    # The sandbox is where this may be done: what it unpickles can harm nothing else.
    task: Callable[[Worker], Any] = cloudpickle.loads(payload)
    return task(worker)


def evaluate(payload: bytes, channel: Channel, info: Mapping[str, Any]) -> object:
    """Unpickle a stop condition's predicate, ask it, and return whatever it gave.

    Anything but a bool denies; to say so is the orchestrator's business.

    Args:
        payload: The predicate, pickled.
        channel: Not used: a predicate decides on what it is told.
        info: ``context``: the facts, as ``EvaluateOrder.context_json`` has them.
    """
    del channel
    context = _wire.context_from_json(info["context"])
    predicate: Callable[[object], object] = cloudpickle.loads(payload)
    return predicate(context)


class InsideWorker(Worker):
    """A worker as it sees itself and its descendants from inside the sandbox.

    ``contract``, ``controller``, ``orchestrator`` and ``logger`` are outside, and
    not there.
    """

    def __init__(self, channel: Channel, record: RegistryEntry, *, is_self: bool) -> None:
        # Not super().__init__(): that would launch.
        self.manifest = record.manifest
        self._channel = channel
        self._record = record
        self._is_self = is_self

    @property
    def state(self) -> WorkerState:
        """Where it is in its life: of the worker itself, now; of a descendant, at its birth."""
        if self._is_self:
            self._record = _wire.worker_from_json(self._call("GetSelf", {})["worker"])
        return self._record

    def put_file(self, *_: Any, **__: Any) -> NoReturn:  # noqa: ANN401 -- as its parent's
        """Say no: files go in and out through the orchestrator, which is outside."""
        raise NotAllowed("put_file: only from outside; a worker's own files are below /workspace")

    def get_file(self, *_: Any, **__: Any) -> NoReturn:  # noqa: ANN401 -- as its parent's
        """Say no: files go in and out through the orchestrator, which is outside."""
        raise NotAllowed("get_file: only from outside; a worker's own files are below /workspace")

    def _run(self, task: Task, on_event: Callable[[Event], None]) -> None:
        failures: list[Exception] = []

        def relay(message: dict[str, Any]) -> None:
            event = event_from_json(message.get("event", {}))
            try:
                if event is not None and not failures:
                    on_event(event)
            except Exception as error:  # noqa: BLE001 -- raised below
                # The line is shared by all of this task's calls: each must be heard out.
                failures.append(error)

        self._call("RunDescendantTask", task.to_json(self.worker_id), relay)
        if failures:
            raise failures[0]

    def _replicate(self, reason: str, snapshot: Mapping[str, Any], resources: ResourceSpec | None) -> Worker:
        request: dict[str, Any] = {
            "requestId": secrets.token_hex(16),
            "reason": reason,
            "stateSnapshotJson": _checks.json_object("state_snapshot", snapshot, MAX_SNAPSHOT_BYTES),
        }
        if resources is not None:
            request["resources"] = _wire.resources_to_json(resources)
        response = self._call("Replicate", request)
        return InsideWorker(self._channel, _wire.worker_from_json(response["worker"]), is_self=False)

    def _stop(self, reason: str) -> None:
        target = "" if self._is_self else self.worker_id
        request = {"requestId": secrets.token_hex(16), "workerId": target, "detail": reason}
        self._call("Shutdown", request)

    def _call(
        self,
        method: str,
        request: dict[str, Any],
        on_event: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        try:
            return self._channel.call(method, request, on_event)
        except self._channel.CallError as error:
            raise _error_table.error(
                error.reason,
                error.message,
                error.metadata,
                retry_after_seconds=error.retry_after_seconds,
            ) from None
        except ConnectionError as error:
            raise ServiceUnavailable(f"the orchestrator is gone: {error}") from None
