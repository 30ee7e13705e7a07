"""One capture: from a frozen family to a bundle. It runs in a thread of its own and only reads."""

from __future__ import annotations

import base64
import errno
import os
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from google.protobuf.json_format import MessageToDict

from hayflick_orchestrator.evidence.bundle import Bundle, pack
from hayflick_orchestrator.evidence.files import listing, root_of
from hayflick_orchestrator.evidence.processes import processes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from hayflick_orchestrator.evidence.budget import Budget
    from hayflick_orchestrator.workers import Worker

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Subject:
    """A worker to capture, as the event loop knows it.

    Attributes:
        worker_id: Whom.
        cgroup_path: Where its processes are.
        pid: Of its init.
        pidfd: A descriptor of its init, this subject's own; -1 when it is gone.
        documents: What is known of it without looking.
    """

    worker_id: str
    cgroup_path: str
    pid: int
    pidfd: int
    documents: Mapping[str, Json]

    def close(self) -> None:
        """Let go of the descriptor."""
        if self.pidfd >= 0:
            os.close(self.pidfd)


def subject_of(worker: Worker, budget: Budget, denials: list[Json] | None) -> Subject:
    """Return *worker* as a subject. Call this on the event loop."""
    sandbox = worker.sandbox
    message = worker.sandbox_message()
    # A snapshot may hold secrets and may be a megabyte; its hash is with the record.
    message.worker.manifest.ClearField("state_snapshot_json")
    message.worker.attestation.CopyFrom(worker.attestation)  # with every check
    documents: dict[str, Json] = {
        "worker": MessageToDict(message, preserving_proto_field_name=True),
        "output": _output(worker, budget),
    }
    if denials is not None:
        documents["denials"] = {"denials": denials}
    pidfd = sandbox.pidfd
    return Subject(
        worker.worker_id,
        worker.cgroup_path,
        sandbox.pid or 0,
        -1 if pidfd is None else os.dup(pidfd),
        documents,
    )


def _output(worker: Worker, budget: Budget) -> Json:
    """Return the last output of a worker's tasks, and what it printed that waits for its release."""
    sandbox = worker.sandbox
    printed = [
        {"task_id": piece.task_id, "stream": piece.stream, **_text(bytes(piece.data))}
        for piece in sandbox.transcript.pieces
    ]
    held: list[Json] = []
    for task_id, peek in list(sandbox.peeks.items()) if worker.held else ():
        if budget.held_bytes <= 0:
            budget.omit("held_outputs")
            continue
        for stream, data in peek().items():
            if data:
                budget.held_bytes -= len(data)
                held.append({"task_id": task_id, "stream": stream, **_text(data)})
    return {
        "running_task_ids": list(sandbox.tasks),
        "printed": printed,
        "printed_dropped_bytes": sandbox.transcript.dropped_bytes,
        "held": held,
    }


def _text(data: bytes) -> Json:
    try:
        return {"text": data.decode()}
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(data).decode()}


def capture(
    subjects: Sequence[Subject], members: Callable[[str], list[int]], summary: Json, budget: Budget
) -> Bundle:
    """Look at each of *subjects* and return the bundle.

    Args:
        subjects: Whom.
        members: Returns the host pids of the processes at a worker's place.
        summary: What the bundle is about.
        budget: What it may use; what was left out is added to the summary.
    """
    documents: list[tuple[str, Json]] = []
    counts: Counter[str] = Counter()
    for subject in subjects:
        if not budget.timely:
            budget.omit("workers_for_want_of_time")
        found: dict[str, Json] = dict(subject.documents)
        pids = _members(subject, members, budget)
        found["processes"] = {"processes": processes(pids, budget)}
        found["files"] = _files(subject, budget)
        counts["process_count"] += len(pids)
        counts["file_count"] += found["files"].get("entry_count", 0)
        documents += [(f"workers/{subject.worker_id}/{name}.json", one) for name, one in found.items()]
    summary = {**summary, **counts, "left_out": {k: v for k, v in sorted(budget.left_out.items()) if v}}
    return pack(summary, documents)


def _members(subject: Subject, members: Callable[[str], list[int]], budget: Budget) -> list[int]:
    try:
        return members(subject.cgroup_path)
    except OSError:
        budget.omit("workers_that_ended")
        return []


def _files(subject: Subject, budget: Budget) -> Json:
    try:
        if subject.pidfd < 0:
            raise OSError(errno.ESRCH, "its init is gone")
        with root_of(subject.pid, subject.pidfd) as root:
            return listing(root, budget)
    except OSError as error:
        budget.omit("unreadable_roots")
        return {"unreadable": errno.errorcode.get(error.errno or 0, "EIO")}
