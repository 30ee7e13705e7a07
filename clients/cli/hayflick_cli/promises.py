"""The promises that a decision can break, and what asks after each. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hayflick_cli import birth_rules, end_rules
from hayflick_cli.entries import Entry
from hayflick_cli.history import History

Rule = Callable[[History, Entry], str]
"""Looks at a decision and the history before it; returns what is wrong, or ""."""


@dataclass(frozen=True, slots=True)
class Promise:
    """A promise, and what asks after it.

    Attributes:
        name: A word or two.
        statement: The promise.
        kinds: The kinds of entries that can break it.
        rule: Asks.
    """

    name: str
    statement: str
    kinds: tuple[str, ...]
    rule: Rule


BIRTH = ("worker_registered",)

PROMISES: tuple[Promise, ...] = (
    Promise(
        "manifest", "no worker without a manifest, issued before, once each", BIRTH, birth_rules.manifest
    ),
    Promise("population", "never more than max_replicas", BIRTH, birth_rules.population),
    Promise("depth", "never deeper than max_depth, one below its parent", BIRTH, birth_rules.depth),
    Promise("parentage", "born once, to a parent that lives", BIRTH, birth_rules.parentage),
    Promise("cooldown", "one parent's births a cooldown apart", BIRTH, birth_rules.cooldown),
    Promise(
        "kill switch", "no birth under a kill switch, nor of an old epoch", BIRTH, birth_rules.kill_switch
    ),
    Promise("quarantine", "no birth below a frozen worker", BIRTH, birth_rules.quarantine),
    Promise("end", "every end is counted once", ("worker_shutdown",), end_rules.end),
    Promise("lease", "not seen dead: lost, and only after the lease", ("worker_shutdown",), end_rules.lease),
    Promise("killed", "whom a kill confirmed is dead", ("kill_switch_confirmed",), end_rules.killed),
    Promise(
        "latch",
        "no turn of a latch is missing",
        ("kill_switch_engaged", "kill_switch_released", "quarantined", "quarantine_released"),
        end_rules.latch,
    ),
    Promise(
        "count",
        "a controller counts whom the record has",
        ("kill_switch_engaged", "quarantined"),
        end_rules.count,
    ),
)
"""In the order in which they are reported."""
