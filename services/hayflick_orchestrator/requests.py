"""Requests checked and turned into what the node works with. Pure: says no with a reason, or yes."""

from __future__ import annotations

import math
import platform
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from hayflick.v1.errors_pb2 import ErrorReason
from hayflick.v1.resources_pb2 import EndReason, Manifest, NetworkPolicy, Resources
from hayflick_orchestrator.lifecycle import Ask
from hayflick_rpc import wire
from hayflick_rpc.errors import HayflickError, invalid_field
from hayflick_rpc.hosts import HostError, rules
from hayflick_sandbox.bounds import Bounds
from hayflick_sandbox.doors import PROXY_ADDRESS, WORKER_SERVICE_PATH
from hayflick_sandbox.policy import Limits, Policy

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hayflick.v1.controller_pb2 import ContractTerms
    from hayflick.v1.orchestrator_pb2 import StopWorkerRequest, Task

PYTHON_VERSION = ".".join(platform.python_version_tuple()[:2])

MAX_PICKLED_BYTES = 16 * 1024 * 1024
# argv and environment travel to init in one packet of 64 KiB; JSON may double them.
MAX_COMMAND_BYTES = 24 * 1024
MAX_ARGUMENTS = 1_024
MAX_TASK_TIMEOUT_SECONDS = 7 * 86_400.0
MAX_GRACE_SECONDS = 60.0
MAX_DETAIL_CHARS = 256

CALL_ENTRY = "replication._inside:run"

# What the controller makes. A name that can be ".." must never be part of a path.
_HEX_ID = re.compile(r"[0-9a-f]{8,64}", re.ASCII)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """A task that init can start.

    Attributes:
        kind: ``call`` for a Python function, ``exec`` for a program.
        entry: For ``call``: the ``module:function`` in the sandbox that gets the payload.
        payload: For ``call``: bytes that only the sandbox may interpret.
        info: For ``call``: JSON values for the entry.
        argv: For ``exec``.
        environment: For ``exec``, added to the sandbox's own.
        timeout_seconds: ``None`` for as long as the worker lives.
        output_limit_bytes: What it may print on both outputs together; ``None`` for no limit.
    """

    kind: Literal["call", "exec"]
    entry: str = ""
    payload: bytes = b""
    info: Mapping[str, object] = field(default_factory=dict)
    argv: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    timeout_seconds: float | None = None
    output_limit_bytes: int | None = None


def check_manifest(manifest: Manifest) -> None:
    """Check the form of what becomes part of paths and records.

    Whether the manifest is *good* only the controller can say.

    Raises:
        HayflickError: INVALID_FIELD.
    """
    for name in ("manifest_id", "contract_id", "worker_id"):
        if not _HEX_ID.fullmatch(getattr(manifest, name)):
            raise invalid_field(
                f"manifest.{name}", "must be lower-case hexadecimal, as the controller issued it"
            )
    if manifest.parent_id and not _HEX_ID.fullmatch(manifest.parent_id):
        raise invalid_field(
            "manifest.parent_id", "must be lower-case hexadecimal, as the controller issued it"
        )
    if not manifest.HasField("resources"):
        raise invalid_field("manifest.resources", "is required")


def policy_of(resources: Resources, worker_id: str) -> Policy:
    """Return the sandbox policy for *resources*.

    Raises:
        HayflickError: INVALID_FIELD for a limit out of range, or a host that is none.
    """
    network = resources.network
    try:
        rules(network.allowed_hosts)
    except HostError as error:
        raise invalid_field("manifest.resources.network.allowed_hosts", str(error)) from error
    given: dict[str, int] = {
        "memory_bytes": resources.memory_limit_bytes,
        "cpu_millis": resources.cpu_millis,
    }
    optional = {
        "pids": resources.pids_limit,
        "open_files": resources.open_files_limit,
        "file_size_bytes": resources.file_size_limit_bytes,
        "workspace_bytes": resources.workspace_limit_bytes,
        "tmp_bytes": resources.tmp_limit_bytes,
    }
    given.update((name, value) for name, value in optional.items() if value)
    if resources.HasField("cpu_time_limit"):
        # RLIMIT_CPU counts whole seconds; a part of one is allowed as a whole.
        given["cpu_time_seconds"] = math.ceil(wire.seconds(resources.cpu_time_limit))
    try:
        return Policy(
            limits=Limits(**given),
            loopback=network.allow_loopback,
            worker_service=network.allow_controller,
            proxy=bool(network.allowed_hosts),
            external=network.allow_external,
            hostname=f"worker-{worker_id}"[:63],
            environment=_environment(network),
        )
    except ValueError as error:
        name, _, message = str(error).partition(": ")
        raise invalid_field(f"manifest.resources.{name}", message) from error


def _environment(network: NetworkPolicy) -> dict[str, str]:
    """Return the variables that tell a worker's programs where its doors are."""
    variables = {}
    if network.allow_controller:
        variables["HAYFLICK_WORKER"] = f"unix://{WORKER_SERVICE_PATH}"
    if network.allowed_hosts:
        address = "http://{}:{}".format(*PROXY_ADDRESS)
        # Its own loopback needs no proxy; where it has none, a listed address of the host's may.
        direct = "localhost,127.0.0.1,::1" if network.allow_loopback else ""
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            variables[name] = variables[name.upper()] = address
        variables["no_proxy"] = variables["NO_PROXY"] = direct
    return variables


