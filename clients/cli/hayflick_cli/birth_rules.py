"""What a birth must keep, asked of the history before it. Pure.

A rule returns what is wrong in words, or "" where all is well.
"""

from __future__ import annotations

from collections.abc import Iterator

from hayflick_cli.entries import Entry, instant_us
from hayflick_cli.history import QUARANTINE, History, Life, Manifest

SLACK_US = 1
"""Lengths of time are on record as decimal seconds; a microsecond is their last digit."""


def _parent(history: History, entry: Entry) -> Life | None:
    return history.lives.get(entry.parent_id) if entry.parent_id else None


def manifest(history: History, entry: Entry) -> str:
    """A birth uses a manifest that was issued before, for it alone, unused, in time, by a good key."""
    name = entry.text("manifest_id")
    found = history.manifests.get(name)
    if found is None:
        return f"no manifest {name} was issued before"
    return next(_faults_of(found, history, entry), "")


def _faults_of(found: Manifest, history: History, entry: Entry) -> Iterator[str]:
    issued, name = found.issued, entry.text("manifest_id")
    if found.undone:
        yield f"manifest {name} was taken back"
    if found.births:
        yield f"manifest {name} was used before"
    for field in ("contract_id", "worker_id", "parent_id"):
        if getattr(issued, field) != getattr(entry, field):
            yield f"manifest {name} was issued for another {field}"
    for detail in ("depth", "epoch", "state_snapshot_sha256", "cpu_millis", "memory_limit_bytes"):
        if issued.details.get(detail) != entry.details.get(detail):
            yield f"manifest {name} was issued with another {detail}"
    if entry.timestamp_us >= instant_us(issued.text("expire_time")):
        yield f"manifest {name} had expired"
    if issued.text("key_id") in history.revoked:
        yield f"the key of manifest {name} had been revoked"


def population(history: History, entry: Entry) -> str:
    """No more live than the contract allows."""
    contract = history.contracts.get(entry.contract_id)
    if contract is None:
        return f"there is no contract {entry.contract_id}"
    if contract.population >= contract.max_replicas:
        return f"{contract.population} lived and the contract allows {contract.max_replicas}"
    return ""


def depth(history: History, entry: Entry) -> str:
    """A worker is one generation below its parent, and none deeper than the contract allows."""
    stated = entry.number("depth")
    parent = _parent(history, entry)
    expected = 0 if parent is None else parent.depth + 1
    if stated != expected:
        return f"it is of generation {stated:.0f}, and its parent makes it {expected}"
    contract = history.contracts.get(entry.contract_id)
    if contract is not None and stated > contract.max_depth:
        return f"generation {stated:.0f}, and the contract allows {contract.max_depth}"
    return ""


def parentage(history: History, entry: Entry) -> str:
    """A worker is born once, to a parent that lives, under the same contract."""
    if entry.worker_id in history.lives:
        return f"worker {entry.worker_id} was born before"
    if not entry.parent_id:
        return ""
    parent = _parent(history, entry)
    if parent is None:
        return f"its parent {entry.parent_id} was never born"
    if parent.end is not None:
        return f"its parent {entry.parent_id} had ended"
    if parent.born.contract_id != entry.contract_id:
        return f"its parent {entry.parent_id} has another contract"
    return ""


def cooldown(history: History, entry: Entry) -> str:
    """One parent's births lie a cooldown apart; a launch that failed was none."""
    contract, parent = history.contracts.get(entry.contract_id), _parent(history, entry)
    if contract is None or parent is None or not contract.cooldown_us:
        return ""
    births = [child.born.timestamp_us for child in parent.children if child.end_reason != "launch_failed"]
    if not births:
        return ""
    passed_us = entry.timestamp_us - max(births)
    if passed_us + SLACK_US < contract.cooldown_us:
        cooldown_seconds = contract.cooldown_us / 1e6
        return f"{passed_us / 1e6} s after its parent's last birth; the cooldown is {cooldown_seconds} s"
    return ""


def kill_switch(history: History, entry: Entry) -> str:
    """Nobody is born under an engaged kill switch, nor by a manifest from before one was turned."""
    epoch = 0
    for scope, latch in history.latches_over(entry.contract_id, _parent(history, entry)):
        if scope.startswith(QUARANTINE):
            continue
        if latch.engaged:
            return f"the kill switch over {scope} was engaged"
        epoch += latch.epoch
    if entry.number("epoch") != epoch:
        return f"its epoch is {entry.number('epoch'):.0f}, and those of its kill switches make {epoch}"
    return ""


def quarantine(history: History, entry: Entry) -> str:
    """Nobody is born below a frozen worker."""
    for scope, latch in history.latches_over(entry.contract_id, _parent(history, entry)):
        if scope.startswith(QUARANTINE) and latch.engaged:
            return f"{scope.removeprefix(QUARANTINE)}, its parent or an ancestor, was quarantined"
    return ""
