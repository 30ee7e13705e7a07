"""What the controller promises, said again as plainly as can be. Pure.

It knows nothing of databases, streams or tasks: facts go in with the time, and
out come the refusal that is due, or none, and who must end. The machine asks it
before it asks the controller, and both must agree.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

EVERYTHING = "everything"

STARTING, RUNNING, QUARANTINED, STOPPING, ENDED = "starting", "running", "quarantined", "stopping", "ended"
KILL_SWITCH, KILLED, NODE_LOST, LAUNCH_FAILED = "kill_switch", "killed", "node_lost", "launch_failed"
EXPIRED, HEARTBEAT_TIMEOUT = "expired", "heartbeat_timeout"


@dataclass
class Contract:
    """A policy, and the key that signs under it."""

    contract_id: str
    max_depth: int
    max_replicas: int
    cooldown_us: int
    expiration_us: int | None
    ttl_us: int
    key_id: str


@dataclass
class Manifest:
    """The permission for one birth; ``status`` is reserved, registered or returned."""

    manifest_id: str
    contract_id: str
    worker_id: str
    parent_id: str
    depth: int
    epoch: int
    key_id: str
    issue_us: int
    expire_us: int
    status: str = "reserved"

    def good(self, now_us: int) -> bool:
        """Whether it still reserves a slot."""
        return self.status == "reserved" and now_us < self.expire_us


@dataclass
class Worker:
    """A worker; ``path`` has the names from its root down to itself."""

    worker_id: str
    contract_id: str
    parent_id: str
    path: tuple[str, ...]
    node_id: str
    create_us: int
    expire_us: int | None
    state: str = STARTING
    stop_reason: str = ""
    end_reason: str = ""

    @property
    def live(self) -> bool:
        """Whether it holds a slot."""
        return self.state != ENDED


@dataclass
class Latch:
    """A kill switch."""

    engaged: bool = False
    epoch: int = 0


@dataclass
class Model:
    """Everything that a decision may depend on."""

    contracts: dict[str, Contract] = field(default_factory=dict)
    manifests: dict[str, Manifest] = field(default_factory=dict)
    workers: dict[str, Worker] = field(default_factory=dict)
    latches: dict[str, Latch] = field(default_factory=dict)
    quarantined: set[str] = field(default_factory=set)
    revoked: set[str] = field(default_factory=set)

    # What is asked

    def refuse_issue(self, contract_id: str, parent_id: str, depth: int | None, now_us: int) -> str:
        """Return why a manifest is refused; "" when it is not."""
        refusal = self._refuse_birth(contract_id, parent_id, now_us, None)
        if not refusal and not parent_id and depth:
            return "ROOT_DEPTH_NOT_ZERO"
        return refusal

    def refuse_register(self, manifest: Manifest, now_us: int, *, genuine: bool) -> str:
        """Return why a birth is refused; "" when it is not."""
        if not genuine:
            return "MANIFEST_SIGNATURE_INVALID"
        if manifest.key_id in self.revoked:
            return "KEY_REVOKED"
        if manifest.status == "registered":
            return "MANIFEST_ALREADY_USED"
        if manifest.epoch != self.epoch(manifest.contract_id, manifest.parent_id):
            return "KILL_SWITCH_ENGAGED"
        refusal = self._refuse_birth(manifest.contract_id, manifest.parent_id, now_us, manifest)
        return refusal or ("" if manifest.good(now_us) else "MANIFEST_EXPIRED")

    def _refuse_birth(self, contract_id: str, parent_id: str, now_us: int, own: Manifest | None) -> str:
        contract, parent = self.contracts[contract_id], self.workers.get(parent_id)
        above = parent.path if parent else ()
        if any(self.latch(scope).engaged for scope in self._scopes(contract_id, parent_id)):
            return "KILL_SWITCH_ENGAGED"
        if self.quarantined.intersection(above):
            return "QUARANTINED"
        if self.live(contract_id) + self.reserved(contract_id, now_us, own) >= contract.max_replicas:
            return "REPLICA_QUOTA_EXCEEDED"
        return self._refuse_parent(contract, parent_id, now_us, own) if parent_id else ""

    def _refuse_parent(self, contract: Contract, parent_id: str, now_us: int, own: Manifest | None) -> str:
        parent = self.workers.get(parent_id)
        if (
            parent is None
            or parent.contract_id != contract.contract_id
            or parent.state not in (STARTING, RUNNING, QUARANTINED)
            or (parent.expire_us is not None and parent.expire_us <= now_us)
        ):
            return "PARENT_UNKNOWN"
        births = [
            worker.create_us
            for worker in self.workers.values()
            if worker.parent_id == parent_id and worker.end_reason != LAUNCH_FAILED
        ]
        if own is None:
            births += [
                manifest.issue_us
                for manifest in self.manifests.values()
                if manifest.parent_id == parent_id and manifest.good(now_us)
            ]
        if any(now_us < birth_us + contract.cooldown_us for birth_us in births):
            return "COOLDOWN_NOT_SATISFIED"
        if len(parent.path) > contract.max_depth:
            return "DEPTH_EXCEEDED"
        return ""

    def live(self, contract_id: str) -> int:
        """Count the slots that workers hold."""
        return sum(worker.live and worker.contract_id == contract_id for worker in self.workers.values())

    def reserved(self, contract_id: str, now_us: int, own: Manifest | None = None) -> int:
        """Count the slots that manifests other than *own* hold."""
        return sum(
            manifest.contract_id == contract_id and manifest is not own and manifest.good(now_us)
            for manifest in self.manifests.values()
        )

    def latch(self, scope: str) -> Latch:
        """Return the kill switch over *scope*."""
        return self.latches.get(scope, Latch())

    def epoch(self, contract_id: str, parent_id: str) -> int:
        """Return the sum of the epochs of all kill switches over a birth."""
        return sum(self.latch(scope).epoch for scope in self._scopes(contract_id, parent_id))

    def covered(self, scope: str) -> list[Worker]:
        """Return the live workers in *scope*."""
        kind, _, name = scope.partition("/")
        return [
            worker
            for worker in self.workers.values()
            if worker.live
            and (
                kind == EVERYTHING or worker.contract_id == name or (kind == "worker" and name in worker.path)
            )
        ]

    def _scopes(self, contract_id: str, parent_id: str) -> list[str]:
        parent = self.workers.get(parent_id)
        above = parent.path if parent else ()
        return [EVERYTHING, f"contract/{contract_id}", *(f"worker/{name}" for name in above)]

    # What happens

    def issue(self, contract_id: str, parent_id: str, now_us: int, name: str) -> Manifest:
        """Let a slot be reserved by the manifest called *name*, whose own names are not known yet."""
        contract, parent = self.contracts[contract_id], self.workers.get(parent_id)
        manifest = self.manifests[name] = Manifest(
            name,
            contract_id,
            "",
            parent_id,
            len(parent.path) if parent else 0,
            self.epoch(contract_id, parent_id),
            contract.key_id,
            now_us,
            now_us + contract.ttl_us,
        )
        return manifest

    def register(self, manifest: Manifest, node_id: str, now_us: int) -> Worker:
        """Let a worker be born."""
        parent = self.workers.get(manifest.parent_id)
        expiration_us = self.contracts[manifest.contract_id].expiration_us
        worker = self.workers[manifest.worker_id] = Worker(
            manifest.worker_id,
            manifest.contract_id,
            manifest.parent_id,
            (*(parent.path if parent else ()), manifest.worker_id),
            node_id,
            now_us,
            None if expiration_us is None else now_us + expiration_us,
        )
        manifest.status = "registered"
        return worker

    def turn(self, scope: str, *, engaged: bool) -> None:
        """Engage or release a kill switch; one that is engaged ends all that it covers."""
        latch = self.latches.setdefault(scope, Latch())
        latch.engaged, latch.epoch = engaged, latch.epoch + 1
        if not engaged:
            return
        self.stop(self.covered(scope), KILL_SWITCH)
        kind, _, name = scope.partition("/")
        for manifest in self.manifests.values():
            parent = self.workers.get(manifest.parent_id)
            if manifest.status == "reserved" and (
                kind == EVERYTHING
                or manifest.contract_id == name
                or (kind == "worker" and parent is not None and name in parent.path)
            ):
                manifest.status = "returned"

    def stop(self, workers: Iterable[Worker], reason: str) -> None:
        """Let workers be pursued until they are seen dead; the first reason stays, but for a kill switch."""
        for worker in workers:
            if worker.live and (not worker.stop_reason or reason == KILL_SWITCH):
                worker.state, worker.stop_reason = STOPPING, reason

    def end(self, ended: Iterable[tuple[Worker, str]]) -> None:
        """Let workers be dead, all at the same moment: their descendants must end too."""
        gone = list(ended)
        for worker, reason in gone:
            worker.state, worker.end_reason = ENDED, reason
        names = {worker.worker_id for worker, _ in gone}
        below = [
            other
            for other in self.workers.values()
            if names.intersection(other.path) and other.live and other.state != STOPPING
        ]
        self.stop(below, KILLED)

    def settle(self, obedient: Iterable[str]) -> None:
        """End whoever must end on nodes that carry out orders, and whoever must end after them."""
        nodes = set(obedient)
        while stopping := [
            worker for worker in self.workers.values() if worker.state == STOPPING and worker.node_id in nodes
        ]:
            self.end((worker, worker.stop_reason) for worker in stopping)

    def freeze(self, worker_ids: Iterable[str]) -> None:
        """Let workers be frozen."""
        for worker_id in worker_ids:
            worker = self.workers[worker_id]
            if worker.state in (STARTING, RUNNING):
                worker.state = QUARANTINED
