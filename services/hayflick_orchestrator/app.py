"""The running orchestrator: every part made once, joined, served and taken down in order."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import secrets
import signal
from typing import TYPE_CHECKING

from hayflick.v1 import orchestrator_pb2, orchestrator_pb2_grpc
from hayflick.v1.controller_pb2 import Scope
from hayflick.v1.resources_pb2 import DenialClass, EndReason
from hayflick.v1.resources_pb2 import Worker as WorkerMessage
from hayflick_orchestrator.attestation import Attestor
from hayflick_orchestrator.calls import WorkerCalls
from hayflick_orchestrator.census_taker import CensusTaker
from hayflick_orchestrator.controller_client import ControllerClient, Session
from hayflick_orchestrator.controller_link import ControllerLink
from hayflick_orchestrator.egress_client import Egress
from hayflick_orchestrator.evidence.desk import EvidenceDesk
from hayflick_orchestrator.evidence.store import Store
from hayflick_orchestrator.host import Host
from hayflick_orchestrator.launcher import Launcher
from hayflick_orchestrator.lifecycle import Ask
from hayflick_orchestrator.population import Population
from hayflick_orchestrator.predicates import Predicates
from hayflick_orchestrator.records import Records
from hayflick_orchestrator.servicer import OrchestratorServicer
from hayflick_orchestrator.supervisor import Supervisor
from hayflick_orchestrator.transfers import Transfers
from hayflick_orchestrator.tripwires import Tripwires
from hayflick_orchestrator.ways_out import WaysOut
from hayflick_orchestrator.worker_service import WorkerGate
from hayflick_orchestrator.worker_tasks import WorkerTasks
from hayflick_rpc.audit import AuditClient
from hayflick_rpc.channel import connect
from hayflick_rpc.server import serve
from hayflick_rpc.spool import Spool, deliver_leftovers
from hayflick_sandbox.controllers import io_layer

if TYPE_CHECKING:
    from collections.abc import Sequence

    import grpc

    from hayflick_orchestrator.config import Config
    from hayflick_orchestrator.workers import Birth, Worker
    from hayflick_sandbox.cgroups import Tree
    from hayflick_sandbox.identities import UidRange
    from hayflick_sandbox.probe import Layer
    from hayflick_sandbox.zygote_client import Zygote

# After the last worker is dead: how long the controller and the logger may
# take to be told.
FAREWELL_SECONDS = 5.0

log = logging.getLogger(__name__)


class Orchestrator:
    """One node's orchestrator, from start to stop."""

    def __init__(
        self,
        config: Config,
        zygote: Zygote,
        tree: Tree,
        uids: UidRange,
        *,
        layers: Sequence[Layer],
        missing: Sequence[Layer],
        degraded: Sequence[str],
    ) -> None:
        self._config = config
        self._failed = False
        self._channel = connect(config.controller)
        # A name of this boot's own: sequences start again with each.
        source = f"orchestrator/{config.node_id}/{secrets.token_hex(8)}"
        self._outbox = config.data_dir.absolute() / "outbox"
        self._spool = Spool(self._outbox, source)
        self._audit = AuditClient(
            config.logger,
            source,
            keep=self._spool.append,
            reread=self._spool.read,
            on_acknowledged=self._acknowledged,
        )
        self._records = Records(self._audit, lambda: self._spool.fullness)
        self._ways_out = WaysOut(uids.lease if os.geteuid() == 0 else lambda: None)
        self._egress = Egress(self._records, uids.lease if os.geteuid() == 0 else lambda: None)
        attestor = Attestor(zygote.seccomp_sha256)
        self._tripwires = Tripwires(
            self._records,
            config.node_id,
            listening=any(layer.name == "tripwire" and layer.enforced for layer in layers),
        )
        self._host = Host(
            zygote,
            tree,
            uids,
            attestor=attestor,
            missing=missing,
            tripwires=self._tripwires,
            launches_at_once=config.launches_at_once,
            on_zygote_death=self._zygote_died,
        )
        session = Session()
        self._population: Population[Worker, Birth, WorkerMessage] = Population()
        controller = ControllerClient(self._channel, config.node_id, session)
        self._supervisor = Supervisor(
            self._host,
            self._population,
            controller,
            self._records,
            heartbeat_timeout_seconds=config.heartbeat_timeout_seconds,
        )
        self._tripwires.serve(self._supervisor, self._population)
        self._launcher = Launcher(
            self._host,
            self._population,
            self._supervisor,
            controller,
            self._records,
            attestor=attestor,
            degraded=degraded,
            ready_timeout_seconds=config.ready_timeout_seconds,
            open_doors=self._open_doors,
            ways_out=self._ways_out,
        )
        self._link = ControllerLink(
            self._channel,
            node_id=config.node_id,
            address=config.listen,
            public_key=attestor.public_key,
            session=session,
            population=self._population,
            supervisor=self._supervisor,
            tripwires=self._tripwires,
            predicates=Predicates(self._host, ready_timeout_seconds=config.ready_timeout_seconds),
            on_name_taken=self._fail,
            on_renewed=self._host.renew_lease,
        )
        tasks = WorkerTasks(self._supervisor, self._records)
        calls = WorkerCalls(
            self._population,
            self._supervisor,
            self._launcher,
            tasks=tasks,
            controller=controller,
            on_launch=self._link.nudge,
        )
        tasks.dispatch_for = calls.dispatch_for
        self._worker_service = WorkerGate(config.listen, calls)
        self._census = CensusTaker(
            self._host,
            self._population,
            self._records,
            node_id=config.node_id,
            interval_seconds=config.census_seconds,
        )
        self._evidence = EvidenceDesk(
            Store(config.data_dir / "evidence", config.evidence_total_bytes),
            self._host.members,
            self._records,
            node_id=config.node_id,
        )
        self._census.on_drift = lambda worker, _: self._tripwires.count(
            worker, DenialClass.DENIAL_CLASS_CENSUS
        )
        self._evidence.denials_of = self._tripwires.recent
        self._supervisor.quarantines.on_frozen = self._evidence.frozen
        self._servicer = OrchestratorServicer(
            config,
            self._population,
            self._supervisor,
            self._launcher,
            tasks,
            transfers=Transfers(self._supervisor, self._records),
            evidence=self._evidence,
            layers=(*layers, io_layer(tree)),
            public_key=attestor.public_key,
            denials=self._tripwires.counts,
            on_launch=self._link.nudge,
        )
        self._duties: list[asyncio.Task[None]] = []

    async def run(self) -> int:
        """Serve until told to stop; return the process's exit status."""
        # What was imported and joined lives as long as the process: looking for
        # garbage in it, some hundred times a minute under load, only costs.
        gc.collect()
        gc.freeze()
        await self._audit.start()
        self._duties = [
            asyncio.create_task(self._link.run(), name="controller link"),
            asyncio.create_task(self._supervisor.sweep(), name="heartbeat sweep"),
            asyncio.create_task(self._census.run(), name="census"),
        ]
        for duty in self._duties:
            duty.add_done_callback(self._duty_ended)
        self._duties.append(
            asyncio.create_task(deliver_leftovers(self._outbox, self._config.logger), name="leftovers")
        )
        await serve(
            "hayflick_orchestrator",
            self._config.listen,
            self._register,
            on_drain=self._drain,
            on_stop=self._stop,
            lifeline_fd=self._config.lifeline_fd,
            drain_seconds=self._config.drain_seconds,
        )
        return 1 if self._failed else 0

    def _register(self, server: grpc.aio.Server) -> Sequence[str]:
        orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server(self._servicer, server)
        return [orchestrator_pb2.DESCRIPTOR.services_by_name["OrchestratorService"].full_name]

    def _open_doors(self, worker: Worker) -> None:
        """Answer what its sandbox opened; called when it is ready, before anybody hears of it."""
        self._tripwires.adopt(worker)
        opened, network = worker.sandbox.descriptors, worker.record.resources.network
        if (listener := opened.pop("worker_service", None)) is not None:
            if network.allow_controller:
                worker.doors["worker_service"] = self._worker_service.open(worker, listener)
            else:
                os.close(listener)  # the licence was taken while it was being born
        if (way_out := self._ways_out.of(worker.sandbox)) is not None:
            if network.allow_external:
                worker.doors["outside"] = way_out
            else:
                way_out.close()
        if (listener := opened.pop("proxy", None)) is not None:
            if network.allowed_hosts:
                worker.doors["proxy"] = self._egress.open(worker, listener)
            else:
                os.close(listener)

    def _duty_ended(self, duty: asyncio.Task[None]) -> None:
        if not duty.cancelled() and (error := duty.exception()) is not None:
            log.error("%s failed", duty.get_name(), exc_info=error)
            self._fail()

    def _zygote_died(self) -> None:
        log.error("the zygote died: every worker ends, and so does this node")
        self._records.node("node_failed", self._config.node_id, {"reason": "zygote_died"})
        self._fail()

    def _fail(self) -> None:
        """Stop as on SIGTERM, but with a status that says it was not asked for."""
        if not self._failed:
            self._failed = True
            os.kill(os.getpid(), signal.SIGTERM)

    async def _drain(self) -> None:
        """Begin nothing more, and end every worker while the controller still hears us."""
        self._launcher.close()
        if self._host.alive:
            ask = Ask(EndReason.END_REASON_KILLED, "the node is shutting down")
        else:
            ask = Ask(EndReason.END_REASON_NODE_LOST, "the node's zygote died")
        report = await self._supervisor.kill_scope(
            Scope(everything=True), ask, timeout_seconds=FAREWELL_SECONDS
        )
        if report.unconfirmed:
            log.error("not seen dead and recorded in time: %s", ", ".join(report.unconfirmed))

    def _acknowledged(self, sequence: int) -> None:
        self._spool.acknowledged(sequence)
        self._records.tell_lost(self._config.node_id)

    async def _stop(self) -> None:
        self._launcher.close()
        await self._supervisor.close(FAREWELL_SECONDS)
        for duty in self._duties:
            duty.cancel()
        await asyncio.gather(*self._duties, return_exceptions=True)
        await self._worker_service.stop()
        await self._evidence.close()
        await self._egress.stop()
        await self._census.close()
        await self._host.close()
        await self._audit.close(FAREWELL_SECONDS)
        self._spool.close()
        await self._channel.close()
