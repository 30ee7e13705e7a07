"""The wire to the model: every field of every request is checked here, once."""

from __future__ import annotations

import json
import re

from hayflick.v1 import controller_pb2, resources_pb2
from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_controller import conditions
from hayflick_controller.clock import MICROSECONDS
from hayflick_controller.model import (
    EVERYTHING,
    MAX_EXACT_INTEGER,
    EndReason,
    Exit,
    Manifest,
    Policy,
    Predicate,
    Scope,
    ScopeKind,
    StopCondition,
    Usage,
)
from hayflick_controller.parse_resources import as_signed, network, resources
from hayflick_controller.parse_terms import terms
from hayflick_controller.parse_values import (
    MAX_LENGTH_US,
    MAX_REASON_CHARS,
    instant_us,
    length_us,
    required,
    text,
    within,
)
from hayflick_rpc.errors import HayflickError, invalid_field

MAX_DEPTH = 1_000
MAX_REPLICAS = 1_000_000
MAX_MANIFEST_TTL_US = 3_600 * MICROSECONDS
DEFAULT_MANIFEST_TTL_US = 60 * MICROSECONDS
MAX_CONDITIONS = 64
MAX_NAME_CHARS = 128
MAX_DESCRIPTION_CHARS = 1_024
MAX_PICKLED_BYTES = 1024 * 1024
MAX_PICKLED_TOTAL_BYTES = 8 * 1024 * 1024
DEFAULT_PREDICATE_TIMEOUT_US = 2 * MICROSECONDS
MAX_PREDICATE_TIMEOUT_US = 30 * MICROSECONDS
MIN_SECRET_CHARS = 8
MAX_SECRET_CHARS = 1_024
MAX_SNAPSHOT_BYTES = 1024 * 1024
MAX_DETAIL_CHARS = 1_024
MAX_LAYERS = 64
MAX_HELLO_WORKERS = 100_000
MAX_BEATS = 100_000
MAX_ADDRESS_CHARS = 512
DEFAULT_KILL_TIMEOUT_US = 10 * MICROSECONDS
MAX_KILL_TIMEOUT_US = 60 * MICROSECONDS

_PYTHON_VERSION = re.compile(r"[0-9]{1,3}\.[0-9]{1,3}", re.ASCII)


class MalformedManifest(Exception):
    """A manifest that no controller can have issued, because it cannot be signed as it stands."""


__all__ = [
    "MAX_LENGTH_US",
    "MAX_REASON_CHARS",
    "MalformedManifest",
    "bad_manifest",
    "exit_",
    "length_us",
    "manifest",
    "network",
    "policy",
    "required",
    "resources",
    "scope",
    "secret",
    "snapshot",
    "text",
    "usage",
]


def policy(contract: resources_pb2.Contract) -> Policy:
    """Return the policy in *contract*, whose fields set by the controller must be empty.

    Raises:
        HayflickError: INVALID_FIELD, naming the field.
    """
    for name in ("contract_id", "key_id", "active_count", "reserved_count"):
        if getattr(contract, name):
            raise invalid_field(f"contract.{name}", "is set by the controller")
    if contract.HasField("kill_switch"):
        raise invalid_field("contract.kill_switch", "is set by the controller")
    if contract.HasField("create_time"):
        raise invalid_field("contract.create_time", "is set by the controller")
    within("contract.max_depth", contract.max_depth, 0, MAX_DEPTH)
    within("contract.max_replicas", contract.max_replicas, 1, MAX_REPLICAS)
    if not contract.HasField("cooldown"):
        raise invalid_field("contract.cooldown", "is required; it may be zero")
    expiration_us = None
    if contract.HasField("expiration"):
        expiration_us = length_us("contract.expiration", contract.expiration, minimum_us=1)
    ttl_us = DEFAULT_MANIFEST_TTL_US
    if contract.HasField("manifest_ttl"):
        ttl_us = length_us(
            "contract.manifest_ttl", contract.manifest_ttl, minimum_us=1, maximum_us=MAX_MANIFEST_TTL_US
        )
    return Policy(
        max_depth=contract.max_depth,
        max_replicas=contract.max_replicas,
        cooldown_us=length_us("contract.cooldown", contract.cooldown),
        expiration_us=expiration_us,
        manifest_ttl_us=ttl_us,
        display_name=text("contract.display_name", contract.display_name, MAX_NAME_CHARS),
        stop_conditions=_conditions(contract),
        terms=terms("contract", contract),
    )


