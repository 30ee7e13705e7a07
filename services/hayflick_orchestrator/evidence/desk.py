"""Captures evidence of each family that is frozen, in the background, and hands it out."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from hayflick.v1.errors_pb2 import ErrorReason
from hayflick.v1.orchestrator_pb2 import FileSummary, GetEvidenceResponse
from hayflick_orchestrator.evidence.budget import Budget, Caps
from hayflick_orchestrator.evidence.capture import capture, subject_of
from hayflick_rpc.errors import HayflickError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from hayflick_orchestrator.evidence.store import Store
    from hayflick_orchestrator.records import Records
    from hayflick_orchestrator.workers import Worker

PIECE_BYTES = 256 * 1024
# Captures that wait for their turn; one more is refused, and the refusal recorded.
MAX_WAITING = 32
# Of a bundle's workers, in its event; the bundle has all.
MAX_NAMED = 100

Json = dict[str, Any]

log = logging.getLogger(__name__)


class EvidenceDesk:
    """Takes evidence and hands it out.

    Args:
        store: Where bundles are kept.
        members: Returns the host pids of the processes at a worker's place.
        records: Told of each bundle.
        node_id: This node.
        caps: Bounds of each bundle.

    Attributes:
        denials_of: Returns what a worker was refused lately, for its bundle;
            ``None`` where nothing keeps that.
    """

    def __init__(
        self,
        store: Store,
        members: Callable[[str], list[int]],
        records: Records,
        *,
        node_id: str,
        caps: Caps | None = None,
    ) -> None:
        self._store = store
        self._members = members
        self._records = records
        self._node_id = node_id
        self._caps = caps or Caps()
        self.denials_of: Callable[[Worker], list[Json]] | None = None
        # One at a time: evidence may wait, the living may not.
        self._turn = asyncio.Lock()
        self._reader = ThreadPoolExecutor(1, "evidence")
        self._captures: dict[asyncio.Task[None], frozenset[str]] = {}

    def frozen(self, family: tuple[Worker, ...]) -> None:
        """Begin a capture of *family*, which has just been frozen; its first is whom the freeze named."""
        if len(self._captures) >= MAX_WAITING:
            self._failed(family[0], f"{MAX_WAITING} captures wait already")
            return
        task = asyncio.create_task(self._capture(family), name=f"evidence of {family[0].worker_id}")
        self._captures[task] = frozenset(member.worker_id for member in family)
        task.add_done_callback(lambda done: self._captured(done, family[0]))

    def _captured(self, task: asyncio.Task[None], first: Worker) -> None:
        self._captures.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("evidence of %s could not be captured", first.worker_id, exc_info=error)
            self._failed(first, f"{type(error).__name__}: {error}")

    def _failed(self, first: Worker, reason: str) -> None:
        self._records.evidence_failed(first.record, {"node_id": self._node_id, "reason": reason[:512]})

    async def _capture(self, family: tuple[Worker, ...]) -> None:
        async with self._turn:
            started, begun = time.monotonic(), datetime.now(UTC)
            budget, first = Budget(self._caps), family[0]
            chosen, rest = family[: self._caps.workers], family[self._caps.workers :]
            budget.omit("workers", len(rest))
            worker_ids = tuple(member.worker_id for member in family)
            subjects = [
                subject_of(worker, budget, None if self.denials_of is None else self.denials_of(worker))
                for worker in chosen
            ]
            summary: Json = {
                "node_id": self._node_id,
                "contract_id": first.contract_id,
                "worker_id": first.worker_id,
                "worker_ids": worker_ids,
                "captured_worker_ids": [worker.worker_id for worker in chosen],
                "begin_time": begun.isoformat(),
                # Who was let go, or ended, before its turn came is shown as it was then.
                "released_before": [one.worker_id for one in chosen if not one.held],
            }
            loop = asyncio.get_running_loop()
            try:
                bundle = await loop.run_in_executor(
                    self._reader, capture, subjects, self._members, summary, budget
                )
            finally:
                for subject in subjects:
                    subject.close()
            await loop.run_in_executor(self._reader, self._store.put, first.worker_id, worker_ids, bundle)
        await self._records.evidence_captured(
            first.record,
            {
                "node_id": self._node_id,
                "sha256": bundle.sha256,
                "size_bytes": len(bundle.data),
                "worker_count": len(family),
                "captured_worker_ids": summary["captured_worker_ids"][:MAX_NAMED],
                "process_count": bundle.summary["process_count"],
                "file_count": bundle.summary["file_count"],
                "left_out": bundle.summary["left_out"],
                "documents_left_out": len(bundle.summary["documents_left_out"]),
                "elapsed_seconds": round(time.monotonic() - started, 6),
            },
        )

    async def get(self, worker_id: str) -> AsyncGenerator[GetEvidenceResponse, None]:
        """Yield the newest bundle that shows a worker, then what it was; waits for one that is being made.

        Raises:
            HayflickError: EVIDENCE_UNKNOWN.
        """
        going = [task for task, shown in self._captures.items() if worker_id in shown]
        if going:
            await asyncio.wait(going)
        descriptor = self._store.open(worker_id)
        if descriptor is None:
            raise HayflickError(
                ErrorReason.ERROR_REASON_EVIDENCE_UNKNOWN,
                f"no evidence of worker {worker_id} is kept on this node",
                metadata={"worker_id": worker_id},
            )
        try:
            digest, count = hashlib.sha256(), 0
            while data := os.read(descriptor, PIECE_BYTES):
                digest.update(data)
                count += len(data)
                yield GetEvidenceResponse(data=data)
            yield GetEvidenceResponse(summary=FileSummary(size_bytes=count, sha256=digest.hexdigest()))
        finally:
            os.close(descriptor)

    async def close(self) -> None:
        """Give up what waits, and see what is being read to its end."""
        for task in self._captures:
            task.cancel()
        await asyncio.gather(*self._captures, return_exceptions=True)
        await asyncio.to_thread(self._reader.shutdown)
        self._store.close()
