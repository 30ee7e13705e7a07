"""Family trees, as paths. Pure.

A worker's path is the identifiers from its root down to itself, joined and
ended by ``/``: ``root/child/grandchild/``. All descendants of a worker are then
one contiguous range of an ordinary index, on any database, and its ancestors are
in its own record.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from hayflick_controller.model import EVERYTHING, Scope, ScopeKind

if TYPE_CHECKING:
    from hayflick_controller.model import Worker

SEPARATOR = "/"
_AFTER_SEPARATOR = "0"  # the character that follows "/" in ASCII


def path_of(parent_path: str, worker_id: str) -> str:
    """Return the path of a worker born to the worker at *parent_path* ("" for a root)."""
    return f"{parent_path}{worker_id}{SEPARATOR}"


def members(path: str) -> tuple[str, ...]:
    """Return the identifiers on *path*, from the root down to the worker itself."""
    return tuple(path.split(SEPARATOR)[:-1])


def ancestors(path: str) -> tuple[str, ...]:
    """Return the identifiers above the worker at *path*, from the root down."""
    return members(path)[:-1]


def scopes_over(contract_id: str, path: str) -> list[Scope]:
    """Return every scope that a latch over a birth below *path* ("" for a root) may have."""
    scopes = [EVERYTHING, Scope(ScopeKind.CONTRACT, contract_id)]
    for worker_id in members(path):
        scopes += [Scope(ScopeKind.WORKER, worker_id), Scope(ScopeKind.QUARANTINE, worker_id)]
    return scopes


def subtree_range(path: str) -> tuple[str, str]:
    """Return [first, end): the paths that lie in it are the worker's own and its descendants'."""
    return path, path.removesuffix(SEPARATOR) + _AFTER_SEPARATOR


def covers(path: str, other: str) -> bool:
    """Return whether the worker at *other* is the worker at *path* or a descendant of it."""
    return other.startswith(path)


def topmost(workers: Iterable[Worker]) -> list[Worker]:
    """Return those of *workers* that have no ancestor among them."""
    tops: list[Worker] = []
    for worker in sorted(workers, key=lambda worker: worker.path):
        if not tops or not covers(tops[-1].path, worker.path):
            tops.append(worker)
    return tops


def below(tops: Iterable[Worker], workers: Sequence[Worker]) -> list[Worker]:
    """Return those of *workers* that descend from one of *tops*, without the tops themselves."""
    names = {worker.worker_id for worker in tops}
    return [worker for worker in workers if not names.isdisjoint(ancestors(worker.path))]


def parents_first(workers: Iterable[Worker]) -> list[Worker]:
    """Return *workers* ordered so that no child comes before its parent."""
    return sorted(workers, key=lambda worker: (worker.depth, worker.create_us, worker.worker_id))
