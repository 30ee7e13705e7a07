"""Evaluates Python stop conditions, each in a sandbox of its own that is no worker."""

from __future__ import annotations

import asyncio
import json
import secrets
from typing import TYPE_CHECKING

from hayflick_orchestrator.requests import TaskSpec, check_pickled
from hayflick_orchestrator.sandboxes import SandboxError
from hayflick_orchestrator.tasks import TaskEnd, TaskRun
from hayflick_rpc import wire
from hayflick_rpc.errors import HayflickError
from hayflick_sandbox.policy import Limits, Policy

if TYPE_CHECKING:
    from hayflick.v1.controller_pb2 import EvaluateOrder
    from hayflick_orchestrator.host import Host

ENTRY = "replication._inside:evaluate"
# Not a contract: those are hexadecimal.
CGROUP = "predicates"
DEFAULT_TIMEOUT_SECONDS = 2.0
MAX_TIMEOUT_SECONDS = 30.0
MAX_PICKLED_BYTES = 1024 * 1024
EVALUATIONS_AT_ONCE = 8

_MIB = 1024 * 1024
POLICY = Policy(
    limits=Limits(
        memory_bytes=128 * _MIB,
        cpu_millis=1_000,
        pids=8,
        open_files=64,
        file_size_bytes=_MIB,
        workspace_bytes=_MIB,
        tmp_bytes=_MIB,
        cpu_time_seconds=int(MAX_TIMEOUT_SECONDS),
    ),
    hostname="predicate",
)


class PredicateError(Exception):
    """The predicate gave no value. The text begins with the cause: error or timeout."""


class Predicates:
    """Runs predicates."""

    def __init__(self, host: Host, *, ready_timeout_seconds: float) -> None:
        self._host = host
        self._ready_timeout_seconds = ready_timeout_seconds
        self._gate = asyncio.Semaphore(EVALUATIONS_AT_ONCE)

    async def evaluate(self, order: EvaluateOrder) -> bool | None:
        """Return the predicate's value, or ``None`` when it is not a boolean.

        Raises:
            PredicateError: it raised, or ran out of time.
        """
        predicate = order.predicate
        timeout_seconds = (
            wire.seconds(predicate.timeout) if predicate.HasField("timeout") else DEFAULT_TIMEOUT_SECONDS
        )
        if not 0 < timeout_seconds <= MAX_TIMEOUT_SECONDS:
            raise PredicateError(f"error: a time limit of {timeout_seconds} s")
        try:
            check_pickled("predicate", predicate.pickled, predicate.python_version, MAX_PICKLED_BYTES)
            spec = TaskSpec(
                kind="call",
                entry=ENTRY,
                payload=predicate.pickled,
                info={"context": json.loads(order.context_json)},
                timeout_seconds=timeout_seconds,
            )
            async with self._gate:
                return value_of(await self._run(spec))
        except HayflickError as error:
            raise PredicateError(f"error: {error.message}") from error
        except (SandboxError, OSError, ValueError) as error:
            raise PredicateError(f"error: {error}") from error

    async def _run(self, spec: TaskSpec) -> TaskEnd:
        sandbox = await self._host.launch(
            f"{CGROUP}/{secrets.token_hex(8)}", POLICY, ready_timeout_seconds=self._ready_timeout_seconds
        )
        try:
            run = TaskRun(sandbox, spec)
            run.start()
            await run.discard_output()
            return await run.end()
        finally:
            await self._host.undo(sandbox)
            self._host.forget_contract(CGROUP)


def value_of(end: TaskEnd) -> bool | None:
    """Return the boolean that a predicate gave, or ``None`` when it gave something else.

    Raises:
        PredicateError: it gave none.
    """
    if end.timed_out:
        raise PredicateError(f"timeout: no value within {end.elapsed_seconds:.3g} s")
    if end.violation:
        raise PredicateError(f"error: {end.violation}")
    if end.raised is not None:
        raise PredicateError(f"error: {end.raised.type}: {end.raised.message}"[:512])
    if end.signal or end.exit_code or end.value_json is None:
        raise PredicateError(f"error: it ended by itself (exit code {end.exit_code}, signal {end.signal})")
    try:
        value = json.loads(end.value_json)
    except (ValueError, RecursionError):
        raise PredicateError("error: its value is not JSON") from None
    return value if isinstance(value, bool) else None
