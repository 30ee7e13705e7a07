"""A worker as it sees itself, on a line that is played by the test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import cloudpickle
import pytest

from hayflick.v1 import worker_pb2
from replication import ReplicationContext, ReplicationDenied, ServiceUnavailable, Worker, _inside, _rpc

RECORD: dict[str, Any] = {
    "workerId": "aa00",
    "state": "STATE_RUNNING",
    "manifest": {
        "workerId": "aa00",
        "stateSnapshotJson": '{"from": "parent"}',
        "issueTime": "2026-01-02T03:04:05Z",
        "resources": {
            "cpuMillis": 500,
            "memoryLimitBytes": "268435456",
            "network": {"allowController": True},
        },
    },
}
CHILD = {**RECORD, "workerId": "bb11", "manifest": {**RECORD["manifest"], "workerId": "bb11", "depth": 1}}


class CallError(Exception):
    def __init__(self, reason: str) -> None:
        self.reason = reason
        self.message = "no"
        self.metadata: Mapping[str, str] = {}
        self.retry_after_seconds: float | None = 0.25


class Line:
    """The other end of a worker's line, which checks each request against the proto."""

    CallError = CallError

    def __init__(self, *answers: dict[str, Any] | Exception, events: tuple[dict[str, Any], ...] = ()) -> None:
        self.answers = list(answers)
        self.events = events
        self.calls: list[tuple[str, Any]] = []

    def call(
        self,
        method: str,
        request: dict[str, Any],
        on_event: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        self.calls.append((method, _rpc.from_json(request, getattr(worker_pb2, f"{method}Request")())))
        for event in self.events:
            assert on_event is not None
            on_event({"event": event})
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def run(task: Callable[[Any], Any], line: Line) -> Any:
    """Run *task* as a sandbox would."""
    return _inside.run(cloudpickle.dumps(task), line, {"worker": RECORD})  # type: ignore[arg-type]


def test_a_task_is_given_its_own_worker() -> None:
    """The worker inside is a Worker, knows its manifest, and its value is the task's."""
    assert run(lambda worker: [worker.manifest.worker_id, worker.manifest.state_snapshot], Line()) == [
        "aa00",
        {"from": "parent"},
    ]
    assert run(lambda worker: isinstance(worker, Worker), Line()) is True


def test_a_worker_without_a_word_about_itself_asks() -> None:
    """Where the orchestrator sent no record, GetSelf gives it."""
    line = Line({"worker": RECORD})
    assert _inside.run(cloudpickle.dumps(lambda worker: worker.worker_id), line, {}) == "aa00"  # type: ignore[arg-type]
    assert [method for method, _ in line.calls] == ["GetSelf"]


def test_a_child_starts_from_what_its_parent_started_from() -> None:
    """Snapshot and resources default to the parent's own."""
    line = Line({"worker": CHILD})
    child = run(lambda worker: worker.replicate("why").manifest.depth, line)
    assert child == 1
    method, request = line.calls[0]
    assert (method, request.reason, request.state_snapshot_json) == ("Replicate", "why", '{"from":"parent"}')
    # Nor does it name limits: the child gets what its parent may use by then.
    assert not request.HasField("resources")


def test_a_denial_inside_is_the_denial_outside() -> None:
    """Replicate raises the same class with its reason; maybe_replicate gives None."""
    with pytest.raises(ReplicationDenied) as denied:
        run(lambda worker: worker.replicate("why"), Line(CallError("COOLDOWN_NOT_SATISFIED")))
    assert (denied.value.reason, denied.value.retry_after_seconds) == ("COOLDOWN_NOT_SATISFIED", 0.25)
    assert run(lambda worker: worker.maybe_replicate("why"), Line(CallError("DEPTH_EXCEEDED"))) is None


def test_a_line_that_broke_is_a_service_that_is_gone() -> None:
    """No matter on which side of the sandbox, ServiceUnavailable says so, even from maybe_replicate."""
    with pytest.raises(ServiceUnavailable):
        run(lambda worker: worker.maybe_replicate("why"), Line(ConnectionError("gone")))


def test_a_descendants_output_is_relayed(capsys: pytest.CaptureFixture[str]) -> None:
    """What a child prints comes out of its parent, and its value is returned."""
    line = Line(
        {"worker": CHILD},
        {},
    )

    def task(worker: Any) -> Any:
        child = worker.replicate("why")
        line.events = (
            {"started": {"taskId": "1"}},
            {"output": {"stream": "STREAM_STDOUT", "data": "aGkK"}},
            {"result": {"outcome": "TASK_OUTCOME_SUCCEEDED", "valueJson": "42"}},
        )
        return child.perform_task(lambda _: 42)

    worker = _inside.InsideWorker(line, _inside._wire.worker_from_json(RECORD), is_self=True)  # type: ignore[arg-type]
    assert task(worker) == 42
    assert capsys.readouterr().out == "hi\n"
    method, request = line.calls[1]
    assert (method, request.worker_id) == ("RunDescendantTask", "bb11")


def test_a_worker_ends_itself_without_naming_itself() -> None:
    """The line says who is on it; only a descendant is named."""
    line = Line({"worker": CHILD}, {}, {})
    run(lambda worker: (worker.replicate("why").shutdown("done"), worker.shutdown()), line)
    assert [(method, getattr(request, "worker_id", None)) for method, request in line.calls[1:]] == [
        ("Shutdown", "bb11"),
        ("Shutdown", ""),
    ]


def test_a_predicate_sees_what_the_controller_tells() -> None:
    """The facts of the controller's own making become a ReplicationContext, whatever else they hold."""
    seen = {
        "active_count": 4,
        "manifest": {
            "manifest_id": "m",
            "contract_id": "c",
            "worker_id": "bb11",
            "parent_id": "aa00",
            "depth": 1,
            "epoch": 2,
            "cpu_millis": 500,
            "memory_limit_bytes": 268435456,
            "allow_controller": True,
            "allow_external": False,
            "state_snapshot_bytes": 9,
            "state_snapshot_json": '{"a": 1}',
            "from_the_future": 1,
        },
        "contract": {
            "contract_id": "c",
            "display_name": "",
            "max_depth": 3,
            "max_replicas": 10,
            "cooldown_seconds": 1.0,
            "expiration_seconds": 0,
            "reserved_count": 1,
        },
        "parent": {
            "worker_id": "aa00",
            "depth": 0,
            "age_seconds": 1.5,
            "live_child_count": 1,
            "from_the_future": 1,
        },
        "lineage": {"root_id": "aa00", "depth": 1, "live_count": 2, "from_the_future": 1},
    }

    def predicate(context: ReplicationContext) -> bool:
        assert context.manifest.state_snapshot == {"a": 1}
        assert context.manifest.resources.memory_limit_mb == 256
        assert context.contract.expiration_seconds is None
        assert context.parent is not None
        assert context.parent.age_seconds == 1.5
        assert context.lineage is not None
        assert context.lineage.live_count == 2
        return context.active_count >= 4

    payload = cloudpickle.dumps(predicate)
    assert _inside.evaluate(payload, Line(), {"context": seen}) is True  # type: ignore[arg-type]
    assert _inside.evaluate(payload, Line(), {"context": {**seen, "active_count": 3}}) is False  # type: ignore[arg-type]
