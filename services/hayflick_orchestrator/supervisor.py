"""Watches the workers of this node and ends them: on order, on time, or when they break a rule.

Every end takes the same way, however it began::

    asked ──► killed (one write for a whole family) ──► dead ──► judged
          ──► descendants gone ──► cleared away ──► deregistered ──► ended

so nothing that waits for an end needs to know who began it.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from hayflick.v1.controller_pb2 import Scope, WorkerBeat
from hayflick.v1.resources_pb2 import EndReason, State
from hayflick.v1.resources_pb2 import Worker as WorkerMessage
from hayflick_orchestrator.exits import WorkerFacts, judge_worker, overrules
from hayflick_orchestrator.lifecycle import (
    Action,
    Ask,
    Died,
    EndAsked,
    Event,
    Finished,
    GraceOver,
    Ready,
    step,
)
from hayflick_orchestrator.population import Population, tops
from hayflick_orchestrator.predicates import CGROUP
from hayflick_orchestrator.quarantines import Quarantines
from hayflick_orchestrator.reports import Report
from hayflick_orchestrator.workers import (
    NOTHING_READ,
    Birth,
    Worker,
    exit_message,
    final_usage,
    usage_message,
)
from hayflick_rpc.clock import boot_seconds

if TYPE_CHECKING:
    from collections.abc import Collection, Coroutine, Iterable

    from hayflick_orchestrator.controller_client import ControllerClient
    from hayflick_orchestrator.host import Host
    from hayflick_orchestrator.records import Records

SWEEP_SECONDS = 1.0
# Reading what a worker uses takes five small files; a beat reads this many
# workers at most, those longest unread first.
METERED_AT_ONCE = 100
METER_SECONDS = 1.0
# Each is some kilobytes, and a beat is one message.
ATTESTATIONS_AT_ONCE = 200
METRICS_SECONDS = 10.0
HEARTBEAT_EVENT_SECONDS = 10.0
# How long, for each worker that died of one order, clearing up waits for the record
# of its end: a controller needs about half of it.
CLEAR_AFTER_SECONDS = 0.001
# Below the time after which a controller gives the order again.
KILL_TIMEOUT_SECONDS = 8.0

# Reasons that are about a whole family; otherwise a descendant is killed
# because its ancestor ended.
_INHERITED = frozenset(
    {
        EndReason.END_REASON_KILL_SWITCH,
        EndReason.END_REASON_LEASE_LOST,
        EndReason.END_REASON_NODE_LOST,
    }
)
_ANCESTOR_ENDED = Ask(EndReason.END_REASON_KILLED, "ancestor ended")
_LEASE_OVER = Ask(EndReason.END_REASON_LEASE_LOST, "the controller was silent for the whole lease")
# How long after the last death the kernel may take to say that a control group is empty.
EMPTY_SECONDS = 1.0

Everyone = Population[Worker, Birth, WorkerMessage]

log = logging.getLogger(__name__)


class Supervisor:
    """The one part that ends workers, and knows who freezes and thaws them.

    Attributes:
        quarantines: Freezes and thaws.
    """

    def __init__(
        self,
        host: Host,
        population: Everyone,
        controller: ControllerClient,
        records: Records,
        *,
        heartbeat_timeout_seconds: float,
    ) -> None:
        self._host = host
        self._population = population
        self._controller = controller
        self._records = records
        self._heartbeat_timeout_seconds = heartbeat_timeout_seconds
        self._background: set[asyncio.Task[Any]] = set()
        self.quarantines = Quarantines(host, population, self._apply)
        self._mass_kills = 0  # orders whose dead are not cleared away yet
        self._calm = asyncio.Event()
        self._calm.set()

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run *work* on its own; its failure is logged."""
        task = asyncio.create_task(work, name=name)
        self._background.add(task)
        task.add_done_callback(self._spawned)
        return task

    def _spawned(self, task: asyncio.Task[Any]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s failed", task.get_name(), exc_info=error)

    async def close(self, wait_seconds: float) -> None:
        """Wait for what is in progress, then give it up."""
        if self._background:
            await asyncio.wait(self._background, timeout=wait_seconds)
        for task in tuple(self._background):
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)

    # Birth

    def adopt(self, worker: Worker) -> None:
        """Watch *worker*, whose sandbox is ready, until nothing of it is left."""
        self._population.add(worker)
        self._apply(worker, Ready())
        sandbox = worker.sandbox
        sandbox.on_violation = lambda text: self.ask_end(
            worker, Ask(EndReason.END_REASON_PROTOCOL_VIOLATION, text)
        )
        sandbox.on_task_exited = lambda: self.check_memory(worker)
        if worker.expire_boot is not None:
            left = worker.expire_boot - boot_seconds()
            handle = asyncio.get_running_loop().call_later(max(left, 0.0), self._expire, worker)
            worker.cancel_expiry = handle.cancel
        self.spawn(self._attend(worker), f"worker {worker.worker_id}")

    def _expire(self, worker: Worker) -> None:
        self.ask_end(worker, Ask(EndReason.END_REASON_EXPIRED, "its life by contract is over"))

    # Asking for ends

    def ask_end(self, worker: Worker, ask: Ask, grace_seconds: float = 0.0) -> None:
        """Begin the end of *worker* and all its descendants; ``worker.ended`` tells when it came."""
        inherited = ask if ask.reason in _INHERITED else _ANCESTOR_ENDED
        family = self._population.family(worker.worker_id)
        for birth in self._population.births:
            if birth.parent_id in {member.worker_id for member in family}:
                birth.ask = birth.ask or inherited
        actions = {
            member.worker_id: self._apply(
                member, EndAsked(ask if member is worker else inherited, grace=grace_seconds > 0)
            )
            for member in family
        }
        self._kill(member for member in family if Action.KILL in actions[member.worker_id])
        if Action.TERMINATE_TASKS in actions.get(worker.worker_id, ()):
            self.spawn(self._grace(worker, grace_seconds), f"grace of {worker.worker_id}")

    async def end(self, worker: Worker, ask: Ask, grace_seconds: float = 0.0) -> WorkerMessage:
        """End *worker* and its descendants; return it when nothing is left and the controller knows."""
        self.ask_end(worker, ask, grace_seconds)
        return await asyncio.shield(worker.ended)

    def _kill(self, workers: Iterable[Worker]) -> None:
        for top in tops(workers):
            self.spawn(self._host.kill(top.cgroup_path), f"kill of {top.worker_id}")

    async def _grace(self, worker: Worker, grace_seconds: float) -> None:
        family = self._population.family(worker.worker_id)
        await _quiet(family, grace_seconds)
        self._kill([member for member in family if Action.KILL in self._apply(member, GraceOver())])

    async def kill_scope(
        self,
        scope: Scope,
        ask: Ask,
        *,
        also: Iterable[str] = (),
        ordered: bool = False,
        grace_seconds: float = 0.0,
        timeout_seconds: float = KILL_TIMEOUT_SECONDS,
    ) -> Report:
        """End everybody in *scope*, the ones being born included.

        Answers when all are seen dead, or when the time is over. What they leave is
        cleared away afterwards, once the answer had its time to be recorded; nobody
        waits for that.

        Args:
            scope: Whom.
            ask: Why.
            also: Workers that the controller counts to the scope; of one that
                this node does not have, it is certain that it does not run.
            ordered: Whether the controller ordered it, and so hears of the ends
                by the report rather than by a call for each.
            grace_seconds: How long tasks may go on after SIGTERM; births end at once.
            timeout_seconds: How long to wait after that.
        """
        named = set(also)
        workers, births = self._population.in_scope(scope, named)
        if grace_seconds > 0:
            for birth in births:
                birth.ask = birth.ask or ask
            for worker in workers:
                self._apply(worker, EndAsked(ask, grace=True))
            await _quiet(workers, grace_seconds)
            workers, births = self._population.in_scope(scope, named)
        started = time.monotonic()
        for worker in workers:
            self._apply(worker, EndAsked(ask))
            worker.told_by_result = ordered and not worker.verdict.done()
        for birth in births:
            birth.ask = birth.ask or ask
        paths = self._paths(scope, workers, births)
        evaluations = []
        if scope.WhichOneof("scope") in ("everything", "contract_id"):
            # Predicates are a contract's code too. Whose, is not known here; one of
            # another contract that dies with them denies its birth, and no more.
            evaluations = [one for one in self._host.sandboxes if one.cgroup_path.startswith(f"{CGROUP}/")]
            paths |= {CGROUP} if evaluations else set()
        deadline = started + timeout_seconds
        # Clearing up after the first would only delay seeing the last one dead.
        self._mass_kills += 1
        self._calm.clear()
        try:
            await asyncio.gather(*(self._host.kill(path) for path in paths))
            await _all([worker.verdict for worker in workers], deadline)
            await _all([evaluation.dead for evaluation in evaluations], deadline)
        finally:
            asyncio.get_running_loop().call_later(CLEAR_AFTER_SECONDS * len(workers), self._calm_down)
        await _all([birth.settled for birth in births], deadline)
        seen_at = [
            worker.sandbox.dead.result().seen_at_monotonic for worker in workers if worker.verdict.done()
        ]
        elapsed = max([*seen_at, started]) - started
        unpopulated = await self._host.unpopulated(paths, min(deadline, time.monotonic() + EMPTY_SECONDS))
        dead = {worker.worker_id for worker in workers if worker.verdict.done()}
        dead |= {birth.worker_id for birth in births if birth.settled.done() and birth.registered}
        pending = {worker.worker_id for worker in workers} - dead
        pending |= {birth.worker_id for birth in births if not birth.settled.done()}
        for worker in workers:
            # One that is not dead yet is told of by itself, when it is.
            worker.told_by_result = worker.told_by_result and worker.verdict.done()
        told = tuple(worker for worker in workers if worker.told_by_result)
        confirmed = tuple(sorted(dead | (named - pending)))
        return Report(confirmed, tuple(sorted(pending)), elapsed, told, unpopulated and not pending)

    def _calm_down(self) -> None:
        self._mass_kills -= 1
        if not self._mass_kills:
            self._calm.set()

    def _paths(self, scope: Scope, workers: tuple[Worker, ...], births: tuple[Birth, ...]) -> set[str]:
        """Return the fewest control groups that hold everybody in the scope."""
        match scope.WhichOneof("scope"):
            case "everything":
                return {w.contract_id for w in workers} | {birth.contract_id for birth in births}
            case "contract_id":
                others = [worker for worker in workers if worker.contract_id != scope.contract_id]
                return {scope.contract_id, *(top.cgroup_path for top in tops(others))}
            case _:
                paths = {top.cgroup_path for top in tops(workers)}
                return paths | {birth.cgroup_path for birth in births if birth.cgroup_path}

    def tell(self, worker_ids: Iterable[str]) -> None:
        """Deregister the dead whose end no result could tell the controller."""
        for worker_id in worker_ids:
            worker = self._population.get(worker_id)
            if worker is not None:
                worker.told_by_result = False  # it is being cleared away, and then told of
            elif (ended := self._population.remembered(worker_id)) is not None:
                self.spawn(
                    self._controller.deregister(worker_id, ended.exit, ended.usage), f"tell of {worker_id}"
                )

    async def lapse(self) -> Report:
        """Freeze and end everybody: the controller was silent for the whole lease."""
        log.error("no word from the controller for the whole lease: every worker ends")
        for contract_id in {member.contract_id for member in self._population}:
            self._host.hold(contract_id)
        return await self.kill_scope(
            Scope(everything=True),
            _LEASE_OVER,
            timeout_seconds=0.5,
        )

    # Freezing

    async def freeze(self, worker_id: str) -> Report:
        """Quarantine a worker and its descendants; see :meth:`Quarantines.freeze`."""
        return await self.quarantines.freeze(worker_id)

    def thaw(self, worker_id: str) -> Report:
        """Release a worker and its descendants; see :meth:`Quarantines.thaw`."""
        return self.quarantines.thaw(worker_id)

    # Watching

    def check_memory(self, worker: Worker) -> int:
        """Return how many processes of *worker* the kernel killed for memory; end it if any."""
        kills = 0 if worker.ended.done() else self._host.oom_kills(worker.sandbox)
        if kills and not worker.life.ending:
            self.ask_end(
                worker, Ask(EndReason.END_REASON_OOM_KILLED, "the kernel killed a process of it for memory")
            )
        return kills

    async def sweep(self) -> None:
        """End workers whose init is silent, for ever."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            for worker in self._population:
                if worker.expired() and not worker.life.ending:
                    self._expire(worker)  # the timer stood still while the machine was suspended
                if worker.life.state == State.STATE_RUNNING and not worker.held and self._silent(worker):
                    # Perhaps it was we who did not listen.
                    worker.sandbox.hear()
                    if self._silent(worker):
                        text = f"its init was silent for {self._heartbeat_timeout_seconds:g} s"
                        self.ask_end(worker, Ask(EndReason.END_REASON_HEARTBEAT_TIMEOUT, text))

    def _silent(self, worker: Worker) -> bool:
        heard = max(worker.sandbox.last_beat_monotonic, worker.thawed_monotonic)
        silence = time.monotonic() - heard
        return silence > self._heartbeat_timeout_seconds

    def beats(self) -> list[WorkerBeat]:
        """Return a beat for each worker that was heard since the last time, or is frozen and cannot beat."""
        beats, now, attestations = [], time.monotonic(), 0
        for worker in self._population:
            heard = worker.sandbox.last_beat_monotonic > worker.heard_monotonic
            # The node vouches for those that it holds: they cannot beat. Each birth has
            # this asked of every worker, so the cheaper question comes first.
            if not (heard or worker.held) or worker.life.ending:
                continue
            if not worker.attestation_told:
                attestations += 1
                if attestations > ATTESTATIONS_AT_ONCE:
                    continue  # with the next beat: its first must bring its attestation
            worker.heard_monotonic = worker.sandbox.last_beat_monotonic
            beats.append(worker.beat())
            last = worker.beat_event_monotonic
            if heard and (last is None or now - last >= HEARTBEAT_EVENT_SECONDS):
                worker.beat_event_monotonic = now
                self._records.heartbeat(worker.record)
        return beats

    def attest_again(self) -> None:
        """Tell the controller anew what was found of each sandbox: the stream is a new one."""
        for worker in self._population:
            worker.attestation_told = False

    async def meter(self) -> None:
        """Read what workers use, those longest unread first, and notice memory kills."""
        now = time.monotonic()
        due = [
            worker
            for worker in self._population
            if not worker.life.killing  # what it used in all is read when it is cleared away
            and (worker.read_monotonic is None or now - worker.read_monotonic >= METER_SECONDS)
        ]
        due.sort(key=lambda worker: worker.read_monotonic or 0.0)
        chosen = due[:METERED_AT_ONCE]
        if not chosen:
            return
        read = await self._host.usages([worker.sandbox for worker in chosen])
        for worker, (usage, oom_kills) in zip(chosen, read, strict=True):
            worker.read_monotonic = now
            if worker.life.dead:
                continue  # meanwhile
            worker.usage = usage_message(usage, worker.usage)
            if oom_kills:
                self.check_memory(worker)
            if worker.metered_monotonic is None or now - worker.metered_monotonic >= METRICS_SECONDS:
                worker.metered_monotonic = now
                self._records.usage(worker.record, worker.usage)

    # Ends

    def _apply(self, worker: Worker, event: Event) -> tuple[Action, ...]:
        worker.life, actions = step(worker.life, event)
        return actions

    async def _attend(self, worker: Worker) -> None:
        """See *worker* to its end."""
        sandbox = worker.sandbox
        death = await sandbox.dead
        asked = worker.life.ask or (_LEASE_OVER if death.lapsed else None)
        oom_kills = 0 if overrules(asked) else self._host.oom_kills(sandbox)
        self._apply(worker, Died())
        for door in worker.doors.values():
            door.close()
        if worker.cancel_expiry is not None:
            worker.cancel_expiry()
        in_budget = bool(oom_kills and worker.terms.family_budget.memory_limit_bytes)
        own_reached, family_reached = self._host.memory_reached(sandbox) if in_budget else (True, False)
        facts = WorkerFacts(
            ask=asked,
            oom_kills=oom_kills,
            own_memory_reached=own_reached,
            family_memory_reached=family_reached,
            exit_code=death.exit_code,
            signal=death.signal,
        )
        exit_ = exit_message(judge_worker(facts), datetime.now(UTC))
        # What is known now; the last word of its control group comes when it is cleared away.
        worker.usage = final_usage(NOTHING_READ, worker.usage, death.cpu_seconds, death.max_rss_bytes)
        worker.verdict.set_result(exit_)
        # Whoever descends from it ends with it, whatever it died of.
        self.ask_end(worker, asked or Ask(exit_.reason, exit_.detail))
        await self._calm.wait()
        # Bottom up: the record never shows a child without its parent, and a
        # control group can only go when those below it are gone.
        await asyncio.gather(*(child.ended for child in self._population.children(worker.worker_id)))
        births = [birth.settled for birth in self._population.births if birth.parent_id == worker.worker_id]
        await asyncio.gather(*births)
        read = await self._host.usage(sandbox)
        worker.usage = final_usage(read, worker.usage, death.cpu_seconds, death.max_rss_bytes)
        self._records.usage(worker.record, worker.usage)
        # Before the slot is given back: the kernel counts control groups, and would
        # refuse whoever gets the slot next.
        await self._host.clear(sandbox)
        if not worker.told_by_result:
            await self._controller.deregister(worker.worker_id, exit_, worker.usage)
        self._apply(worker, Finished())
        message = worker.message()
        # A snapshot may be a megabyte, and the dead are many.
        remembered = WorkerMessage()
        remembered.CopyFrom(message)
        remembered.manifest.ClearField("state_snapshot_json")
        self._population.bury(worker, remembered)
        if not any(member.contract_id == worker.contract_id for member in self._population):
            self._host.forget_contract(worker.contract_id)
        if worker.on_end is not None:
            worker.on_end()
        worker.ended.set_result(message)


async def _quiet(workers: Collection[Worker], grace_seconds: float) -> None:
    """Tell the tasks of *workers* to end, and wait until they did or the grace is over."""
    for worker in workers:
        for task_id in worker.sandbox.tasks:
            worker.sandbox.signal_task(task_id, signal.SIGTERM)
    waiters = [asyncio.ensure_future(worker.sandbox.idle.wait()) for worker in workers]
    if waiters:
        await asyncio.wait(waiters, timeout=grace_seconds)
    for waiter in waiters:
        waiter.cancel()


async def _all(futures: list[asyncio.Future[Any]], deadline_monotonic: float) -> None:
    """Wait until all *futures* are done, or the deadline."""
    waiting = [future for future in futures if not future.done()]
    left = deadline_monotonic - time.monotonic()
    if waiting and left > 0:
        await asyncio.wait(waiting, timeout=left)
