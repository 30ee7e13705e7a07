"""Other controllers on the same database: what they changed is told here as what we did ourselves."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from hayflick_controller.model import State, Worker
from hayflick_rpc.errors import HayflickError

if TYPE_CHECKING:
    from hayflick_controller.pursuit import Pursuit
    from hayflick_controller.roster import Roster
    from hayflick_controller.standing_orders import StandingOrders
    from hayflick_controller.store import Store, Tx
    from hayflick_controller.store.protocol import Notice

RETRY_SECONDS = 0.5

log = logging.getLogger(__name__)


class Peers:
    """See the module. Notices that come while one is being read are read together.

    Args:
        store: Shared with them.
        roster: Follows what is read, and wakes those who wait for a departure.
        pursuit: Gives our own nodes the orders that a change calls for.
        standing: Freezes what is quarantined on our nodes.
    """

    def __init__(self, store: Store, roster: Roster, pursuit: Pursuit, standing: StandingOrders) -> None:
        self._store = store
        self._roster = roster
        self._pursuit = pursuit
        self._standing = standing
        self._workers: set[str] = set()
        self._quarantined = False
        self._all = False
        self._wake = asyncio.Event()
        self._task = asyncio.create_task(self._run(), name="peers")

    def hear(self, notice: Notice | None) -> None:
        """Take a notice; ``None`` when any may have been missed."""
        if notice is None:
            self._all = self._quarantined = True
        else:
            self._workers.update(notice.worker_ids)
            self._quarantined |= bool(notice.quarantine_ids)
        self._wake.set()

    async def close(self) -> None:
        """Stop."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            workers, self._workers = self._workers, set()
            everyone, self._all = self._all, False
            quarantined, self._quarantined = self._quarantined, False
            try:
                await self._read(workers, everyone=everyone)
                if quarantined:
                    self._standing.kick()
            except HayflickError as error:
                log.warning("changes of other controllers wait: %s", error.message)
                self._workers |= workers
                self._all |= everyone
                self._quarantined |= quarantined
                self._wake.set()
                await asyncio.sleep(RETRY_SECONDS)
            except Exception:
                log.exception("changes of other controllers were not followed")

    async def _read(self, worker_ids: set[str], *, everyone: bool) -> None:
        known = self._roster.known() if everyone else ()

        def read(tx: Tx) -> list[Worker]:
            names = worker_ids.union(known)
            if everyone:
                names.update(worker.worker_id for worker in tx.live_workers())
            return tx.heard(names)

        if any(_matters(worker) for worker in await self._store.transact(read)):
            self._pursuit.kick()


def _matters(worker: Worker) -> bool:
    """Return whether one of our nodes may have to end somebody because of *worker*."""
    return worker.state in (State.STOPPING, State.ENDED)
