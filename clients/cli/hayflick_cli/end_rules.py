"""What ends, kills and latches must keep, asked of the history before each. Pure.

A rule returns what is wrong in words, or "" where all is well.
"""

from __future__ import annotations

from hayflick_cli.birth_rules import SLACK_US
from hayflick_cli.entries import Entry
from hayflick_cli.history import History
from hayflick_cli.ordering import boot_of


def end(history: History, entry: Entry) -> str:
    """A worker that was born ends once, on its node."""
    life = history.lives.get(entry.worker_id)
    if life is None:
        return f"worker {entry.worker_id} was never born"
    if life.end is not None:
        return f"worker {entry.worker_id} had ended in entry {life.end.index}"
    if life.node_id != entry.text("node_id"):
        return f"worker {entry.worker_id} ran on {life.node_id}"
    return ""


def lease(history: History, entry: Entry) -> str:
    """Who was not seen dead is called lost, never killed, and only after the lease of its node."""
    if "silent_seconds" not in entry.details:
        return "" if entry.text("node_id") in history.nodes else "its node was never connected"
    if entry.text("end_reason") != "node_lost":
        return f"called {entry.text('end_reason')}, and nobody saw it die"
    lease_seconds = entry.number("lease_seconds")
    if entry.number("silent_seconds") < lease_seconds:
        return f"lost after {entry.number('silent_seconds')} s of a lease of {lease_seconds} s"
    node = history.nodes.get(entry.text("node_id"))
    if node is None or boot_of(node) != boot_of(entry):
        return ""  # that controller's clock is another
    since_us = entry.timestamp_us - node.timestamp_us
    if since_us + SLACK_US < lease_seconds * 1e6:
        return f"lost {since_us / 1e6} s after its node connected, with a lease of {lease_seconds} s"
    return ""


def latch(history: History, entry: Entry) -> str:
    """Each turn of a latch begins the next epoch: none is missing from the record."""
    found = history.latches.get(entry.text("scope"))
    before = 0 if found is None else found.epoch
    if entry.number("epoch") != before + 1:
        return f"{entry.text('scope')} goes from epoch {before} to {entry.number('epoch'):.0f}"
    return ""


def count(history: History, entry: Entry) -> str:
    """How many a controller says live in a scope is how many the record says."""
    living = len(history.living(entry.text("scope")))
    if entry.number("worker_count") != living:
        return f"{entry.number('worker_count'):.0f} lived in {entry.text('scope')}; on record are {living}"
    return ""


def killed(history: History, entry: Entry) -> str:
    """Whom a kill confirmed is dead, and was seen dead."""
    scope = entry.text("scope")
    found = history.latches.get(scope)
    engaged = [epoch for epoch in found.targets if epoch <= entry.number("epoch")] if found else []
    if found is None or not engaged:
        return f"no kill switch over {scope} was engaged"
    targets = found.targets[max(engaged)]
    unconfirmed = entry.number("unconfirmed_count")
    alive = [life.worker_id for life in targets if life.end is None]
    if len(alive) > unconfirmed:
        named = entry.details.get("unconfirmed_worker_ids", [])
        unnamed = [worker_id for worker_id in alive if worker_id not in named]
        return f"{len(alive)} live and {unconfirmed:.0f} were not confirmed, among them {unnamed[0]}"
    seen = sum(life.seen_dead for life in targets)
    if entry.number("dead_count") > seen:
        return f"{entry.number('dead_count'):.0f} are called dead, and {seen} were seen dead"
    return ""
