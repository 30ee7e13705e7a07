"""How ends are judged: the whole table."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hayflick.v1.orchestrator_pb2 import TaskOutcome
from hayflick.v1.resources_pb2 import EndReason
from hayflick_orchestrator.exits import TaskFacts, WorkerFacts, ask_after_task, judge_task, judge_worker
from hayflick_orchestrator.lifecycle import Ask


def asked(name: str) -> Ask:
    """Return an ask for the reason of that name."""
    return Ask(EndReason.Value(f"END_REASON_{name}"), "because")


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (WorkerFacts(ask=asked("COMPLETED"), signal=signal.SIGKILL), "COMPLETED"),
        (WorkerFacts(ask=asked("TASK_ERROR"), signal=signal.SIGKILL), "TASK_ERROR"),
        (WorkerFacts(ask=asked("EXPIRED"), signal=signal.SIGKILL), "EXPIRED"),
        (WorkerFacts(ask=asked("KILLED"), signal=signal.SIGKILL), "KILLED"),
        (WorkerFacts(ask=asked("KILL_SWITCH"), signal=signal.SIGKILL), "KILL_SWITCH"),
        (WorkerFacts(ask=asked("HEARTBEAT_TIMEOUT"), signal=signal.SIGKILL), "HEARTBEAT_TIMEOUT"),
        (WorkerFacts(ask=asked("CPU_EXCEEDED"), signal=signal.SIGKILL), "CPU_EXCEEDED"),
        (WorkerFacts(ask=asked("LEASE_LOST"), signal=signal.SIGKILL), "LEASE_LOST"),
        (WorkerFacts(ask=asked("NODE_LOST"), signal=signal.SIGKILL), "NODE_LOST"),
        (WorkerFacts(ask=asked("LAUNCH_FAILED"), signal=signal.SIGKILL), "LAUNCH_FAILED"),
        (WorkerFacts(ask=asked("PROTOCOL_VIOLATION"), signal=signal.SIGKILL), "PROTOCOL_VIOLATION"),
        # The kernel's count overrules what followed from it, but no authority's word.
        (WorkerFacts(oom_kills=1, signal=signal.SIGKILL), "OOM_KILLED"),
        (WorkerFacts(oom_kills=1, exit_code=1), "OOM_KILLED"),
        (WorkerFacts(ask=asked("TASK_ERROR"), oom_kills=1), "OOM_KILLED"),
        (WorkerFacts(ask=asked("COMPLETED"), oom_kills=2), "OOM_KILLED"),
        (WorkerFacts(ask=asked("HEARTBEAT_TIMEOUT"), oom_kills=1), "OOM_KILLED"),
        (WorkerFacts(ask=asked("KILL_SWITCH"), oom_kills=1), "KILL_SWITCH"),
        (WorkerFacts(ask=asked("KILLED"), oom_kills=1), "KILLED"),
        (WorkerFacts(ask=asked("EXPIRED"), oom_kills=1), "EXPIRED"),
        (WorkerFacts(ask=asked("LEASE_LOST"), oom_kills=1), "LEASE_LOST"),
        # Nobody asked.
        (WorkerFacts(signal=signal.SIGXCPU), "CPU_EXCEEDED"),
        (WorkerFacts(signal=signal.SIGKILL), "SIGNALED"),
        (WorkerFacts(signal=signal.SIGSEGV), "SIGNALED"),
        (WorkerFacts(signal=63), "SIGNALED"),
        (WorkerFacts(exit_code=0), "PROTOCOL_VIOLATION"),
        (WorkerFacts(exit_code=1), "PROTOCOL_VIOLATION"),
        (WorkerFacts(ready=False, exit_code=1), "LAUNCH_FAILED"),
        (WorkerFacts(ready=False, signal=signal.SIGKILL), "LAUNCH_FAILED"),
        (WorkerFacts(), "PROTOCOL_VIOLATION"),
    ],
)
def test_why_a_worker_ended(facts: WorkerFacts, reason: str) -> None:
    """Each combination of facts means exactly one reason."""
    assert EndReason.Name(judge_worker(facts).reason) == f"END_REASON_{reason}"


def test_a_self_inflicted_sigkill_is_no_memory_kill() -> None:
    """SIGKILL alone never reads as want of memory: both leave status 137."""
    assert judge_worker(WorkerFacts(signal=signal.SIGKILL)).reason == EndReason.END_REASON_SIGNALED


def test_the_owners_words_are_kept() -> None:
    """The detail of whoever asked is the detail of the record."""
    assert judge_worker(WorkerFacts(ask=Ask(EndReason.END_REASON_COMPLETED, "done"))).detail == "done"


OK = TaskFacts(exit_code=0, has_value=True)


@pytest.mark.parametrize(
    ("facts", "outcome"),
    [
        (OK, "SUCCEEDED"),
        (TaskFacts(callable_task=False, exit_code=0), "SUCCEEDED"),
        (TaskFacts(exit_code=0), "FAILED"),  # a callable owes a result
        (TaskFacts(exit_code=1, has_value=True), "FAILED"),
        (TaskFacts(exit_code=1, has_exception=True), "FAILED"),
        (TaskFacts(exit_code=0, has_exception=True), "FAILED"),
        (TaskFacts(callable_task=False, exit_code=3), "FAILED"),
        (TaskFacts(signal=signal.SIGSEGV), "SIGNALED"),
        (TaskFacts(signal=signal.SIGKILL), "SIGNALED"),
        (TaskFacts(signal=signal.SIGXCPU), "CPU_EXCEEDED"),
        (TaskFacts(signal=signal.SIGKILL, cpu_seconds=2.0, cpu_limit_seconds=2), "CPU_EXCEEDED"),
        (TaskFacts(signal=signal.SIGKILL, cpu_seconds=1.95, cpu_limit_seconds=2), "CPU_EXCEEDED"),
        (TaskFacts(signal=signal.SIGKILL, cpu_seconds=0.5, cpu_limit_seconds=2), "SIGNALED"),
        (TaskFacts(signal=signal.SIGKILL, oom_kills=1), "OOM_KILLED"),
        (TaskFacts(worker_ended=True, oom_kills=1), "OOM_KILLED"),
        (TaskFacts(exit_code=1, has_exception=True, oom_kills=1), "FAILED"),  # a child of it was killed
        (TaskFacts(signal=signal.SIGSEGV, oom_kills=1), "SIGNALED"),
        (TaskFacts(signal=signal.SIGKILL, timed_out=True), "TIMED_OUT"),
        (TaskFacts(timed_out=True), "TIMED_OUT"),  # frozen, so not even SIGKILL was reported
        (TaskFacts(signal=signal.SIGKILL, cancelled=True), "CANCELLED"),
        (TaskFacts(signal=signal.SIGKILL, output_exceeded=True), "OUTPUT_EXCEEDED"),
        (TaskFacts(exit_code=0, has_value=True, output_exceeded=True), "OUTPUT_EXCEEDED"),  # we read it later
        (TaskFacts(signal=signal.SIGKILL, output_exceeded=True, cancelled=True), "CANCELLED"),
        (TaskFacts(signal=signal.SIGKILL, output_exceeded=True, oom_kills=1), "OOM_KILLED"),
        (TaskFacts(exit_code=1, has_exception=True, address_space_full=True), "MEMORY_EXCEEDED"),
        (TaskFacts(exit_code=0, has_value=True, address_space_full=True), "SUCCEEDED"),
        (TaskFacts(signal=signal.SIGKILL, violation="garbage"), "FAILED"),
        (TaskFacts(worker_ended=True), "WORKER_ENDED"),
        (TaskFacts(worker_ended=True, signal=signal.SIGKILL), "WORKER_ENDED"),
        (TaskFacts(worker_ended=True, exit_code=0, has_value=True), "SUCCEEDED"),  # it was quicker
    ],
)
def test_how_a_task_ended(facts: TaskFacts, outcome: str) -> None:
    """Each combination of facts means exactly one outcome."""
    assert TaskOutcome.Name(judge_task(facts)) == f"TASK_OUTCOME_{outcome}"


@pytest.mark.parametrize(
    ("outcome", "keep", "reason"),
    [
        ("SUCCEEDED", False, None),
        ("CANCELLED", False, None),
        ("WORKER_ENDED", False, None),
        ("FAILED", False, "TASK_ERROR"),
        ("SIGNALED", False, "TASK_ERROR"),
        ("TIMED_OUT", False, "WALL_TIME_EXCEEDED"),
        ("OUTPUT_EXCEEDED", False, "OUTPUT_EXCEEDED"),
        ("MEMORY_EXCEEDED", False, "MEMORY_EXCEEDED"),
        ("CPU_EXCEEDED", False, "CPU_EXCEEDED"),
        ("OOM_KILLED", False, "OOM_KILLED"),
        ("FAILED", True, None),
        ("SIGNALED", True, None),
        ("TIMED_OUT", True, None),
        ("CPU_EXCEEDED", True, None),
        ("OUTPUT_EXCEEDED", True, None),
        ("MEMORY_EXCEEDED", True, None),
        ("OOM_KILLED", True, "OOM_KILLED"),
    ],
)
def test_what_a_task_means_for_its_worker(outcome: str, keep: bool, reason: str | None) -> None:
    """A failed task ends its worker unless it is to be kept, and want of memory ends it always."""
    ask = ask_after_task(TaskOutcome.Value(f"TASK_OUTCOME_{outcome}"), keep_worker_on_error=keep)
    assert (ask and EndReason.Name(ask.reason)) == (reason and f"END_REASON_{reason}")


def test_a_violation_is_named() -> None:
    """A task that broke the protocol ends its worker as that, not as a mere error."""
    ask = ask_after_task(TaskOutcome.TASK_OUTCOME_FAILED, keep_worker_on_error=False, violation="garbage")
    assert ask == Ask(EndReason.END_REASON_PROTOCOL_VIOLATION, "garbage")


@given(
    st.builds(
        TaskFacts,
        callable_task=st.booleans(),
        worker_ended=st.booleans(),
        cancelled=st.booleans(),
        timed_out=st.booleans(),
        violation=st.sampled_from(["", "x"]),
        output_exceeded=st.booleans(),
        address_space_full=st.booleans(),
        oom_kills=st.integers(0, 2),
        exit_code=st.none() | st.integers(0, 2),
        signal=st.none() | st.sampled_from([9, 11, 24]),
        has_value=st.booleans(),
        has_exception=st.booleans(),
    )
)
def test_success_is_earned(facts: TaskFacts) -> None:
    """Nothing that was killed, timed out, or owes a result counts as success."""
    if judge_task(facts) == TaskOutcome.TASK_OUTCOME_SUCCEEDED:
        assert not facts.signal
        assert not facts.exit_code
        assert not any((facts.timed_out, facts.cancelled, facts.violation, facts.has_exception))
        assert not facts.output_exceeded
        assert facts.has_value or not facts.callable_task


@pytest.mark.parametrize(
    ("own", "family", "told"),
    [
        (True, False, "for memory"),
        (False, True, "the family budget was used up, its own limit was not"),
        (True, True, "both its own limit and the family budget were reached"),
        (False, False, "for memory"),
    ],
)
def test_whose_memory_it_was_is_told(own: bool, family: bool, told: str) -> None:
    """A worker that was killed for memory learns whether its own limit or its family budget was reached."""
    facts = WorkerFacts(oom_kills=1, own_memory_reached=own, family_memory_reached=family)
    verdict = judge_worker(facts)
    assert verdict.reason == EndReason.END_REASON_OOM_KILLED
    assert verdict.detail.endswith(told)
