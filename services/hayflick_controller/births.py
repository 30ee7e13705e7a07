"""Births, each in two decisions: a manifest is issued, and a worker is registered by it."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import TYPE_CHECKING

from hayflick.v1 import controller_pb2
from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_controller import clock, events, nodes, predicates, registrations, render, render_terms, wishes
from hayflick_controller.decisions import Decisions, Form, Request
from hayflick_controller.model import Manifest, ManifestStatus, State, Worker
from hayflick_controller.registrations import NeedsVerdicts, Registered, Registration
from hayflick_controller.store.protocol import Needs
from hayflick_rpc.errors import HayflickError

if TYPE_CHECKING:
    from hayflick_controller.store import Tx
    from hayflick_controller.wishes import Wish

MAX_EVALUATIONS = 5
"""How often predicates are asked anew because the population changed meanwhile."""


class Births:
    """See the module.

    Args:
        decisions: Takes them.
        nodes_: Evaluate predicates.
        clock_: The time.
    """

    def __init__(self, decisions: Decisions, nodes_: nodes.Nodes, clock_: clock.Clock) -> None:
        self._decisions = decisions
        self._nodes = nodes_
        self._clock = clock_
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def issue(self, request: Request, wish: Wish) -> controller_pb2.IssueManifestResponse:
        """Reserve a slot and sign a manifest for it.

        Raises:
            HayflickError: The denial; CONTRACT_UNKNOWN; INVALID_FIELD when a
                root has no resources.
        """

        def restore(
            tx: Tx, kept: controller_pb2.IssueManifestResponse
        ) -> controller_pb2.IssueManifestResponse:
            if found := tx.manifest(kept.manifest.manifest_id, with_snapshot=True):
                kept.manifest.state_snapshot_json = found[0].state_snapshot_json
            return kept

        form = Form[Manifest, controller_pb2.IssueManifestResponse](
            controller_pb2.IssueManifestResponse,
            lambda manifest: controller_pb2.IssueManifestResponse(manifest=render.manifest(manifest)),
            strip=lambda answer: answer.manifest.ClearField("state_snapshot_json"),
            restore=restore,
        )
        return await self._decisions.take(
            request,
            lambda tx: wishes.decide(tx, wish, self._clock()),
            form,
            undo=self._take_back_manifest,
            needs=Needs(contract_id=wish.contract_id, parent_id=wish.parent_id),
        )

    async def register(
        self, request: Request, registration: Registration
    ) -> controller_pb2.RegisterWorkerResponse:
        """Commit the birth that a manifest allows.

        Raises:
            HayflickError: The denial; NODE_SESSION_INVALID; WORKER_NOT_RUNNING
                when it was committed before and must not run any more.
        """
        try:
            return await self._register(request, registration, None)
        except NeedsVerdicts:
            # One after the other per contract: each sees the population that
            # the one before left, and the verdicts seldom go stale.
            async with self._locks[registration.manifest.contract_id]:
                return await self._register_with_verdicts(request, registration)

    async def _register_with_verdicts(
        self, request: Request, registration: Registration
    ) -> controller_pb2.RegisterWorkerResponse:
        verdicts: predicates.Verdicts | None = None
        for _ in range(MAX_EVALUATIONS + 1):
            try:
                return await self._register(request, registration, verdicts)
            except NeedsVerdicts as needed:
                verdicts = await predicates.ask(
                    self._nodes.connected(),
                    registration.node_id,
                    needed.stop_conditions,
                    needed.context,
                    needed.version,
                )
        raise HayflickError(
            ErrorReason.ERROR_REASON_STOP_CONDITION_TRIGGERED,
            "the population changed faster than its stop conditions could be evaluated",
            metadata={"condition": "", "cause": "timeout"},
            retry_after_seconds=1.0,
        )

    async def _register(
        self, request: Request, registration: Registration, verdicts: predicates.Verdicts | None
    ) -> controller_pb2.RegisterWorkerResponse:
        def restore(
            tx: Tx, kept: controller_pb2.RegisterWorkerResponse
        ) -> controller_pb2.RegisterWorkerResponse:
            # The node would act on the answer: it must still be who asked, and the
            # worker may have been ended since.
            nodes.require_session(tx, registration.node_id, registration.session)
            _require_wanted(tx.worker(kept.worker.worker_id), kept.worker.worker_id)
            manifest = kept.worker.manifest
            if found := tx.manifest(manifest.manifest_id, with_snapshot=True):
                manifest.state_snapshot_json = found[0].state_snapshot_json
            return kept

        form = Form[Registered, controller_pb2.RegisterWorkerResponse](
            controller_pb2.RegisterWorkerResponse,
            _registered,
            strip=lambda answer: answer.worker.manifest.ClearField("state_snapshot_json"),
            restore=restore,
        )
        return await self._decisions.take(
            request,
            lambda tx: registrations.decide(tx, registration, verdicts, self._clock()),
            form,
            undo=self._take_back_worker,
            needs=Needs(
                contract_id=registration.manifest.contract_id,
                parent_id=registration.manifest.parent_id,
                manifest_id=registration.manifest.manifest_id,
                key_id=registration.manifest.key_id,
                node_id=registration.node_id,
            ),
        )

    def _take_back_manifest(self, tx: Tx, manifest: Manifest) -> None:
        tx.settle(manifest.manifest_id, ManifestStatus.RETURNED)
        tx.record(events.undone("replication", manifest, self._clock()))

    def _take_back_worker(self, tx: Tx, born: Registered) -> None:
        worker = born.worker
        found = tx.worker(worker.worker_id)
        if found is None or found.state is not State.STARTING:
            return  # something else is ending it already, and records that
        tx.remove_worker(worker)
        # The manifest is good again: nothing was born of it.
        tx.settle(worker.manifest.manifest_id, ManifestStatus.RESERVED)
        tx.record(events.undone("registration", worker.manifest, self._clock()))


def _require_wanted(worker: Worker | None, worker_id: str) -> None:
    if worker is not None and worker.live and worker.state is not State.STOPPING:
        return
    reason = None if worker is None else worker.exit.reason if worker.exit else worker.stop_reason
    raise HayflickError(
        ErrorReason.ERROR_REASON_WORKER_NOT_RUNNING,
        f"worker {worker_id} was registered by this request before, and has ended or must end",
        metadata={
            "worker_id": worker_id,
            "state": worker.state.value if worker else State.ENDED.value,
            "end_reason": reason.value if reason else "",
        },
    )


def _registered(born: Registered) -> controller_pb2.RegisterWorkerResponse:
    return controller_pb2.RegisterWorkerResponse(
        worker=render.worker(born.worker, with_snapshot=True),
        terms=render_terms.contract_terms(born.policy, born.worker.depth),
    )