def secret(value: str) -> bytes | None:
    """Return the signing secret, or ``None`` when the controller shall make one.

    Raises:
        HayflickError: INVALID_FIELD; the message holds no part of the secret.
    """
    if not value:
        return None
    if not MIN_SECRET_CHARS <= len(value) <= MAX_SECRET_CHARS:
        raise invalid_field("secret", f"must have {MIN_SECRET_CHARS} to {MAX_SECRET_CHARS} characters")
    return value.encode()


def snapshot(value: str) -> str:
    """Return the state snapshot, "{}" when there is none.

    Raises:
        HayflickError: INVALID_FIELD when it is not a JSON object (RFC 8259: no
            NaN), nests too deep to be read, or is over 1 MiB.
    """
    if not value:
        return "{}"
    if len(value.encode()) > MAX_SNAPSHOT_BYTES:
        raise invalid_field("state_snapshot_json", f"must be at most {MAX_SNAPSHOT_BYTES} bytes")
    try:
        decoded = json.loads(value, parse_constant=_refuse_constant, parse_int=str)
    except (ValueError, RecursionError) as error:
        raise invalid_field("state_snapshot_json", f"is not JSON: {error}"[:200]) from None
    if not isinstance(decoded, dict):
        raise invalid_field("state_snapshot_json", "must be a JSON object")
    return value


def manifest(wire: resources_pb2.Manifest) -> Manifest:
    """Return the manifest in *wire*, exactly, so that its signature can be checked.

    Raises:
        HayflickError: INVALID_FIELD when the snapshot is over 1 MiB.
        MalformedManifest: A field has a value that no issued manifest has.
    """
    if len(wire.state_snapshot_json.encode()) > MAX_SNAPSHOT_BYTES:
        raise invalid_field("manifest.state_snapshot_json", f"must be at most {MAX_SNAPSHOT_BYTES} bytes")
    try:
        limits = as_signed("manifest.resources", wire.resources)
        issue_us = instant_us("manifest.issue_time", wire.issue_time)
        expire_us = instant_us("manifest.expire_time", wire.expire_time)
    except HayflickError as error:
        raise MalformedManifest(error.message) from None
    return Manifest(
        manifest_id=wire.manifest_id,
        contract_id=wire.contract_id,
        worker_id=wire.worker_id,
        parent_id=wire.parent_id,
        depth=wire.depth,
        epoch=wire.epoch,
        state_snapshot_json=wire.state_snapshot_json,
        resources=limits,
        issue_us=issue_us,
        expire_us=expire_us,
        key_id=wire.key_id,
        signature=wire.signature,
    )


def scope(wire: controller_pb2.Scope) -> Scope:
    """Return the scope of a kill switch.

    Raises:
        HayflickError: INVALID_FIELD.
    """
    match wire.WhichOneof("scope"):
        case "everything":
            if not wire.everything:
                raise invalid_field("scope.everything", "must be true")
            return EVERYTHING
        case "contract_id":
            return Scope(ScopeKind.CONTRACT, required("scope.contract_id", wire.contract_id))
        case "worker_id":
            return Scope(ScopeKind.WORKER, required("scope.worker_id", wire.worker_id))
    raise invalid_field("scope", "is required")


