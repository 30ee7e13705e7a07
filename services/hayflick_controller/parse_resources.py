"""What a worker may use and reach, checked."""

from __future__ import annotations

import re

from hayflick.v1 import resources_pb2
from hayflick_controller.model import MAX_EXACT_INTEGER, NetworkPolicy, Resources
from hayflick_controller.parse_values import length_us, within
from hayflick_rpc.errors import invalid_field
from hayflick_rpc.hosts import HostError, rule

MIN_CPU_MILLIS = 10
MAX_CPU_MILLIS = 1_024_000
MIN_MEMORY_BYTES = 16 * 1024 * 1024
MAX_PIDS = 4_194_304  # PID_MAX_LIMIT of the kernel
MAX_OPEN_FILES = 1_073_741_816  # the kernel's own ceiling for fs.nr_open
MAX_ALLOWED_HOSTS = 64
MAX_PORT = 65_535

# "name", "name:port", "*.name:port"; an IPv6 address in brackets. Whether a name is one, and what it
# matches, the node's proxy says in the same words; here only the form is held to, lower-case
# throughout, so that one host has one spelling under the signature.
_HOST = re.compile(
    r"(?P<name>(\*\.)?[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_]([a-z0-9_-]{0,62}))*|\[[0-9a-f:.]{2,45}\])"
    r"(:(?P<port>[1-9][0-9]{0,4}))?",
    re.ASCII,
)
_MAX_NAME_CHARS = 253  # RFC 1035, section 2.3.4, without the final dot


def resources(field: str, wire: resources_pb2.Resources) -> Resources:
    """Return the limits in *wire*.

    Raises:
        HayflickError: INVALID_FIELD, naming the limit below *field*.
    """
    within(f"{field}.cpu_millis", wire.cpu_millis, MIN_CPU_MILLIS, MAX_CPU_MILLIS)
    within(f"{field}.memory_limit_bytes", wire.memory_limit_bytes, MIN_MEMORY_BYTES, MAX_EXACT_INTEGER)
    within(f"{field}.pids_limit", wire.pids_limit, 0, MAX_PIDS)
    within(f"{field}.open_files_limit", wire.open_files_limit, 0, MAX_OPEN_FILES)
    for name in ("file_size_limit_bytes", "workspace_limit_bytes", "tmp_limit_bytes", "output_limit_bytes"):
        within(f"{field}.{name}", getattr(wire, name), 0, MAX_EXACT_INTEGER)
    network(f"{field}.network", wire.network)
    cpu_time_us = None
    if wire.HasField("cpu_time_limit"):
        cpu_time_us = length_us(f"{field}.cpu_time_limit", wire.cpu_time_limit, minimum_us=1)
    return _resources(wire, cpu_time_us)


def as_signed(field: str, wire: resources_pb2.Resources) -> Resources:
    """Return the limits in *wire* exactly as they are, so that a signature over them can be checked.

    Raises:
        HayflickError: INVALID_FIELD for a length of time that is malformed or too long.
    """
    cpu_time_us = None
    if wire.HasField("cpu_time_limit"):
        cpu_time_us = length_us(f"{field}.cpu_time_limit", wire.cpu_time_limit)
    return _resources(wire, cpu_time_us)


def network(field: str, wire: resources_pb2.NetworkPolicy) -> NetworkPolicy:
    """Return the licences in *wire*.

    Raises:
        HayflickError: INVALID_FIELD, naming the licence below *field*.
    """
    if len(wire.allowed_hosts) > MAX_ALLOWED_HOSTS:
        raise invalid_field(f"{field}.allowed_hosts", f"must be at most {MAX_ALLOWED_HOSTS}")
    for index, host in enumerate(wire.allowed_hosts):
        found = _HOST.fullmatch(host)
        if found is None or len(found["name"]) > _MAX_NAME_CHARS or int(found["port"] or 1) > MAX_PORT:
            raise invalid_field(
                f"{field}.allowed_hosts[{index}]",
                'must be "name", "name:port" or "*.name:port", in lower case',
            )
        try:
            rule(host)
        except HostError as error:
            raise invalid_field(f"{field}.allowed_hosts[{index}]", str(error)) from error
    if len(set(wire.allowed_hosts)) < len(wire.allowed_hosts):
        raise invalid_field(f"{field}.allowed_hosts", "must differ from one another")
    within(f"{field}.egress_limit_bytes", wire.egress_limit_bytes, 0, MAX_EXACT_INTEGER)
    return _network(wire)


def _resources(wire: resources_pb2.Resources, cpu_time_us: int | None) -> Resources:
    return Resources(
        cpu_millis=wire.cpu_millis,
        memory_limit_bytes=wire.memory_limit_bytes,
        pids_limit=wire.pids_limit,
        open_files_limit=wire.open_files_limit,
        file_size_limit_bytes=wire.file_size_limit_bytes,
        workspace_limit_bytes=wire.workspace_limit_bytes,
        tmp_limit_bytes=wire.tmp_limit_bytes,
        cpu_time_limit_us=cpu_time_us,
        network=_network(wire.network),
        output_limit_bytes=wire.output_limit_bytes,
    )


def _network(wire: resources_pb2.NetworkPolicy) -> NetworkPolicy:
    return NetworkPolicy(
        allow_controller=wire.allow_controller,
        allow_external=wire.allow_external,
        allow_loopback=wire.allow_loopback,
        allowed_hosts=tuple(wire.allowed_hosts),
        egress_limit_bytes=wire.egress_limit_bytes,
    )
