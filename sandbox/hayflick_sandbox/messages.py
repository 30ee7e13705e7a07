"""What the orchestrator and a sandbox's init say to one another.

Each message is one packet of JSON on a SEQPACKET socket. Only init, which runs
no user code, holds the inner end; its words are checked all the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

M = TypeVar("M")

MAX_PACKET_BYTES = 64 * 1024
# What init may send with Ready, in the order that it names them.
DESCRIPTORS = ("worker_service", "proxy", "network", "tripwire")
MAX_FINDINGS = 256
MAX_NAME_CHARS = 64
MAX_SEEN_CHARS = 200


class ProtocolViolation(Exception):
    """A packet that no init of ours sends."""


class Finding(NamedTuple):
    """What one check of the self-probe found: its name, whether it held, what the kernel answered."""

    name: str
    held: bool
    seen: str


@dataclass(frozen=True, slots=True)
class Probed:
    """The sandbox was checked from inside; comes once, just before :class:`Ready`."""

    findings: tuple[Finding, ...]
    elapsed_us: int


@dataclass(frozen=True, slots=True)
class Ready:
    """The confinement is complete; tasks may come.

    Attributes:
        descriptors: The names of those that come with this packet, in their order.
    """

    descriptors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SetupFailed:
    """One step of the confinement failed; init is gone."""

    step: str
    errno: int
    message: str


@dataclass(frozen=True, slots=True)
class Beat:
    """Init is alive and runs this many tasks."""

    tasks: int


@dataclass(frozen=True, slots=True)
class TaskStarted:
    """The task's process exists."""

    task_id: str


@dataclass(frozen=True, slots=True)
class TaskExited:
    """The task's process is gone: by exit code, or by signal."""

    task_id: str
    exit_code: int | None
    signal: int | None
    cpu_seconds: float
    max_rss_bytes: int


FromInit = Probed | Ready | SetupFailed | Beat | TaskStarted | TaskExited


@dataclass(frozen=True, slots=True)
class Introduce:
    """What this worker alone may know; the first order, and there before init is.

    It does not come by the zygote, whose memory is in every worker's.

    Attributes:
        hostname: What the worker sees as the name of its machine.
        environment: Added to every task's environment.
    """

    hostname: str
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class RunTask:
    """Start a task. Descriptors come with it: stdout, stderr, and for "call" the control socket."""

    task_id: str
    kind: Literal["call", "exec"]
    entry: str = ""
    argv: tuple[str, ...] = ()
    environment: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class KillTask:
    """Send a signal to a task and all that descends from it."""

    task_id: str
    signal: int


@dataclass(frozen=True, slots=True)
class Transfer:
    """Read or write one file of the workspace; its TaskExited tells an errno, 0 when all is well.

    Descriptors come with it: for "get" the pipe to write the bytes to; for "put"
    the pipe to read them from, and the one that says how many they were.
    """

    task_id: str
    kind: Literal["put", "get"]
    path: str
    executable: bool = False
    max_bytes: int = 0


ToInit = Introduce | RunTask | KillTask | Transfer

_FROM_INIT: dict[str, Callable[..., FromInit]] = {
    kind.__name__: kind for kind in (Probed, Ready, SetupFailed, Beat, TaskStarted, TaskExited)
}
_TO_INIT: dict[str, Callable[..., ToInit]] = {
    kind.__name__: kind for kind in (Introduce, RunTask, KillTask, Transfer)
}
# What each field may be; a field that is not named here is not in any message.
_FIELDS: dict[str, tuple[type, ...]] = {
    "descriptors": (tuple,),
    "findings": (tuple,),
    "elapsed_us": (int,),
    "step": (str,),
    "errno": (int,),
    "message": (str,),
    "tasks": (int,),
    "task_id": (str,),
    "exit_code": (int, type(None)),
    "signal": (int, type(None)),
    "cpu_seconds": (int, float),
    "max_rss_bytes": (int,),
}


# Of the json module no more than is needed, as each init copies what it touches.
_ENCODER = json.JSONEncoder(separators=(",", ":"))
_DECODER = json.JSONDecoder()


def encode(message: FromInit | ToInit) -> bytes:
    """Return *message* as a packet.

    Raises:
        ProtocolViolation: it is larger than :data:`MAX_PACKET_BYTES`; an argv or
            an environment can be.
    """
    fields = {name: getattr(message, name) for name in message.__slots__}
    packet = _ENCODER.encode([type(message).__name__, fields]).encode()
    if len(packet) > MAX_PACKET_BYTES:
        raise ProtocolViolation(f"a message of {len(packet)} bytes is over the limit of {MAX_PACKET_BYTES}")
    return packet


def parse_from_init(packet: bytes) -> FromInit:
    """Return the message in *packet*, trusting nothing in it.

    Raises:
        ProtocolViolation: it is not exactly one of :data:`FromInit`.
    """
    name, fields = _split(packet)
    if "findings" in fields:
        fields["findings"] = _findings(fields["findings"])
    kind = _FROM_INIT.get(name)
    if "descriptors" in fields:
        fields["descriptors"] = _descriptors(fields["descriptors"])
    if kind is None or not all(
        field in _FIELDS
        and type(value) in _FIELDS[field]
        and not (type(value) is float and not math.isfinite(value))
        for field, value in fields.items()
    ):
        raise ProtocolViolation("not a message of init")
    return _build(kind, fields)


def parse_to_init(packet: bytes) -> ToInit:
    """Return the order in *packet*, which the orchestrator made.

    Raises:
        ProtocolViolation: it is not exactly one of :data:`ToInit`.
    """
    name, fields = _split(packet)
    kind = _TO_INIT.get(name)
    if kind is None:
        raise ProtocolViolation("not an order")
    if type(fields.get("argv")) is list:
        fields["argv"] = tuple(fields["argv"])
    return _build(kind, fields)


def _descriptors(names: object) -> tuple[str, ...]:
    if (
        not isinstance(names, list)
        or not all(type(name) is str and name in DESCRIPTORS for name in names)
        or len(set(names)) != len(names)
    ):
        raise ProtocolViolation("descriptors that no init of ours sends")
    return tuple(names)


def _findings(values: object) -> tuple[Finding, ...]:
    if not isinstance(values, list) or len(values) > MAX_FINDINGS:
        raise ProtocolViolation("findings that no init of ours sends")
    findings = []
    for value in values:
        match value:
            case [str() as name, bool() as held, str() as seen] if (
                len(name) <= MAX_NAME_CHARS and len(seen) <= MAX_SEEN_CHARS
            ):
                findings.append(Finding(name, held, seen))
            case _:
                raise ProtocolViolation("a finding that no init of ours sends")
    return tuple(findings)


def _split(packet: bytes) -> tuple[str, dict[str, Any]]:
    try:
        text = packet.decode("ascii")
        (name, fields), end = _DECODER.raw_decode(text)
    except (ValueError, TypeError, RecursionError):
        raise ProtocolViolation("not a packet of ours") from None
    if not isinstance(name, str) or not isinstance(fields, dict) or end != len(text):
        raise ProtocolViolation("not a packet of ours")
    return name, fields


def _build(kind: Callable[..., M], fields: dict[str, Any]) -> M:
    try:
        return kind(**fields)
    except TypeError:
        raise ProtocolViolation("fields are missing or unknown") from None
