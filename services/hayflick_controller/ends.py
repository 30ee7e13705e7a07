"""How workers end: in steps of a transaction, for whoever has a reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hayflick_controller import events, lineage
from hayflick_controller.model import EndReason, Exit, Silence, State, Worker

if TYPE_CHECKING:
    from hayflick_controller.store import Tx

ANCESTOR_ENDED = "ancestor ended"

Freshen = Callable[[Worker], Worker]
"""Adds to a worker's record what was heard since it was written."""


def end(
    tx: Tx,
    ended: Sequence[tuple[Worker, Exit]],
    now_us: int,
    freshen: Freshen,
    silence: Silence | None = None,
) -> list[Worker]:
    """Record that the processes of live workers are gone; return the workers as they ended.

    With *silence* nobody saw that, and it follows from their node's lease.

    Whatever descends from them must end too. It keeps its slot until it is seen
    dead itself, so it only becomes STOPPING here, and is pursued.
    """
    gone = [
        replace(freshen(worker), state=State.ENDED, exit=exit_)
        for worker, exit_ in ended
        if worker.state is not State.ENDED
    ]
    if not gone:
        return []
    tx.end_workers(gone)
    for worker in gone:
        assert worker.exit is not None
        tx.record(events.worker_shutdown(worker, worker.exit, now_us, silence))
    orphans = [
        worker
        for worker in lineage.below(gone, tx.live_families(worker.root_id for worker in gone))
        if worker.state is not State.STOPPING
    ]
    stop(tx, orphans, EndReason.KILLED, ANCESTOR_ENDED)
    return gone


def stop(tx: Tx, workers: Sequence[Worker], reason: EndReason, detail: str) -> list[Worker]:
    """Mark live workers as STOPPING, to be pursued until they are seen dead; return them so.

    The first reason stays, but a kill switch overrides any.
    """
    stopping = [
        replace(worker, state=State.STOPPING, stop_reason=reason, stop_detail=detail)
        for worker in workers
        if worker.live and (worker.stop_reason is None or reason is EndReason.KILL_SWITCH)
    ]
    tx.update_states(stopping)
    return stopping


def reported(worker: Worker, exit_: Exit) -> Exit:
    """Return how a node says that *worker* ended, with our reason where it only carried out our order."""
    if worker.stop_reason is not None and exit_.reason is EndReason.KILLED:
        return replace(exit_, reason=worker.stop_reason, detail=exit_.detail or worker.stop_detail)
    return exit_
