"""What a transaction need not ask the database for."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hayflick_controller.model import (
        Answer,
        Contract,
        Key,
        Latch,
        ManifestStatus,
        Node,
        StopCondition,
        Worker,
    )


@dataclass(slots=True)
class Immutable:
    """What never changes once it is written, kept from one transaction to the next.

    Names are random and never used twice, so that a row whose transaction was
    rolled back after it was read here cannot be taken for another.

    Attributes:
        conditions: Stop conditions by contract; they may hold megabytes.
        secrets: Signing secrets by key and contract.
    """

    conditions: MutableMapping[str, tuple[StopCondition, ...]] = field(default_factory=dict)
    secrets: MutableMapping[tuple[str, str], bytes] = field(default_factory=dict, repr=False)


@dataclass(slots=True)
class Known:
    """Rows by their names; ``None`` where there is no such row, no entry where nobody looked.

    It stays true to the commit's end, because nothing else writes meanwhile:
    commits take turns, on any database. Each part of a transaction drops from
    here what it changes, and so does not have to take it back when it fails.

    Attributes:
        immutable: What outlives the commit.
        answers: By request.
        contracts: With the changes of population of every transaction in the commit that has
            ended, written or not.
        keys: Without their secrets.
        latches: By the scope's key.
        nodes: By name.
        statuses: Of manifests, each with its contract.
        workers: Without their snapshots.
    """

    immutable: Immutable
    answers: dict[str, Answer | None] = field(default_factory=dict)
    contracts: dict[str, Contract | None] = field(default_factory=dict)
    keys: dict[str, Key | None] = field(default_factory=dict)
    latches: dict[str, Latch | None] = field(default_factory=dict)
    nodes: dict[str, Node | None] = field(default_factory=dict)
    statuses: dict[str, tuple[str, ManifestStatus] | None] = field(default_factory=dict)
    workers: dict[str, Worker | None] = field(default_factory=dict)
