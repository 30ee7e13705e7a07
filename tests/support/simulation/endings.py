"""Rules about ends: reports, kill switches, quarantines, silence."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from hayflick.v1 import controller_pb2 as pb
from hayflick.v1 import resources_pb2
from hayflick_rpc import wire
from simulation import model as expected
from simulation.machine import SECOND_US, Fate, MachineBase, fates, pick, picks
from simulation.model import Worker

REASONS = ("completed", "task_error", "killed", "launch_failed", "oom_killed")


class Endings(MachineBase):
    """See the module."""

    @precondition(lambda self: self.model.workers)
    @rule(worker=picks, reason=st.sampled_from(REASONS), fate=fates)
    def report_end(self, worker: int, reason: str, fate: Fate | None) -> None:
        """Let a node say that a worker is dead, also of one that the record has as ended."""
        it = self._worker(worker)
        node = self.world.nodes[it.node_id]
        if node.connected:
            node.lose(it.worker_id)
        request = pb.DeregisterWorkerRequest(
            request_id=self.world.request_id(),
            worker_id=it.worker_id,
            node_id=it.node_id,
            session=node.session,
            exit=resources_pb2.Exit(reason=resources_pb2.EndReason.Value(f"END_REASON_{reason.upper()}")),
        )

        def apply(answer: pb.DeregisterWorkerResponse | None) -> None:
            if it.live:
                self.model.end([(it, it.stop_reason if it.stop_reason and reason == "killed" else reason)])
            if answer is not None:
                self.require_recorded(event="worker_shutdown", worker_id=it.worker_id)

        refusal = "" if node.connected else "NODE_SESSION_INVALID"
        self.ask(request, refusal, apply, fate=fate, acts=not refusal, blank=not it.live)

    @precondition(lambda self: self.model.contracts)
    @rule(
        kind=st.sampled_from(["worker", "worker", "worker", "contract", "contract", "everything"]),
        subject=picks,
        timeout_seconds=st.sampled_from([1, 3]),
        brief=st.booleans(),
        fate=fates,
    )
    def kill(self, kind: str, subject: int, timeout_seconds: int, brief: bool, fate: Fate | None) -> None:
        """Engage a kill switch: all that it covers ends, and what is said to be dead is."""
        scope = self._scope(kind, subject)
        targets = {it.worker_id for it in self.model.covered(scope)}
        nodes = {it.node_id for it in self.world.nodes.values() if it.connected}
        obedient = self.obedient()
        request = pb.EngageKillSwitchRequest(
            request_id=self.world.request_id(),
            scope=_wire_scope(scope),
            reason="it is time",
            timeout=wire.duration(timeout_seconds),
        )
        due = {name for name in targets if self.model.workers[name].node_id in obedient}
        alone = fate is None or not self.up

        def apply(answer: pb.EngageKillSwitchResponse | None) -> None:
            self.model.turn(scope, engaged=True)
            epoch = self.model.latch(scope).epoch
            self._turned("kill_switch_engaged", scope, epoch)
            if answer is None:
                return
            self.compare()
            dead = set(answer.worker_ids)
            assert answer.kill_switch.engaged
            assert all(not self.model.workers[name].live for name in dead), "killed was said of the living"
            assert not any(dead & node.running.keys() for node in self.world.nodes.values())
            if alone:
                assert answer.kill_switch.epoch == epoch
                assert dead | set(answer.unconfirmed_worker_ids) == targets
                assert due <= dead, f"{due - dead} died and are not said to have"
                assert {it.node_id for it in answer.nodes} == nodes

        self.ask(request, "", apply, fate=fate, acts=True, silent=True)
        if brief:
            self._release(scope, None)

    @precondition(lambda self: self._engaged())
    @rule(subject=picks, kind=st.sampled_from(["engaged", "engaged", "worker", "contract"]), fate=fates)
    def release(self, subject: int, kind: str, fate: Fate | None) -> None:
        """Release a kill switch, engaged or not: a new epoch begins."""
        engaged = self._engaged()
        self._release(pick(engaged, subject) if kind == "engaged" else self._scope(kind, subject), fate)

    def _engaged(self) -> list[str]:
        return [scope for scope, it in self.model.latches.items() if it.engaged and not _frozen(scope)]

    def _release(self, scope: str, fate: Fate | None) -> None:
        request = pb.ReleaseKillSwitchRequest(
            request_id=self.world.request_id(), scope=_wire_scope(scope), reason="all clear"
        )

        def apply(answer: pb.ReleaseKillSwitchResponse) -> None:
            self.model.turn(scope, engaged=False)
            self._turned("kill_switch_released", scope, self.model.latch(scope).epoch)
            assert answer.kill_switch.epoch == self.model.latch(scope).epoch
            self.require_recorded(decision="kill_switch_released", scope=scope)

        if self.ask(request, "", apply, fate=fate) is None:
            self._follow_undoing(scope, "kill_switch_released", "kill_switch_engaged")

    @precondition(lambda self: self.model.workers)
    @rule(worker=picks, fate=fates)
    def quarantine(self, worker: int, fate: Fate | None) -> None:
        """Freeze a worker with its descendants, and forbid births below it."""
        it = self._worker(worker)
        scope = f"quarantine/{it.worker_id}"
        family = [other for other in self.model.workers.values() if it.worker_id in other.path and other.live]
        frozen = self._reached(it, family)
        request = pb.QuarantineWorkerRequest(
            request_id=self.world.request_id(), worker_id=it.worker_id, reason="odd"
        )
        refusal = ""
        if not it.live:
            refusal = "WORKER_NOT_RUNNING"
        elif not frozen:
            refusal = "SERVICE_UNAVAILABLE"

        def apply(answer: pb.QuarantineWorkerResponse | None) -> None:
            self.model.quarantined.add(it.worker_id)
            latch = self.model.latches.setdefault(scope, expected.Latch())
            latch.engaged, latch.epoch = True, latch.epoch + 1
            self._turned("quarantined", scope, latch.epoch)
            if answer is not None:
                self.model.freeze(answer.worker_ids)
                assert fate is not None or set(answer.worker_ids) == frozen

        self._ask_quarantine(request, refusal, apply, fate, acts=it.live)

    @precondition(lambda self: self.model.quarantined)
    @rule(worker=picks, fate=fates)
    def clear(self, worker: int, fate: Fate | None) -> None:
        """Thaw a worker with its descendants, but for those that another quarantine holds."""
        it = self.model.workers[pick(sorted(self.model.quarantined), worker)]
        scope = f"quarantine/{it.worker_id}"
        family = [other for other in self.model.workers.values() if it.worker_id in other.path and other.live]
        reached = self._reached(it, family)
        request = pb.ReleaseQuarantineRequest(
            request_id=self.world.request_id(), worker_id=it.worker_id, reason="explained"
        )

        def apply(answer: pb.ReleaseQuarantineResponse | None) -> None:
            self.model.quarantined.discard(it.worker_id)
            latch = self.model.latches[scope]
            latch.engaged, latch.epoch = False, latch.epoch + 1
            self._turned("quarantine_released", scope, latch.epoch)
            if answer is None:
                return
            self.require_recorded(decision="quarantine_released", scope=scope)
            seen = self.world.workers()
            for name in answer.worker_ids:
                worker = self.model.workers[name]
                if worker.state == expected.QUARANTINED and not self.model.quarantined.intersection(
                    worker.path
                ):
                    # Running, if a beat of it is on record.
                    state = resources_pb2.State.Name(seen[name].state).removeprefix("STATE_").lower()
                    assert state in (expected.STARTING, expected.RUNNING)
                    worker.state = state

        if not self.up:
            self.ask(request, "AUDIT_UNAVAILABLE", apply)
            self._follow_undoing(scope, "quarantine_released", "quarantined")
            return
        refusal = "SERVICE_UNAVAILABLE" if family and not reached and not self._told(family) else ""
        self._ask_quarantine(request, refusal, apply, fate, acts=True)

    @rule(contract=st.none() | picks, timeout_seconds=st.sampled_from([3, 10]))
    def reap(self, contract: int | None, timeout_seconds: int) -> None:
        """End those who were not heard of; the frozen cannot be heard, and are spared."""
        contracts = list(self.model.contracts)
        contract_id = "" if contract is None or not contracts else pick(contracts, contract)
        now_us = self.now_us
        stale = [
            worker
            for worker in map(
                self.model.workers.__getitem__, self._silent(now_us - timeout_seconds * SECOND_US)
            )
            if worker.live
            and worker.state != expected.QUARANTINED
            and contract_id in ("", worker.contract_id)
        ]
        request = pb.ReapStaleWorkersRequest(
            request_id=self.world.request_id(),
            contract_id=contract_id,
            timeout=wire.duration(timeout_seconds),
        )

        def apply(answer: pb.ReapStaleWorkersResponse | None) -> None:
            self.model.stop(stale, expected.HEARTBEAT_TIMEOUT)
            self.compare()
            if answer is not None:
                dead = {worker.worker_id for worker in stale if not worker.live}
                assert set(answer.worker_ids) == dead

        if self.ask(request, "", apply, acts=True, blank=not stale) is not None and self.up:
            self.answers.pop()  # repeated, it says who has died since

    def _worker(self, number: int) -> Worker:
        return pick(list(self.model.workers.values()), number)

    def _scope(self, kind: str, number: int) -> str:
        if kind == "worker" and self.model.workers:
            return f"worker/{self._worker(number).worker_id}"
        if kind == "everything":
            return expected.EVERYTHING
        return f"contract/{pick(list(self.model.contracts), number)}"

    def _turned(self, word: str, scope: str, epoch: int) -> None:
        self.turns[word, scope, epoch] += 1

    def _silent(self, before_us: int) -> list[str]:
        """Return the workers whose last beat, as the controller has it, lies before *before_us*."""
        return [
            name
            for name, it in self.world.workers().items()
            if it.last_heartbeat_time.ToMicroseconds() < before_us
        ]

    def _told(self, family: list[Worker]) -> bool:
        """Return whether a node that carries out orders runs one of *family*, by the record."""
        return not {it.node_id for it in family}.isdisjoint(self.obedient())

    def _reached(self, top: Worker, family: list[Worker]) -> set[str]:
        """Return who of *family* runs where a freeze of *top* would be carried out."""
        nodes = {it.node_id for it in family}.intersection(self.obedient())
        return {
            name
            for node_id in nodes
            for name, it in self.world.nodes[node_id].running.items()
            if top.worker_id in it.path
        }

    def _ask_quarantine(self, request, refusal, apply, fate, *, acts: bool) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
        # A call that hangs up or dies leaves the latch, and it is asked again.
        if refusal == "SERVICE_UNAVAILABLE":
            fate = None
        self.ask(request, refusal, apply, fate=fate, acts=acts, silent=True)

    def _follow_undoing(self, scope: str, word: str, back: str) -> None:
        """Follow what became of a release that could not be recorded: nothing, or it was taken back."""
        latch = self.model.latches.setdefault(scope, expected.Latch())
        engaged, epoch = self.read_latch(scope)
        if (engaged, epoch) == (latch.engaged, latch.epoch):
            return
        assert not self.up, "a release was undone"
        assert (engaged, epoch) == (True, latch.epoch + 2), "a release was half undone"
        self._turned(word, scope, epoch - 1)
        self._turned(back, scope, epoch)
        if not _frozen(scope):
            self.model.turn(scope, engaged=False)
            self.model.turn(scope, engaged=True)  # also over whoever was born since
            return
        latch.engaged, latch.epoch = engaged, epoch
        self.model.quarantined.add(scope.partition("/")[2])


def _frozen(scope: str) -> bool:
    return scope.startswith("quarantine/")


def _wire_scope(scope: str) -> pb.Scope:
    kind, _, name = scope.partition("/")
    match kind:
        case "worker":
            return pb.Scope(worker_id=name)
        case "contract":
            return pb.Scope(contract_id=name)
        case _:
            return pb.Scope(everything=True)
