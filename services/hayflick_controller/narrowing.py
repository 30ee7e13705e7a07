"""A child never has more than its parent. Pure.

Where a child leaves an optional limit out, it gets its parent's, so that its
manifest states real numbers where its parent's does. A limit that its parent
left to the node is not known here; the node compares what its kernel enforces.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from hayflick_controller import licences
from hayflick_controller.clock import MICROSECONDS
from hayflick_controller.model import NetworkPolicy, Resources
from hayflick_rpc import hosts

MAX_LIMIT_CHARS = 256

_REQUIRED = ("cpu_millis", "memory_limit_bytes")
_OPTIONAL = (
    "pids_limit",
    "open_files_limit",
    "file_size_limit_bytes",
    "workspace_limit_bytes",
    "tmp_limit_bytes",
    "output_limit_bytes",
)


class Excess(NamedTuple):
    """The first thing of which a child wants more than its parent has.

    ``field`` is below ``resources``; ``limit`` is the parent's.
    """

    field: str
    limit: int | float | str


def inherited(wanted: Resources, parent: Resources) -> Resources:
    """Return *wanted* with what it leaves out taken from *parent*."""
    filled = {name: getattr(wanted, name) or getattr(parent, name) for name in _OPTIONAL}
    network = wanted.network
    egress_bytes = network.egress_limit_bytes or parent.network.egress_limit_bytes
    if egress_bytes != network.egress_limit_bytes:
        network = replace(network, egress_limit_bytes=egress_bytes)
    cpu_time_us = wanted.cpu_time_limit_us
    if cpu_time_us is None:
        cpu_time_us = parent.cpu_time_limit_us
    return replace(wanted, **filled, cpu_time_limit_us=cpu_time_us, network=network)


def excess(child: Resources, parent: Resources) -> Excess | None:
    """Return the first field in which *child* has more than *parent*, or ``None``.

    Args:
        child: As :func:`inherited` gives it.
        parent: Of its parent; 0 in an optional limit is the node's default.
    """
    for name in (*_REQUIRED, *_OPTIONAL):
        limit = getattr(parent, name)
        if limit and getattr(child, name) > limit:
            return Excess(name, limit)
    limit_us = parent.cpu_time_limit_us
    if limit_us is not None and (child.cpu_time_limit_us is None or child.cpu_time_limit_us > limit_us):
        return Excess("cpu_time_limit", limit_us / MICROSECONDS)
    found = network_excess(child.network, parent.network)
    return None if found is None else Excess(f"network.{found.field}", found.limit)


def network_excess(child: NetworkPolicy, parent: NetworkPolicy) -> Excess | None:
    """Return the first licence that *child* has and *parent* does not, or ``None``."""
    reached = parent
    if parent.allow_external:
        names = tuple(text for text in child.allowed_hosts if _outside(hosts.rule(text)))
        reached = replace(parent, allowed_hosts=parent.allowed_hosts + names)
    match licences.wider_in(child, reached):
        case "":
            return None
        case "allowed_hosts":
            return Excess("allowed_hosts", ",".join(parent.allowed_hosts)[:MAX_LIMIT_CHARS])
        case "egress_limit_bytes":
            return Excess("egress_limit_bytes", parent.egress_limit_bytes)
        case field:
            return Excess(field, "false")


def _outside(rule: hosts.Rule) -> bool:
    # The whole outside has any name, but an address may be one of the host's own.
    return isinstance(rule.host, str) and rule.host.split(".")[-1] != "localhost"