def bounds_of(terms: ContractTerms) -> Bounds:
    """Return what the kernel holds a contract and its families to.

    Raises:
        HayflickError: INVALID_FIELD without a population: what is not bounded is not run.
    """
    if not terms.max_replicas:
        raise invalid_field("terms.max_replicas", "is required: the controller did not say what it allows")
    budget = terms.family_budget
    return Bounds(
        max_replicas=terms.max_replicas,
        max_depth=terms.max_depth,
        family_memory_bytes=budget.memory_limit_bytes,
        family_cpu_millis=budget.cpu_millis,
        family_pids=budget.pids_limit,
    )


def task_spec(task: Task, info: Mapping[str, object]) -> TaskSpec:
    """Return *task* as something to start.

    Raises:
        HayflickError: INVALID_FIELD; TOO_LARGE; PYTHON_VERSION_MISMATCH before
            anything runs, because bytes pickled by another Python can crash
            or mislead this one.
    """
    timeout_seconds = _timeout(task)
    match task.WhichOneof("task"):
        case "python":
            check_pickled("task.python", task.python.pickled, task.python.python_version, MAX_PICKLED_BYTES)
            return TaskSpec(
                kind="call",
                entry=CALL_ENTRY,
                payload=task.python.pickled,
                info=info,
                timeout_seconds=timeout_seconds,
            )
        case "command":
            return _command(task, timeout_seconds)
        case _:
            raise invalid_field("task", "must be a Python callable or a command")


def check_pickled(field_name: str, pickled: bytes, python_version: str, limit_bytes: int) -> None:
    """Check what came pickled, without looking into it.

    Raises:
        HayflickError: INVALID_FIELD, TOO_LARGE or PYTHON_VERSION_MISMATCH.
    """
    if not pickled:
        raise invalid_field(f"{field_name}.pickled", "is required")
    if len(pickled) > limit_bytes:
        raise HayflickError(
            ErrorReason.ERROR_REASON_TOO_LARGE,
            f"{field_name}.pickled: {len(pickled)} bytes are over the limit of {limit_bytes}",
            metadata={"field": f"{field_name}.pickled", "limit_bytes": str(limit_bytes)},
        )
    if python_version != PYTHON_VERSION:
        raise HayflickError(
            ErrorReason.ERROR_REASON_PYTHON_VERSION_MISMATCH,
            f"{field_name}: pickled by Python {python_version[:16] or '?'}, this node runs {PYTHON_VERSION}",
            metadata={"python_version": python_version, "node_python_version": PYTHON_VERSION},
        )


def stop_ask(request: StopWorkerRequest) -> tuple[Ask, float]:
    """Return the end that *request* asks for, and the grace in seconds.

    Raises:
        HayflickError: INVALID_FIELD.
    """
    reason = request.reason or EndReason.END_REASON_COMPLETED
    if reason not in (EndReason.END_REASON_COMPLETED, EndReason.END_REASON_KILLED):
        raise invalid_field("reason", "must be END_REASON_COMPLETED or END_REASON_KILLED")
    grace = wire.seconds(request.grace)
    if not 0 <= grace <= MAX_GRACE_SECONDS:
        raise invalid_field("grace", f"must be from 0 to {MAX_GRACE_SECONDS:g} s")
    return Ask(reason, checked_detail(request.detail)), grace


def checked_detail(detail: str) -> str:
    """Return *detail* when it is short enough for the record.

    Raises:
        HayflickError: INVALID_FIELD.
    """
    if len(detail) > MAX_DETAIL_CHARS:
        raise invalid_field("detail", f"must be at most {MAX_DETAIL_CHARS} characters")
    return detail


def _timeout(task: Task) -> float | None:
    if not task.HasField("timeout"):
        return None
    seconds = wire.seconds(task.timeout)
    if not 0 < seconds <= MAX_TASK_TIMEOUT_SECONDS:
        raise invalid_field("task.timeout", f"must be above 0 and at most {MAX_TASK_TIMEOUT_SECONDS:g} s")
    return seconds


def _command(task: Task, timeout_seconds: float | None) -> TaskSpec:
    argv, environment = tuple(task.command.argv), dict(task.command.environment)
    if not argv or not argv[0]:
        raise invalid_field("task.command.argv", "must name a program")
    if len(argv) > MAX_ARGUMENTS or len(environment) > MAX_ARGUMENTS:
        raise invalid_field("task.command", f"has more than {MAX_ARGUMENTS} arguments or variables")
    if any("\0" in text for text in (*argv, *environment.values())):
        raise invalid_field("task.command", "must not hold NUL characters")
    for name in environment:
        if not _VARIABLE.fullmatch(name):
            raise invalid_field("task.command.environment", f"{name[:64]!r} is not a variable's name")
    size = sum(len(text.encode()) for text in (*argv, *environment, *environment.values()))
    if size > MAX_COMMAND_BYTES:
        raise HayflickError(
            ErrorReason.ERROR_REASON_TOO_LARGE,
            f"task.command: {size} bytes are over the limit of {MAX_COMMAND_BYTES}",
            metadata={"field": "task.command", "limit_bytes": str(MAX_COMMAND_BYTES)},
        )
    return TaskSpec(kind="exec", argv=argv, environment=environment, timeout_seconds=timeout_seconds)