def exit_(wire: resources_pb2.Exit, now_us: int) -> Exit:
    """Return how a worker ended; without an end_time, it ended now.

    Raises:
        HayflickError: INVALID_FIELD.
    """
    try:
        name = resources_pb2.EndReason.Name(wire.reason).removeprefix("END_REASON_").lower()
        reason = EndReason(name)
    except ValueError:
        raise invalid_field("exit.reason", "must say why the worker ended") from None
    end_us = now_us
    if wire.HasField("end_time"):
        # A node's clock may be ahead; an end after now would be a lie of ours.
        end_us = min(now_us, instant_us("exit.end_time", wire.end_time))
    detail = text("exit.detail", wire.detail, MAX_DETAIL_CHARS)
    return Exit(reason, end_us, detail, wire.exit_code, wire.signal)


def usage(field: str, wire: resources_pb2.Usage) -> Usage:
    """Return what a worker used.

    Raises:
        HayflickError: INVALID_FIELD.
    """
    for name in ("memory_bytes", "memory_peak_bytes"):
        within(f"{field}.{name}", getattr(wire, name), 0, MAX_EXACT_INTEGER)
    cpu = wire.cpu_time
    cpu_us = cpu.seconds * MICROSECONDS + cpu.nanos // 1_000  # nodes count in nanoseconds
    within(f"{field}.cpu_time", cpu_us, 0, MAX_EXACT_INTEGER)
    return Usage(wire.memory_bytes, wire.memory_peak_bytes, cpu_us, wire.pids)


def _conditions(contract: resources_pb2.Contract) -> tuple[StopCondition, ...]:
    if len(contract.stop_conditions) > MAX_CONDITIONS:
        raise invalid_field("contract.stop_conditions", f"must be at most {MAX_CONDITIONS}")
    parsed = tuple(
        _condition(f"contract.stop_conditions[{index}]", wire)
        for index, wire in enumerate(contract.stop_conditions)
    )
    if len({condition.name for condition in parsed}) < len(parsed):
        raise invalid_field("contract.stop_conditions", "must have names that differ")
    pickled = sum(len(condition.predicate.pickled) for condition in parsed if condition.predicate)
    if pickled > MAX_PICKLED_TOTAL_BYTES:
        raise invalid_field(
            "contract.stop_conditions", f"must hold at most {MAX_PICKLED_TOTAL_BYTES} bytes of predicates"
        )
    return parsed


def _condition(field: str, wire: resources_pb2.StopCondition) -> StopCondition:
    name = required(f"{field}.name", wire.name, MAX_NAME_CHARS)
    description = text(f"{field}.description", wire.description, MAX_DESCRIPTION_CHARS)
    match wire.WhichOneof("rule"):
        case "cel":
            try:
                conditions.check_source(wire.cel)
            except ValueError as error:
                raise invalid_field(f"{field}.cel", str(error)) from None
            return StopCondition(name, description, cel=wire.cel)
        case "python":
            return StopCondition(name, description, predicate=_predicate(f"{field}.python", wire.python))
    raise invalid_field(field, "must have a rule: cel or python")


def _predicate(field: str, wire: resources_pb2.PythonPredicate) -> Predicate:
    if not 1 <= len(wire.pickled) <= MAX_PICKLED_BYTES:
        raise invalid_field(f"{field}.pickled", f"must have 1 to {MAX_PICKLED_BYTES} bytes")
    if not _PYTHON_VERSION.fullmatch(wire.python_version):
        raise invalid_field(f"{field}.python_version", 'must be "major.minor"')
    timeout_us = DEFAULT_PREDICATE_TIMEOUT_US
    if wire.HasField("timeout"):
        timeout_us = length_us(
            f"{field}.timeout", wire.timeout, minimum_us=1, maximum_us=MAX_PREDICATE_TIMEOUT_US
        )
    return Predicate(wire.pickled, wire.python_version, timeout_us)


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def bad_manifest(error: MalformedManifest) -> HayflickError:
    """Return the refusal of a manifest that cannot have been issued."""
    return HayflickError(
        ErrorReason.ERROR_REASON_MANIFEST_SIGNATURE_INVALID,
        f"the manifest was not issued by this controller: {error}",
    )
