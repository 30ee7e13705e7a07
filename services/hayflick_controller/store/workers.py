"""Workers: their lives, their families, what was last heard of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Select,
    and_,
    bindparam,
    case,
    delete,
    func,
    insert,
    or_,
    select,
    tuple_,
    update,
)

from hayflick_controller import lineage
from hayflick_controller.conditions import Family
from hayflick_controller.model import EndReason, Exit, State, Worker
from hayflick_controller.store import rows, schema
from hayflick_controller.store.part import Part, batches, new
from hayflick_controller.store.protocol import Beat

manifests, workers = schema.manifests, schema.workers

_ENDED = State.ENDED.value

WORKERS: Select[Any] = select(workers, *schema.manifest_columns).join(
    manifests, manifests.c.manifest_id == workers.c.manifest_id
)
WORKER = WORKERS.where(workers.c.worker_id == bindparam("worker_id"))
WORKER_WITH_SNAPSHOT = WORKER.add_columns(manifests.c.snapshot)
# LIVE and STOPPING literally as in the partial indexes, so that the planner sees that they apply.
LIVE_OF_ROOT = WORKERS.where(schema.LIVE, workers.c.root_id == bindparam("root_id"))
STOPPING = WORKERS.where(schema.STOPPING)
STOPPING_NAMES = select(workers.c.node_id, workers.c.worker_id).where(schema.STOPPING)
ADD_WORKER = insert(workers)
REMOVE_WORKER = delete(workers).where(workers.c.worker_id == bindparam("worker_id"))
LAST_BIRTH = (
    select(workers.c.create_us)
    .where(
        workers.c.parent_id == bindparam("parent_id"),
        or_(workers.c.end_reason.is_(None), workers.c.end_reason != EndReason.LAUNCH_FAILED.value),
    )
    .order_by(workers.c.create_us.desc())
    .limit(1)
)
SPAWN_COUNT = select(workers.c.spawn_count).where(workers.c.worker_id == bindparam("worker_id"))
SPAWNED = (
    update(workers)
    .where(workers.c.worker_id == bindparam("key"))
    .values(spawn_count=workers.c.spawn_count + bindparam("change"))
)
PROMISED_SPAWNS = (
    select(func.count().label("promised"))
    .select_from(manifests.join(workers, workers.c.worker_id == manifests.c.parent_id))
    .where(
        schema.RESERVED,
        manifests.c.contract_id == bindparam("contract_id"),
        manifests.c.expire_us > bindparam("now_us"),
        workers.c.root_id == bindparam("root_id"),
    )
)
FAMILY = select(
    func.count().label("live"),
    func.coalesce(func.sum(case((workers.c.parent_id == bindparam("parent_id"), 1), else_=0)), 0).label(
        "siblings"
    ),
).where(workers.c.root_id == bindparam("root_id"), schema.LIVE)


def _write(*names: str) -> Any:  # noqa: ANN401 -- an update that may be narrowed further
    values: dict[str, Any] = {name: bindparam(f"new_{name}") for name in names}
    return update(workers).where(workers.c.worker_id == bindparam("key")).values(values)


BEAT = _write("last_heartbeat_us", *rows.USAGE_COLUMNS).where(workers.c.state != _ENDED)
STATE = _write("state", "stop_reason", "stop_detail")
NETWORK = _write("network")
END = _write("state", "last_heartbeat_us", *rows.USAGE_COLUMNS, *rows.EXIT_COLUMNS)


class Workers(Part):
    """See :class:`~hayflick_controller.store.protocol.Tx`."""

    def add_worker(self, worker: Worker) -> None:  # noqa: D102
        self._known.workers.pop(worker.worker_id, None)
        self._driver.later(ADD_WORKER, rows.worker_values(worker))
        self._spawned([worker], 1)
        self._count(worker, 1)
        self._changed[worker.worker_id] = worker

    def remove_worker(self, worker: Worker) -> None:  # noqa: D102
        self._known.workers.pop(worker.worker_id, None)
        self._driver.run(REMOVE_WORKER, {"worker_id": worker.worker_id})
        self._spawned([worker], -1)
        self._count(worker, -1)
        gone = Exit(EndReason.LAUNCH_FAILED, worker.create_us, "its birth could not be recorded")
        self._changed[worker.worker_id] = replace(worker, state=State.ENDED, exit=gone)

    def worker(self, worker_id: str, *, with_snapshot: bool = False) -> Worker | None:  # noqa: D102
        if not with_snapshot and worker_id in self._known.workers:
            return self._known.workers[worker_id]
        statement = WORKER_WITH_SNAPSHOT if with_snapshot else WORKER
        row = self._driver.one(statement, {"worker_id": worker_id})
        return None if row is None else rows.worker(row, row.snapshot if with_snapshot else "")

    def workers(  # noqa: D102
        self,
        *,
        after: tuple[int, str] | None,
        limit: int,
        contract_id: str = "",
        states: Sequence[State] = (),
    ) -> list[Worker]:
        query = WORKERS.order_by(workers.c.create_us, workers.c.worker_id).limit(limit)
        if after is not None:
            query = query.where(tuple_(workers.c.create_us, workers.c.worker_id) > after)
        if contract_id:
            query = query.where(workers.c.contract_id == contract_id)
        if states:
            query = query.where(workers.c.state.in_([state.value for state in states]))
        return self._found(query)

    def live_workers(  # noqa: D102
        self,
        *,
        contract_id: str = "",
        node_id: str = "",
        path: str = "",
        stopping: bool = False,
    ) -> list[Worker]:
        if stopping and not (contract_id or node_id or path):  # what the pursuit asks after many a death
            return [rows.worker(row) for row in self._driver.all(STOPPING)]
        query = WORKERS.where(schema.STOPPING if stopping else schema.LIVE)
        if contract_id:
            query = query.where(workers.c.contract_id == contract_id)
        if node_id:
            query = query.where(workers.c.node_id == node_id)
        if path:
            query = query.where(in_subtree(path))
        return self._found(query)

    def stopping(self) -> list[tuple[str, str]]:  # noqa: D102
        return [(row.node_id, row.worker_id) for row in self._driver.all(STOPPING_NAMES)]

    def live_families(self, root_ids: Iterable[str]) -> list[Worker]:  # noqa: D102
        roots = sorted(set(root_ids))
        if len(roots) == 1:  # one death at a time is the common case
            return [rows.worker(row) for row in self._driver.all(LIVE_OF_ROOT, {"root_id": roots[0]})]
        query = WORKERS.where(schema.LIVE)
        return [
            worker
            for part in batches(roots)
            for worker in self._found(query.where(workers.c.root_id.in_(part)))
        ]

    def descendants(self, path: str) -> list[Worker]:  # noqa: D102
        query = WORKERS.where(in_subtree(path), workers.c.path != path)
        return lineage.parents_first(self._found(query))

    def last_birth_us(self, parent_id: str) -> int | None:  # noqa: D102
        row = self._driver.one(LAST_BIRTH, {"parent_id": parent_id})
        return None if row is None else int(row.create_us)

    def spawn_count(self, root_id: str) -> int:  # noqa: D102
        row = self._driver.one(SPAWN_COUNT, {"worker_id": root_id})
        return 0 if row is None else int(row.spawn_count)

    def promised_spawns(self, contract_id: str, root_id: str, now_us: int) -> int:  # noqa: D102
        names = {"contract_id": contract_id, "root_id": root_id, "now_us": now_us}
        return int(self._driver.one(PROMISED_SPAWNS, names).promised)

    def family(self, root_id: str, parent_id: str) -> Family:  # noqa: D102
        row = self._driver.one(FAMILY, {"root_id": root_id, "parent_id": parent_id})
        return Family(root_id, int(row.live), int(row.siblings) if parent_id else 0)

    def update_states(self, workers: Sequence[Worker]) -> None:  # noqa: D102
        self._known.workers.clear()
        self._driver.run_many(
            STATE,
            [
                {
                    "key": worker.worker_id,
                    "new_state": worker.state.value,
                    "new_stop_reason": worker.stop_reason.value if worker.stop_reason else None,
                    "new_stop_detail": worker.stop_detail,
                }
                for worker in workers
            ],
        )
        self._changed.update((worker.worker_id, worker) for worker in workers)

    def narrow_workers(self, workers: Sequence[Worker]) -> None:  # noqa: D102
        self._known.workers.clear()
        self._driver.run_many(
            NETWORK,
            [
                {"key": worker.worker_id, "new_network": rows.network_text(worker.network)}
                for worker in workers
            ],
        )
        self._changed.update((worker.worker_id, worker) for worker in workers)

    def end_workers(self, workers: Sequence[Worker]) -> None:  # noqa: D102
        self._known.workers.clear()
        self._driver.run_many(
            END,
            [
                {
                    "key": worker.worker_id,
                    "new_state": _ENDED,
                    "new_last_heartbeat_us": worker.last_heartbeat_us,
                    **new(rows.usage_values(worker.usage)),
                    **new(rows.exit_values(worker.exit)),
                }
                for worker in workers
            ],
        )
        failed = [one for one in workers if one.exit and one.exit.reason is EndReason.LAUNCH_FAILED]
        self._spawned(failed, -1)
        for worker in workers:
            self._count(worker, -1)
            self._changed[worker.worker_id] = replace(worker, state=State.ENDED)

    def heard(self, worker_ids: Iterable[str]) -> list[Worker]:  # noqa: D102
        found = [
            worker
            for part in batches(sorted(set(worker_ids)))
            for worker in self._found(WORKERS.where(workers.c.worker_id.in_(part)))
        ]
        self._heard.update((worker.worker_id, worker) for worker in found)
        return found

    def beat(self, beats: Sequence[Beat]) -> None:  # noqa: D102
        self._known.workers.clear()
        self._driver.run_many(
            BEAT,
            [
                {
                    "key": beat.worker_id,
                    "new_last_heartbeat_us": beat.last_heartbeat_us,
                    **new(rows.usage_values(beat.usage)),
                }
                for beat in beats
            ],
        )

    def _found(self, query: Select[Any]) -> list[Worker]:
        return [rows.worker(row) for row in self._driver.query(query)]

    def _spawned(self, workers: Sequence[Worker], change: int) -> None:
        """Count births below roots, on each root's own row: a family's whole life may be long."""
        for worker in workers:
            if worker.parent_id:
                self._driver.later(SPAWNED, {"key": worker.root_id, "change": change})

    def _count(self, worker: Worker, active: int) -> None:
        change = self._population[worker.contract_id]
        change.active += active
        change.version += 1


def in_subtree(path: str) -> ColumnElement[bool]:
    """Return the condition that a worker is the one at *path* or descends from it."""
    first, end = lineage.subtree_range(path)
    return and_(workers.c.path >= first, workers.c.path < end)
