"""What one network policy has that another has not. Pure."""

from __future__ import annotations

from dataclasses import replace

from hayflick_controller.model import NetworkPolicy
from hayflick_rpc import hosts


def wider_in(wanted: NetworkPolicy, held: NetworkPolicy) -> str:
    """Return the first field in which *wanted* is wider than *held*; empty when it is in none.

    Without hosts nothing can cross the proxy, and its limit is of no account.
    """
    for name in ("allow_controller", "allow_external", "allow_loopback"):
        if getattr(wanted, name) and not getattr(held, name):
            return name
    if not hosts.covered(hosts.rules(wanted.allowed_hosts), by=hosts.rules(held.allowed_hosts)):
        return "allowed_hosts"
    if wanted.allowed_hosts and _limit(wanted) > _limit(held):
        return "egress_limit_bytes"
    return ""


def common(first: NetworkPolicy, second: NetworkPolicy) -> NetworkPolicy:
    """Return what both policies give, so that it is wider than neither."""
    shared = hosts.common(hosts.rules(first.allowed_hosts), hosts.rules(second.allowed_hosts))
    limit = min(_limit(first), _limit(second))
    return NetworkPolicy(
        allow_controller=first.allow_controller and second.allow_controller,
        allow_external=first.allow_external and second.allow_external,
        allow_loopback=first.allow_loopback and second.allow_loopback,
        allowed_hosts=shared,
        egress_limit_bytes=0 if limit == float("inf") else int(limit),
    )


def settled(network: NetworkPolicy) -> NetworkPolicy:
    """Return *network* without a limit that limits nothing."""
    return network if network.allowed_hosts else replace(network, egress_limit_bytes=0)


def _limit(network: NetworkPolicy) -> float:
    return network.egress_limit_bytes or float("inf")
