"""One transaction in SQL. Statements are built once; SQLAlchemy keeps them compiled."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    and_,
    bindparam,
    case,
    delete,
    func,
    insert,
    or_,
    select,
    true,
    tuple_,
    update,
)

from hayflick_controller import lineage, render
from hayflick_controller.conditions import Family
from hayflick_controller.model import (
    Answer,
    Contract,
    EndReason,
    Event,
    Exit,
    Latch,
    Manifest,
    ManifestStatus,
    Node,
    Scope,
    ScopeKind,
    State,
    StopCondition,
    Worker,
)
from hayflick_controller.store import rows, schema
from hayflick_controller.store.protocol import Beat, Commit, Queued

T = TypeVar("T")

IN_LIMIT = 500
"""How many values go into one IN; every database takes that many."""

_RESERVED = ManifestStatus.RESERVED.value
_ENDED = State.ENDED.value

answers, contracts, conditions, keys = schema.answers, schema.contracts, schema.conditions, schema.keys
latches, manifests, nodes, outbox = schema.latches, schema.manifests, schema.nodes, schema.outbox
workers = schema.workers

_manifest_columns = (
    manifests.c.resources,
    manifests.c.epoch,
    manifests.c.issue_us,
    manifests.c.expire_us.label("manifest_expire_us"),
    manifests.c.key_id,
    manifests.c.signature,
)

ANSWER = select(answers).where(answers.c.request_id == bindparam("request_id"))
CONTRACT = select(contracts).where(contracts.c.contract_id == bindparam("contract_id"))
CONTRACT_LOCKED = CONTRACT.with_for_update()
CONDITIONS = (
    select(conditions)
    .where(conditions.c.contract_id == bindparam("contract_id"))
    .order_by(conditions.c.position)
)
POPULATION = (
    update(contracts)
    .where(contracts.c.contract_id == bindparam("key"))
    .values(
        active_count=contracts.c.active_count + bindparam("active"),
        reserved_count=contracts.c.reserved_count + bindparam("reserved"),
        population_version=contracts.c.population_version + bindparam("version"),
    )
)
SECRET = select(keys.c.secret).where(
    keys.c.key_id == bindparam("key_id"), keys.c.contract_id == bindparam("contract_id")
)
LATCHES = select(latches).where(latches.c.scope.in_(bindparam("scopes", expanding=True)))
MANIFEST = select(
    manifests.c.manifest_id,
    manifests.c.contract_id,
    manifests.c.worker_id,
    manifests.c.parent_id,
    manifests.c.depth,
    manifests.c.status,
    *_manifest_columns,
).where(manifests.c.manifest_id == bindparam("manifest_id"))
MANIFEST_WITH_SNAPSHOT = MANIFEST.add_columns(manifests.c.snapshot)
STATUS = select(manifests.c.contract_id, manifests.c.status).where(
    manifests.c.manifest_id == bindparam("manifest_id")
)
SETTLE = (
    update(manifests).where(manifests.c.manifest_id == bindparam("key")).values(status=bindparam("value"))
)
LAST_RESERVATION = (
    select(manifests.c.issue_us)
    .where(
        schema.RESERVED,
        manifests.c.parent_id == bindparam("parent_id"),
        manifests.c.expire_us > bindparam("now_us"),
    )
    .order_by(manifests.c.issue_us.desc())
    .limit(1)
)
WORKERS: Select[Any] = select(workers, *_manifest_columns).join(
    manifests, manifests.c.manifest_id == workers.c.manifest_id
)
WORKER = WORKERS.where(workers.c.worker_id == bindparam("worker_id"))
WORKER_WITH_SNAPSHOT = WORKER.add_columns(manifests.c.snapshot)
LAST_BIRTH = (
    select(workers.c.create_us)
    .where(
        workers.c.parent_id == bindparam("parent_id"),
        or_(workers.c.end_reason.is_(None), workers.c.end_reason != EndReason.LAUNCH_FAILED.value),
    )
    .order_by(workers.c.create_us.desc())
    .limit(1)
)
FAMILY = select(
    func.count(),
    func.coalesce(func.sum(case((workers.c.parent_id == bindparam("parent_id"), 1), else_=0)), 0),
).where(workers.c.root_id == bindparam("root_id"), schema.LIVE)
BEAT = (
    update(workers)
    .where(workers.c.worker_id == bindparam("key"), workers.c.state != _ENDED)
    .values({name: bindparam(f"new_{name}") for name in ("last_heartbeat_us", *rows.USAGE_COLUMNS)})
)
STATE = (
    update(workers)
    .where(workers.c.worker_id == bindparam("key"))
    .values({name: bindparam(f"new_{name}") for name in ("state", "stop_reason", "stop_detail")})
)
END = (
    update(workers)
    .where(workers.c.worker_id == bindparam("key"))
    .values(
        {
            name: bindparam(f"new_{name}")
            for name in ("state", "last_heartbeat_us", *rows.USAGE_COLUMNS, *rows.EXIT_COLUMNS)
        }
    )
)
QUEUED = (
    select(outbox)
    .where(outbox.c.position > bindparam("after"))
    .order_by(outbox.c.position)
    .limit(bindparam("limit"))
)
DELIVERED = delete(outbox).where(outbox.c.position <= bindparam("upto"))
NODE_ACK = update(nodes).where(nodes.c.node_id == bindparam("key")).values(last_ack_us=bindparam("ack_us"))

ConditionCache = MutableMapping[str, tuple[StopCondition, ...]]


class SqlTx:
    """See :class:`~hayflick_controller.store.protocol.Tx`."""

    def __init__(self, connection: Connection, boot: int, sequence: int, cache: ConditionCache) -> None:
        self._connection = connection
        self._boot = boot
        self.sequence = sequence
        self._cache = cache
        self._events: list[Queued] = []
        self._changed: dict[str, Worker] = {}
        self._population: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0, 0])

    def finish(self) -> Commit:
        """Write what was held back; the transaction may then be committed."""
        self._write_population()
        if self._events:
            self._connection.execute(
                insert(outbox), [{"position": event.position, "body": event.body} for event in self._events]
            )
        return Commit(tuple(self._events), tuple(self._changed.values()))

    # Requests

    def answer(self, request_id: str) -> Answer | None:  # noqa: D102 -- the protocol documents these
        row = self._one(ANSWER, request_id=request_id)
        if row is None:
            return None
        return Answer(row.request_id, row.method, row.digest, row.body, row.position, row.create_us)

    def remember(self, answer: Answer) -> None:  # noqa: D102
        self._connection.execute(
            insert(answers),
            {
                "request_id": answer.request_id,
                "method": answer.method,
                "digest": answer.digest,
                "body": answer.body,
                "position": answer.position,
                "create_us": answer.create_us,
            },
        )

    def complete(self, request_id: str, body: bytes, position: int) -> None:  # noqa: D102
        self._connection.execute(
            update(answers).where(answers.c.request_id == request_id).values(body=body, position=position)
        )

    def forget(self, request_id: str) -> None:  # noqa: D102
        self._connection.execute(delete(answers).where(answers.c.request_id == request_id))

    def forget_before(self, create_us: int) -> int:  # noqa: D102
        old_answers = self._connection.execute(delete(answers).where(answers.c.create_us < create_us))
        old_manifests = self._connection.execute(
            delete(manifests).where(
                manifests.c.status == ManifestStatus.RETURNED.value, manifests.c.expire_us < create_us
            )
        )
        return int(old_answers.rowcount) + int(old_manifests.rowcount)

    # Contracts

    def add_contract(self, contract: Contract, secret: bytes) -> None:  # noqa: D102
        self._connection.execute(insert(contracts), rows.contract_values(contract))
        if contract.policy.stop_conditions:
            self._connection.execute(
                insert(conditions),
                [
                    rows.condition_values(contract.contract_id, position, condition)
                    for position, condition in enumerate(contract.policy.stop_conditions)
                ],
            )
        self._connection.execute(
            insert(keys),
            {
                "key_id": contract.key_id,
                "contract_id": contract.contract_id,
                "secret": secret,
                "create_us": contract.create_us,
            },
        )

    def contract(self, contract_id: str, *, lock: bool = False) -> Contract | None:  # noqa: D102
        self._write_population()
        row = self._one(CONTRACT_LOCKED if lock else CONTRACT, contract_id=contract_id)
        return None if row is None else rows.contract(row, self._conditions(contract_id))

    def contracts(self, before: tuple[int, str] | None, limit: int) -> list[Contract]:  # noqa: D102
        self._write_population()
        place = tuple_(contracts.c.create_us, contracts.c.contract_id)
        query = select(contracts).order_by(contracts.c.create_us.desc(), contracts.c.contract_id.desc())
        if before is not None:
            query = query.where(place < before)
        found = self._connection.execute(query.limit(limit)).all()
        return [rows.contract(row, self._conditions(row.contract_id)) for row in found]

    def secret(self, key_id: str, contract_id: str) -> bytes | None:  # noqa: D102
        row = self._one(SECRET, key_id=key_id, contract_id=contract_id)
        return None if row is None else bytes(row.secret)

    # Latches

    def latches(self, scopes: Iterable[Scope]) -> dict[Scope, Latch]:  # noqa: D102
        found: dict[Scope, Latch] = {}
        for keys_ in _batches([scope.key for scope in scopes]):
            for row in self._connection.execute(LATCHES, {"scopes": keys_}):
                latch = rows.latch(row)
                found[latch.scope] = latch
        return found

    def engaged(self) -> list[Latch]:  # noqa: D102
        found = self._connection.execute(select(latches).where(latches.c.engaged).order_by(latches.c.scope))
        return [rows.latch(row) for row in found]

    def put_latch(self, latch: Latch) -> None:  # noqa: D102
        values = rows.latch_values(latch)
        changed = self._connection.execute(
            update(latches).where(latches.c.scope == values["scope"]).values(values)
        )
        if not changed.rowcount:
            self._connection.execute(insert(latches), values)

    # Manifests

    def add_manifest(self, manifest: Manifest) -> None:  # noqa: D102
        self._connection.execute(insert(manifests), rows.manifest_values(manifest))
        self._population[manifest.contract_id][1] += 1

    def manifest(  # noqa: D102
        self, manifest_id: str, *, with_snapshot: bool = False
    ) -> tuple[Manifest, ManifestStatus] | None:
        row = self._one(MANIFEST_WITH_SNAPSHOT if with_snapshot else MANIFEST, manifest_id=manifest_id)
        if row is None:
            return None
        return rows.manifest(row, row.snapshot if with_snapshot else ""), ManifestStatus(row.status)

    def settle(self, manifest_id: str, status: ManifestStatus) -> None:  # noqa: D102
        row = self._one(STATUS, manifest_id=manifest_id)
        if row is None or row.status == status.value:
            return
        self._connection.execute(SETTLE, {"key": manifest_id, "value": status.value})
        self._population[row.contract_id][1] += (status.value == _RESERVED) - (row.status == _RESERVED)

    def return_expired(self, now_us: int, contract_id: str | None = None) -> dict[str, int]:  # noqa: D102
        expired = manifests.c.expire_us <= now_us
        if contract_id is not None:
            expired = and_(expired, manifests.c.contract_id == contract_id)
        return self._return(expired)

    def return_reserved(self, scope: Scope, path: str = "") -> dict[str, int]:  # noqa: D102
        match scope.kind:
            case ScopeKind.EVERYTHING:
                return self._return(true())
            case ScopeKind.CONTRACT:
                return self._return(manifests.c.contract_id == scope.id)
            case _:
                members = select(workers.c.worker_id).where(_in_subtree(path))
                return self._return(manifests.c.parent_id.in_(members))

    def last_reservation_us(self, parent_id: str, now_us: int) -> int | None:  # noqa: D102
        row = self._one(LAST_RESERVATION, parent_id=parent_id, now_us=now_us)
        return None if row is None else int(row.issue_us)

    # Workers

    def add_worker(self, worker: Worker) -> None:  # noqa: D102
        self._connection.execute(insert(workers), rows.worker_values(worker))
        self._count(worker, 1)
        self._changed[worker.worker_id] = worker

    def remove_worker(self, worker: Worker) -> None:  # noqa: D102
        self._connection.execute(delete(workers).where(workers.c.worker_id == worker.worker_id))
        self._count(worker, -1)
        gone = Exit(EndReason.LAUNCH_FAILED, worker.create_us, "its birth could not be recorded")
        self._changed[worker.worker_id] = replace(worker, state=State.ENDED, exit=gone)

    def worker(self, worker_id: str, *, with_snapshot: bool = False) -> Worker | None:  # noqa: D102
        row = self._one(WORKER_WITH_SNAPSHOT if with_snapshot else WORKER, worker_id=worker_id)
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
        return [rows.worker(row) for row in self._connection.execute(query)]

    def live_workers(  # noqa: D102
        self,
        *,
        contract_id: str = "",
        node_id: str = "",
        path: str = "",
        roots: Iterable[str] | None = None,
        stopping: bool = False,
    ) -> list[Worker]:
        # Literally as in the partial indexes, so that the planner sees that they apply.
        query = WORKERS.where(schema.STOPPING if stopping else schema.LIVE)
        if contract_id:
            query = query.where(workers.c.contract_id == contract_id)
        if node_id:
            query = query.where(workers.c.node_id == node_id)
        if path:
            query = query.where(_in_subtree(path))
        if roots is None:
            return [rows.worker(row) for row in self._connection.execute(query)]
        return [
            rows.worker(row)
            for part in _batches(sorted(set(roots)))
            for row in self._connection.execute(query.where(workers.c.root_id.in_(part)))
        ]

    def descendants(self, path: str) -> list[Worker]:  # noqa: D102
        query = WORKERS.where(_in_subtree(path), workers.c.path != path)
        return lineage.parents_first(rows.worker(row) for row in self._connection.execute(query))

    def last_birth_us(self, parent_id: str) -> int | None:  # noqa: D102
        row = self._one(LAST_BIRTH, parent_id=parent_id)
        return None if row is None else int(row.create_us)

    def family(self, root_id: str, parent_id: str) -> Family:  # noqa: D102
        live, siblings = self._connection.execute(FAMILY, {"root_id": root_id, "parent_id": parent_id}).one()
        return Family(root_id, int(live), int(siblings) if parent_id else 0)

    def update_states(self, workers: Sequence[Worker]) -> None:  # noqa: D102
        if not workers:
            return
        self._connection.execute(
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

    def end_workers(self, workers: Sequence[Worker]) -> None:  # noqa: D102
        if not workers:
            return
        self._connection.execute(
            END,
            [
                {
                    "key": worker.worker_id,
                    "new_state": _ENDED,
                    "new_last_heartbeat_us": worker.last_heartbeat_us,
                    **_new(rows.usage_values(worker.usage)),
                    **_new(rows.exit_values(worker.exit)),
                }
                for worker in workers
            ],
        )
        for worker in workers:
            self._count(worker, -1)
            self._changed[worker.worker_id] = replace(worker, state=State.ENDED)

    def beat(self, beats: Sequence[Beat]) -> None:  # noqa: D102
        if beats:
            self._connection.execute(
                BEAT,
                [
                    {
                        "key": beat.worker_id,
                        "new_last_heartbeat_us": beat.last_heartbeat_us,
                        **_new(rows.usage_values(beat.usage)),
                    }
                    for beat in beats
                ],
            )

    # Nodes

    def node(self, node_id: str) -> Node | None:  # noqa: D102
        row = self._one(select(nodes).where(nodes.c.node_id == bindparam("node_id")), node_id=node_id)
        return None if row is None else rows.node(row)

    def put_node(self, node: Node) -> None:  # noqa: D102
        values = rows.node_values(node)
        changed = self._connection.execute(
            update(nodes).where(nodes.c.node_id == node.node_id).values(values)
        )
        if not changed.rowcount:
            self._connection.execute(insert(nodes), values)

    def nodes(self) -> list[Node]:  # noqa: D102
        return [rows.node(row) for row in self._connection.execute(select(nodes).order_by(nodes.c.node_id))]

    def touch_nodes(self, acks: Sequence[tuple[str, int]]) -> None:  # noqa: D102
        if acks:
            self._connection.execute(
                NODE_ACK, [{"key": node_id, "ack_us": ack_us} for node_id, ack_us in acks]
            )

    # The outbox

    @property
    def position(self) -> int:  # noqa: D102
        return Queued.position_of(self._boot, self.sequence)

    def record(self, event: Event) -> None:  # noqa: D102
        self.sequence += 1
        self._events.append(Queued(self.position, render.event(event).SerializeToString()))

    def queued(self, after: int, limit: int) -> list[Queued]:  # noqa: D102
        found = self._connection.execute(QUEUED, {"after": after, "limit": limit})
        return [Queued(row.position, row.body) for row in found]

    def delivered(self, position: int) -> None:  # noqa: D102
        self._connection.execute(DELIVERED, {"upto": position})

    # How

    def _one(self, statement: Select[Any], **parameters: object) -> Any:  # noqa: ANN401 -- a row
        return self._connection.execute(statement, parameters).one_or_none()

    def _conditions(self, contract_id: str) -> tuple[StopCondition, ...]:
        # They never change, and may hold megabytes.
        known = self._cache.get(contract_id)
        if known is None:
            found = self._connection.execute(CONDITIONS, {"contract_id": contract_id})
            known = self._cache[contract_id] = tuple(rows.condition(row) for row in found)
        return known

    def _count(self, worker: Worker, active: int) -> None:
        counts = self._population[worker.contract_id]
        counts[0] += active
        counts[2] += 1

    def _write_population(self) -> None:
        # Held back so that a birth, which gives back a reservation and takes a
        # slot, writes its contract's row once.
        for contract_id, (active, reserved, version) in self._population.items():
            self._connection.execute(
                POPULATION, {"key": contract_id, "active": active, "reserved": reserved, "version": version}
            )
        self._population.clear()

    def _return(self, which: ColumnElement[bool]) -> dict[str, int]:
        """Move RESERVED manifests for which *which* holds to RETURNED; count them by contract."""
        chosen = and_(schema.RESERVED, which)
        found = self._connection.execute(
            select(manifests.c.contract_id, func.count()).where(chosen).group_by(manifests.c.contract_id)
        ).all()
        if found:
            self._connection.execute(
                update(manifests).where(chosen).values(status=ManifestStatus.RETURNED.value)
            )
        returned = {contract_id: int(count) for contract_id, count in found}
        for contract_id, count in returned.items():
            self._population[contract_id][1] -= count
        return returned


def _in_subtree(path: str) -> ColumnElement[bool]:
    first, end = lineage.subtree_range(path)
    return and_(workers.c.path >= first, workers.c.path < end)


def _batches(values: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(values), IN_LIMIT):
        yield values[start : start + IN_LIMIT]


def _new(values: rows.Values) -> rows.Values:
    """Name *values* as the bound parameters of an UPDATE, which may not be called as its columns."""
    return {f"new_{name}": value for name, value in values.items()}
