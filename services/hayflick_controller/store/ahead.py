"""What the transactions of a commit are going to read, read for all of them at once.

A decision reads some ten rows by their names, and most of the names are in the
request. So whoever asks for a transaction may say them
(:class:`~hayflick_controller.store.protocol.Needs`), and they are read for the whole
commit in one round trip, or in two where there are parents. A name that was not
said, or that turns out to be another, is read when it is asked for: what is
:class:`~hayflick_controller.store.known.Known` only saves time.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from sqlalchemy import Column, Select, bindparam, select

from hayflick_controller import lineage
from hayflick_controller.model import Answer, ManifestStatus
from hayflick_controller.store import rows, schema
from hayflick_controller.store.keys import KEY_COLUMNS
from hayflick_controller.store.known import Known
from hayflick_controller.store.workers import WORKERS
from hayflick_rpc.wire import ID_PATTERN

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hayflick_controller.store.driver import Driver
    from hayflick_controller.store.known import Immutable
    from hayflick_controller.store.prepared import Parameters
    from hayflick_controller.store.protocol import Needs

SIZES = (1, 4, 16, 64)
"""How many names one statement takes: few numbers, so that few statements are prepared."""

Kind = tuple[Select[Any], Column[Any]]

ANSWERS: Kind = select(schema.answers), schema.answers.c.request_id
CONTRACTS: Kind = select(schema.contracts).with_for_update(), schema.contracts.c.contract_id
KEYS: Kind = select(*KEY_COLUMNS), schema.keys.c.key_id
LATCHES: Kind = select(schema.latches), schema.latches.c.scope
NODES: Kind = select(schema.nodes), schema.nodes.c.node_id
STATUSES: Kind = (
    select(schema.manifests.c.manifest_id, schema.manifests.c.contract_id, schema.manifests.c.status),
    schema.manifests.c.manifest_id,
)
PARENTS: Kind = WORKERS, schema.workers.c.worker_id


def read(driver: Driver, needs: Sequence[Needs], immutable: Immutable) -> Known:
    """Return what *needs* name, as it is now.

    Args:
        driver: In the transaction that will commit.
        needs: Of every transaction in it.
        immutable: A contract whose conditions it does not hold is left out.
    """
    known = Known(immutable)
    conditions = immutable.conditions
    parent_ids = _names(need.parent_id for need in needs)
    if parent_ids:  # they lead to the latches over them
        (workers,) = _find(driver, [(PARENTS, parent_ids)])
        known.workers = dict.fromkeys(parent_ids)
        known.workers.update((row.worker_id, rows.worker(row)) for row in workers)
    scopes = {
        scope.key
        for need in needs
        if need.contract_id
        for scope in lineage.scopes_over(need.contract_id, _path(known, need.parent_id))
    }
    asked = {
        ANSWERS: _names(need.request_id for need in needs),
        CONTRACTS: _names(need.contract_id for need in needs if need.contract_id in conditions),
        KEYS: _names(need.key_id for need in needs),
        LATCHES: sorted(scopes),
        NODES: _names(need.node_id for need in needs),
        STATUSES: _names(need.manifest_id for need in needs),
    }
    answers, contracts, keys, latches, nodes, statuses = _find(driver, list(asked.items()))
    known.answers = dict.fromkeys(asked[ANSWERS])
    known.answers.update((row.request_id, Answer(*row)) for row in answers)
    known.contracts = dict.fromkeys(asked[CONTRACTS])
    known.contracts.update(
        (row.contract_id, rows.contract(row, conditions[row.contract_id])) for row in contracts
    )
    known.keys = dict.fromkeys(asked[KEYS])
    known.keys.update((row.key_id, rows.key(row)) for row in keys)
    known.latches = dict.fromkeys(asked[LATCHES])
    known.latches.update((row.scope, rows.latch(row)) for row in latches)
    known.nodes = dict.fromkeys(asked[NODES])
    known.nodes.update((row.node_id, rows.node(row)) for row in nodes)
    known.statuses = dict.fromkeys(asked[STATUSES])
    known.statuses.update(
        (row.manifest_id, (row.contract_id, ManifestStatus(row.status))) for row in statuses
    )
    return known


@functools.cache
def among(kind: Kind, count: int) -> Select[Any]:
    """Return the statement that finds the rows of *kind* by *count* names, bound as ``n0`` and so on."""
    statement, column = kind
    return statement.where(column.in_([bindparam(f"n{place}") for place in range(count)]))


def _find(driver: Driver, asked: Sequence[tuple[Kind, Sequence[str]]]) -> list[list[Any]]:
    """Return the rows that each kind has by its names, in one round trip."""
    statements: list[tuple[Select[Any], Parameters]] = []
    owners: list[int] = []
    for owner, (kind, names) in enumerate(asked):
        for start in range(0, len(names), SIZES[-1]):
            some = list(names[start : start + SIZES[-1]])
            size = next(size for size in SIZES if size >= len(some))
            some += some[-1:] * (size - len(some))
            statements.append((among(kind, size), {f"n{place}": name for place, name in enumerate(some)}))
            owners.append(owner)
    found: list[list[Any]] = [[] for _ in asked]
    if statements:
        for owner, rows_ in zip(owners, driver.gather(statements), strict=True):
            found[owner] += rows_
    return found


def _names(values: Iterable[str]) -> list[str]:
    """Return each of *values* once. What is not a name of ours (of a forged manifest) is left out."""
    return sorted({value for value in values if ID_PATTERN.fullmatch(value)})


def _path(known: Known, parent_id: str) -> str:
    parent = known.workers.get(parent_id)
    return parent.path if parent is not None else ""
