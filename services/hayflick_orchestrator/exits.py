"""Why a worker ended and how a task ended: pure judgements over observed facts.

An exit status alone says little: a process killed by the kernel for want of
memory and one that killed itself both end with SIGKILL. So the facts are who
asked for the end, the kernel's own ``oom_kill`` counter, the CPU time used, and
the status last of all.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass

from hayflick.v1.orchestrator_pb2 import TaskOutcome
from hayflick.v1.resources_pb2 import EndReason
from hayflick_orchestrator.lifecycle import Ask

# An authority's word, which no other fact overrules.
_ORDERED = frozenset(
    {
        EndReason.END_REASON_KILLED,
        EndReason.END_REASON_KILL_SWITCH,
        EndReason.END_REASON_EXPIRED,
        EndReason.END_REASON_LEASE_LOST,
        EndReason.END_REASON_NODE_LOST,
        EndReason.END_REASON_LAUNCH_FAILED,
    }
)
# Each limit's breach ends a worker under the limit's own name.
_BREACHES = {
    TaskOutcome.TASK_OUTCOME_CPU_EXCEEDED: Ask(
        EndReason.END_REASON_CPU_EXCEEDED, "a task used up its CPU time"
    ),
    TaskOutcome.TASK_OUTCOME_TIMED_OUT: Ask(
        EndReason.END_REASON_WALL_TIME_EXCEEDED, "a task ran past its deadline"
    ),
    TaskOutcome.TASK_OUTCOME_OUTPUT_EXCEEDED: Ask(
        EndReason.END_REASON_OUTPUT_EXCEEDED, "a task printed more than its output limit"
    ),
    TaskOutcome.TASK_OUTCOME_MEMORY_EXCEEDED: Ask(
        EndReason.END_REASON_MEMORY_EXCEEDED, "a task ran into its address-space limit"
    ),
}
# RLIMIT_CPU's hard limit ends a process that ignored SIGXCPU by SIGKILL, and
# the kernel accounts in ticks, so the time seen can lie a little short of it.
CPU_SLACK_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """What was seen of a worker that is dead.

    Attributes:
        ask: The end that was asked for, if one was.
        ready: Whether its init ever reported ready.
        oom_kills: How many of its processes the kernel killed for memory.
        own_memory_reached: Whether it ever reached its own memory limit.
        family_memory_reached: Whether its family ever reached the memory of its budget.
        exit_code: Of its init, when it exited.
        signal: That ended its init, when one did.
    """

    ask: Ask | None = None
    ready: bool = True
    oom_kills: int = 0
    own_memory_reached: bool = True
    family_memory_reached: bool = False
    exit_code: int | None = None
    signal: int | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a worker ended, in the terms of ``hayflick.v1.Exit``."""

    reason: EndReason.ValueType
    detail: str = ""
    exit_code: int = 0
    signal: int = 0


def overrules(ask: Ask | None) -> bool:
    """Return whether *ask* is an authority's word, so that what the kernel counted changes nothing."""
    return ask is not None and ask.reason in _ORDERED


def judge_worker(facts: WorkerFacts) -> Verdict:  # noqa: PLR0911 -- one rule a line
    """Return why the worker of *facts* ended."""
    ask = facts.ask
    if ask is not None and overrules(ask):
        return Verdict(ask.reason, ask.detail)
    if facts.oom_kills:
        return Verdict(
            EndReason.END_REASON_OOM_KILLED,
            f"the kernel killed {facts.oom_kills} of its processes for memory{_whose_limit(facts)}",
            signal=signal.SIGKILL,
        )
    if ask is not None:
        return Verdict(ask.reason, ask.detail)
    if facts.signal == signal.SIGXCPU:
        return Verdict(EndReason.END_REASON_CPU_EXCEEDED, "its init ran out of CPU time", signal=facts.signal)
    if not facts.ready:
        return Verdict(
            EndReason.END_REASON_LAUNCH_FAILED,
            "its init ended before it was ready",
            exit_code=facts.exit_code or 0,
            signal=facts.signal or 0,
        )
    if facts.signal:
        name = _signal_name(facts.signal)
        return Verdict(
            EndReason.END_REASON_SIGNALED, f"{name} from outside ended its init", signal=facts.signal
        )
    # Init lives until it is killed; one that leaves by itself broke its word.
    return Verdict(
        EndReason.END_REASON_PROTOCOL_VIOLATION,
        "its init left without being told to",
        exit_code=facts.exit_code or 0,
    )


def _whose_limit(facts: WorkerFacts) -> str:
    """Return whose limit it was, where it was not, or not surely, the worker's own."""
    if not facts.family_memory_reached:
        return ""
    if not facts.own_memory_reached:
        return ": the family budget was used up, its own limit was not"
    return ": both its own limit and the family budget were reached"


