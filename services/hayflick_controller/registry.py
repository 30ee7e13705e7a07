"""Reading workers: one, many, a family, or as they change."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING

from hayflick.v1 import controller_pb2, resources_pb2
from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_controller import lineage, render
from hayflick_controller.killswitch import require_worker
from hayflick_rpc import wire
from hayflick_rpc.errors import HayflickError

if TYPE_CHECKING:
    from hayflick_controller.model import State
    from hayflick_controller.roster import Roster
    from hayflick_controller.store import Store, Tx
    from hayflick_controller.watch import Broadcast

PAGE = 1_000

_KIND = "workers"


class Registry:
    """See the module. Every answer has the freshest heartbeat and usage, written or not."""

    def __init__(self, store: Store, roster: Roster, broadcast: Broadcast) -> None:
        self._store = store
        self._roster = roster
        self._broadcast = broadcast

    async def get(self, worker_id: str) -> resources_pb2.Worker:
        """Return one worker, with its state snapshot and every check of its sandbox.

        Raises:
            HayflickError: WORKER_UNKNOWN.
        """

        def read(tx: Tx) -> resources_pb2.Worker:
            worker = tx.worker(worker_id, with_snapshot=True)
            if worker is None:
                raise HayflickError(
                    ErrorReason.ERROR_REASON_WORKER_UNKNOWN,
                    f"worker_id: there is no worker {worker_id}",
                    metadata={"worker_id": worker_id, "field": "worker_id"},
                )
            found = render.worker(self._roster.freshen(worker), with_snapshot=True)
            if worker.attestation:
                found.attestation.ParseFromString(tx.attestation(worker_id))
            return found

        return await self._store.transact(read)

    async def page(
        self, contract_id: str, states: Sequence[State], page_size: int, page_token: str
    ) -> controller_pb2.ListWorkersResponse:
        """Return a page of workers, oldest first, without their state snapshots.

        Raises:
            HayflickError: INVALID_FIELD; PAGE_TOKEN_INVALID.
        """
        limit = wire.page_size(page_size)
        mark = wire.fingerprint(_KIND, contract_id, *states)
        position = wire.decode_page_token(page_token, mark)
        after = None if position is None else (int(position[0]), str(position[1]))

        def read(tx: Tx) -> controller_pb2.ListWorkersResponse:
            found = tx.workers(after=after, limit=limit + 1, contract_id=contract_id, states=states)
            page = controller_pb2.ListWorkersResponse(
                workers=[render.worker(self._roster.freshen(worker)) for worker in found[:limit]]
            )
            if len(found) > limit:
                last = found[limit - 1]
                page.next_page_token = wire.encode_page_token(mark, last.create_us, last.worker_id)
            return page

        return await self._store.transact(read)

    async def family(self, worker_id: str) -> controller_pb2.GetLineageResponse:
        """Return a worker with its ancestors and descendants, without their state snapshots.

        Raises:
            HayflickError: WORKER_UNKNOWN.
        """

        def read(tx: Tx) -> controller_pb2.GetLineageResponse:
            worker = require_worker(tx, worker_id)
            above = [tx.worker(ancestor) for ancestor in lineage.ancestors(worker.path)]
            return controller_pb2.GetLineageResponse(
                ancestors=[
                    render.worker(self._roster.freshen(ancestor))
                    for ancestor in above
                    if ancestor is not None
                ],
                worker=render.worker(self._roster.freshen(worker)),
                descendants=[
                    render.worker(self._roster.freshen(descendant))
                    for descendant in tx.descendants(worker.path)
                ],
            )

        return await self._store.transact(read)

    async def watch(self, contract_id: str) -> AsyncGenerator[resources_pb2.Worker]:
        """Yield the live workers, then each worker that changes.

        A change during the first part may be told twice, but none is missed.

        Raises:
            HayflickError: SERVICE_UNAVAILABLE when the watcher is too slow.
        """
        watch = self._broadcast.join(contract_id)  # before reading, so that no change is missed
        try:
            living = await self._store.transact(lambda tx: tx.live_workers(contract_id=contract_id))
            for worker in lineage.parents_first(living):
                yield render.worker(self._roster.freshen(worker))
            async with contextlib.aclosing(watch.changes()) as changes:
                async for worker in changes:
                    yield render.worker(self._roster.freshen(worker))
        finally:
            self._broadcast.leave(watch)