@dataclass(frozen=True, slots=True)
class TaskFacts:
    """What was seen of a task that is over.

    Attributes:
        callable_task: Whether it was a Python callable, which owes a result.
        worker_ended: Whether its worker died, or was told to end, under it.
        cancelled: Whether its caller hung up.
        timed_out: Whether its deadline passed.
        output_exceeded: Whether it printed more than it might.
        violation: What it did against the protocol of its control stream.
        oom_kills: Processes of its worker that the kernel killed for memory.
        exit_code: Of its process, when it exited.
        signal: That ended its process, when one did.
        cpu_seconds: CPU time of its process.
        cpu_limit_seconds: The CPU time it was allowed, if there was a limit.
        has_value: Whether it sent a result.
        has_exception: Whether it sent an exception.
        address_space_full: Whether that exception is a want of memory, where the
            address space is what limits it. A program cannot be asked; its exit
            code is its own.
    """

    callable_task: bool = True
    worker_ended: bool = False
    cancelled: bool = False
    timed_out: bool = False
    output_exceeded: bool = False
    violation: str = ""
    oom_kills: int = 0
    exit_code: int | None = None
    signal: int | None = None
    cpu_seconds: float = 0.0
    cpu_limit_seconds: float | None = None
    has_value: bool = False
    has_exception: bool = False
    address_space_full: bool = False


def judge_task(facts: TaskFacts) -> TaskOutcome.ValueType:
    """Return how the task of *facts* ended: by the first rule that holds."""
    killed = facts.signal == signal.SIGKILL or facts.exit_code is None
    for_memory = facts.oom_kills and killed and facts.signal in (None, signal.SIGKILL)
    owes_a_value = facts.callable_task and not facts.has_value
    rules = (
        (for_memory, TaskOutcome.TASK_OUTCOME_OOM_KILLED),
        (facts.cancelled, TaskOutcome.TASK_OUTCOME_CANCELLED),
        (facts.timed_out, TaskOutcome.TASK_OUTCOME_TIMED_OUT),
        (facts.output_exceeded, TaskOutcome.TASK_OUTCOME_OUTPUT_EXCEEDED),
        (facts.violation, TaskOutcome.TASK_OUTCOME_FAILED),
        (facts.worker_ended and killed, TaskOutcome.TASK_OUTCOME_WORKER_ENDED),
        (_used_up_cpu(facts), TaskOutcome.TASK_OUTCOME_CPU_EXCEEDED),
        (facts.signal, TaskOutcome.TASK_OUTCOME_SIGNALED),
        (facts.address_space_full and facts.has_exception, TaskOutcome.TASK_OUTCOME_MEMORY_EXCEEDED),
        (facts.exit_code or facts.has_exception or owes_a_value, TaskOutcome.TASK_OUTCOME_FAILED),
    )
    return next((outcome for holds, outcome in rules if holds), TaskOutcome.TASK_OUTCOME_SUCCEEDED)


def ask_after_task(
    outcome: TaskOutcome.ValueType, *, keep_worker_on_error: bool, violation: str = "", oom_kills: int = 0
) -> Ask | None:
    """Return the end that a task's *outcome* means for its worker, or ``None`` when it lives on.

    A worker that the kernel took memory from by force ends always: nobody can
    say what its other processes lost.
    """
    if oom_kills or outcome == TaskOutcome.TASK_OUTCOME_OOM_KILLED:
        return Ask(EndReason.END_REASON_OOM_KILLED, "the kernel killed a process of it for memory")
    if outcome in (
        TaskOutcome.TASK_OUTCOME_SUCCEEDED,
        TaskOutcome.TASK_OUTCOME_CANCELLED,
        TaskOutcome.TASK_OUTCOME_WORKER_ENDED,
    ):
        return None
    if keep_worker_on_error:
        return None
    if violation:
        return Ask(EndReason.END_REASON_PROTOCOL_VIOLATION, violation)
    if outcome in _BREACHES:
        return _BREACHES[outcome]
    words = TaskOutcome.Name(outcome).removeprefix("TASK_OUTCOME_").lower().replace("_", " ")
    return Ask(EndReason.END_REASON_TASK_ERROR, f"a task {words}")


def _used_up_cpu(facts: TaskFacts) -> bool:
    if facts.signal == signal.SIGXCPU:
        return True
    limit = facts.cpu_limit_seconds
    return (
        facts.signal == signal.SIGKILL
        and limit is not None
        and facts.cpu_seconds >= limit - CPU_SLACK_SECONDS
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
