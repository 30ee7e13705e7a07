"""The part of the machine that all its rules share: to ask, to foresee, to compare."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant

from hayflick.v1 import controller_pb2 as pb
from hayflick.v1 import resources_pb2
from hayflick_controller.controller import EXPIRE_MARGIN_US
from hayflick_controller.model import Scope, ScopeKind
from hayflick_controller.nodes import LEASE_MARGIN_US
from hayflick_rpc.errors import HayflickError
from simulation import model as expected
from simulation.auditor import Auditor
from simulation.model import Model, Worker
from simulation.node import LEASE_SECONDS, Node
from simulation.record import Condition
from simulation.world import START_TIMEOUT_SECONDS, World

T = TypeVar("T")

SECOND_US = 1_000_000
LATE_SECONDS = 8.0
"""How long after it may first happen the controller must have done what time calls for."""
UNRETURNED_SECONDS = 3.0
"""How long a controller that serves may count a reservation whose time is over."""
RECONNECT_SECONDS = 3.0
"""How long after the logger's return the controller must have found it."""

picks = st.integers(0, 7)
"""Chooses one of what there is, the newest first."""


@dataclass(frozen=True)
class Fate:
    """What becomes of a call: after so many turns of the loop its caller hangs up, or the controller dies."""

    what: Literal["hangs up", "dies"]
    turns: int
    found: bool = True
    """Whether the nodes find its successor at once."""


fates = st.one_of(
    st.none(),
    st.none(),
    st.none(),
    st.none(),
    st.builds(
        Fate,
        st.sampled_from(["hangs up", "dies"]),
        st.integers(0, 30),
        st.sampled_from([True, True, True, False]),
    ),
)


def pick(items: Sequence[T], number: int) -> T:
    """Return one of *items*."""
    return items[-1 - number % len(items)]


class MachineBase(RuleBasedStateMachine):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.model = Model()
        self.auditor = Auditor(self.world.record)
        self.turns: Counter[tuple[str, str, int]] = Counter()
        self.answers: list[tuple[Any, Any]] = []
        self.idle_seconds = 0.0

    def start(self) -> None:
        """Start the controller and connect the nodes."""
        logging.getLogger("alembic").setLevel(logging.WARNING)
        self.world.run(self.world.start())
        self.connect_all()

    def teardown(self) -> None:
        """Let the logger return, and compare once more, with nothing on its way."""
        try:
            if hasattr(self.world, "servicer"):
                self.raise_logger()
                self.check()
        finally:
            self.world.close()

    @property
    def up(self) -> bool:
        """Whether the logger answers, so that decisions can be taken."""
        return self.world.record.condition is Condition.UP

    @property
    def now_us(self) -> int:
        """The time by which the controller decides."""
        return self.world.controller.clock()

    def obedient(self) -> list[str]:
        """Return the nodes that carry out orders."""
        return [node.node_id for node in self.world.nodes.values() if node.connected and node.obedient]

    # To ask

    def ask(
        self,
        request: Any,
        refusal: str,
        apply: Callable[[Any], None],
        *,
        fate: Fate | None = None,
        acts: bool = False,
        silent: bool = False,
        blank: bool = False,
    ) -> Any:
        """Make a call, and see that it is answered as foreseen.

        Args:
            request: The call.
            refusal: The reason that is due; "" for none.
            apply: Does to the model what the call does, given its answer or ``None``.
            fate: What else happens; nothing does while the logger is away.
            acts: Whether the call acts also when it cannot be recorded.
            silent: Whether it is then answered all the same.
            blank: Whether nothing is to be recorded, so that it may then be answered or not.

        Returns:
            The answer, if there was one.
        """
        if fate is not None and fate.what == "dies" and self.up:
            answer = self._ask_the_dying(request, refusal, apply, fate.turns)
            if fate.found:
                self.connect_all()
            return answer
        due = {refusal}
        if not refusal and not silent and not self.up:
            due = {"AUDIT_UNAVAILABLE", ""} if blank else {"AUDIT_UNAVAILABLE"}
        turns = fate.turns if fate is not None and self.up else None
        answer = self.world.run(self.world.try_call(request, turns))
        if isinstance(answer, HayflickError):
            assert answer.reason_name in due, f"{answer!r} where {due} was due"
            if acts:
                apply(None)
            return None
        assert "" in due, f"{type(answer).__name__} where {due} was due"
        if self.up:
            self.answers.append((request, answer))
        apply(answer)
        return answer

    def _ask_the_dying(self, request: Any, refusal: str, apply: Callable[[Any], None], turns: int) -> Any:
        """Kill the controller in the middle of a call; ask its successor what came of it."""
        self.world.run_for(self.world.call_once(request, turns))
        self.restart()
        if self.world.read(lambda tx: tx.answer(request.request_id)) is None:
            return None
        assert not refusal, f"{request.request_id} was granted where {refusal} was due"
        answer = self.world.run(self.world.try_call(request))
        if isinstance(answer, HayflickError):
            # No node is connected: none can confirm, and none may register.
            assert answer.reason_name in ("SERVICE_UNAVAILABLE", "NODE_SESSION_INVALID"), repr(answer)
            answer = None
        apply(answer)
        return answer

    def require_recorded(self, **fields: str) -> None:
        """See that an event with these fields, or details, is recorded and known to be."""

        def matches(event: Any) -> bool:
            return all(
                (getattr(event, name) if hasattr(event, name) else dict(event.details).get(name)) == value
                for name, value in fields.items()
            )

        assert self.world.record.is_acknowledged(matches), f"answered before {fields} was on record"

    # Faults that several rules share

    def restart(self, away_seconds: float = 0.0) -> None:
        """Kill the controller and start it again; by then NTP has put the wall clock right."""
        self.world.crash()
        served_seconds = self.world.time.seconds - self.world.start_seconds
        if served_seconds > UNRETURNED_SECONDS:
            self.idle_seconds = 0.0
        else:
            self.idle_seconds += served_seconds
        self.idle_seconds += away_seconds
        self.world.time.seconds += away_seconds
        self.world.time.step_seconds = 0.0
        self.world.run(self.world.start())

    def raise_logger(self) -> None:
        """Let the logger be there, and the controller find it."""
        self.world.record.turn(Condition.UP)
        self.world.sleep(RECONNECT_SECONDS)
        assert self.world.controller.audit_up, "the controller did not find its logger again"

    def connect_all(self) -> None:
        """Let every node connect that is not."""
        for node in self.world.nodes.values():
            if not node.connected:
                self.connect(node)

    def connect(self, node: Node) -> None:
        """Let a node connect, with what it runs."""
        self.compare()
        named, births = set(node.running), set(node.births)
        stopped = self.world.run(node.connect(self.world.servicer))
        here = [it for it in self.model.workers.values() if it.node_id == node.node_id and it.live]
        missing = [
            it
            for it in here
            if it.worker_id not in named and (it.worker_id not in births or it.state == expected.RUNNING)
        ]
        self.model.end((it, it.stop_reason or expected.NODE_LOST) for it in missing)
        welcome = {it.worker_id for it in here if it.live and it.state != expected.STOPPING}
        asked = named | births.intersection(self.model.workers)
        assert set(stopped) == asked - welcome, f"{stopped} were to stop, of {asked}"
        if node.obedient:
            self.model.freeze(
                name for name, it in node.running.items() if self.model.quarantined.intersection(it.path)
            )

    # To compare

    @invariant()
    def check(self) -> None:
        """The model, the registry, the nodes and the record agree, and every promise is kept."""
        if not hasattr(self.world, "servicer"):
            return
        self.compare()
        self._check_truth()
        self._check_contracts()
        self.auditor.read()
        if self.up and self.world.controller.audit_up:
            self._check_record()

    def compare(self) -> None:
        """See that the registry has what the model foresees, where time leaves no choice."""
        seen = self.world.workers()
        self.model.settle(self.obedient())
        assert seen.keys() == self.model.workers.keys(), "other workers than were born are registered"
        for worker in self.model.workers.values():
            self._follow_beats(worker, seen[worker.worker_id])
            self._follow_time(worker, seen[worker.worker_id])
            self._follow_standing(worker, seen[worker.worker_id])
        self._follow_losses(seen)
        while confirmed := [it for it in self.model.workers.values() if self._is_confirmed(it, seen)]:
            self.model.end((it, it.stop_reason) for it in confirmed)
        self.model.settle(self.obedient())
        for worker in self.model.workers.values():
            found = seen[worker.worker_id]
            assert (_state(found), _end_reason(found)) == (worker.state, worker.end_reason), (
                f"{found.worker_id} is {_state(found)} {_end_reason(found)}; foreseen: {worker}"
            )
            assert (found.contract_id, found.parent_id, found.depth, found.node_id) == (
                worker.contract_id,
                worker.parent_id,
                len(worker.path) - 1,
                worker.node_id,
            )
            self._check_overdue(worker)

    def _follow_standing(self, worker: Worker, found: resources_pb2.Worker) -> None:
        """Let a freeze or thaw that stands come to pass in the model, if the controller says that it did."""
        state, held = _state(found), bool(self.model.quarantined.intersection(worker.path))
        freezable = (expected.STARTING, expected.RUNNING)
        frozen = held and worker.state in freezable and state == expected.QUARANTINED
        if frozen or (not held and worker.state == expected.QUARANTINED and state in freezable):
            worker.state = state

    def _follow_time(self, worker: Worker, found: resources_pb2.Worker) -> None:
        """Let happen in the model what its time has come for, if the controller says that it did."""
        if not worker.live or _state(found) not in (expected.STOPPING, expected.ENDED):
            return
        now_us, reason = self.now_us, _end_reason(found)
        over = worker.expire_us is not None and now_us > worker.expire_us + EXPIRE_MARGIN_US
        stillborn = now_us > worker.create_us + round(START_TIMEOUT_SECONDS * SECOND_US)
        if not worker.stop_reason and over and reason in ("", expected.EXPIRED, expected.NODE_LOST):
            if reason != expected.NODE_LOST:
                self.model.stop([worker], expected.EXPIRED)
        elif (
            not worker.stop_reason
            and stillborn
            and worker.state == expected.STARTING
            and reason in ("", expected.LAUNCH_FAILED)
        ):
            self.model.stop([worker], expected.LAUNCH_FAILED)

    def _follow_losses(self, seen: dict[str, resources_pb2.Worker]) -> None:
        """Let those be lost whose node's lease is over, if the controller says that they are."""
        obedient = self.obedient()
        lost = [
            it
            for it in self.model.workers.values()
            if it.live
            and _end_reason(seen[it.worker_id]) == expected.NODE_LOST
            and it.node_id not in obedient
            and self._lease_over_seconds(it) >= 0
        ]
        self.model.end((it, expected.NODE_LOST) for it in lost)

    def _is_confirmed(self, worker: Worker, seen: dict[str, resources_pb2.Worker]) -> bool:
        """Return whether a worker ended as it was told to, before its controller died or its node left."""
        return (
            worker.state == expected.STOPPING
            and _end_reason(seen[worker.worker_id]) == worker.stop_reason
            and worker.worker_id not in self.world.nodes[worker.node_id].running
        )

    def _follow_beats(self, worker: Worker, found: resources_pb2.Worker) -> None:
        node = self.world.nodes[worker.node_id]
        heard = worker.worker_id in node.ever_beaten
        if worker.state == expected.STARTING and (
            worker.worker_id in node.beaten or (heard and _state(found) == expected.RUNNING)
        ):
            worker.state = expected.RUNNING

    def _lease_over_seconds(self, worker: Worker) -> float:
        """Return for how long the lease of a worker's node has certainly been over."""
        node = self.world.nodes[worker.node_id]
        renewed = max(node.ack_seconds, self.world.start_seconds)
        return self.world.time.seconds - renewed - LEASE_SECONDS - LEASE_MARGIN_US / SECOND_US

    def _check_overdue(self, worker: Worker) -> None:
        late_us = round(LATE_SECONDS * SECOND_US)
        if worker.live:
            assert self._lease_over_seconds(worker) < LATE_SECONDS, f"{worker} holds its slot for ever"
        if worker.live and worker.state != expected.STOPPING and worker.expire_us is not None:
            restart_us = self.now_us - round((self.world.time.seconds - self.world.start_seconds) * SECOND_US)
            due_us = max(worker.expire_us + EXPIRE_MARGIN_US, restart_us)
            assert self.now_us < due_us + late_us, f"{worker} outlives its contract"

    def _check_truth(self) -> None:
        """Nobody is said to be dead who runs."""
        for node in self.world.nodes.values():
            for worker_id in node.running:
                assert self.model.workers[worker_id].live, f"{worker_id} is said to be dead, and runs"

    def _check_contracts(self) -> None:
        """The population never exceeds its limit, and is counted right."""
        now_us = self.now_us
        unreturned_seconds = UNRETURNED_SECONDS
        if self.world.time.seconds < self.world.start_seconds + unreturned_seconds:
            unreturned_seconds += self.idle_seconds
        before_us = now_us - round(unreturned_seconds * SECOND_US)
        for contract in self.model.contracts.values():
            found = self.world.run(self.world.call(pb.GetContractRequest(contract_id=contract.contract_id)))
            active, reserved = found.contract.active_count, found.contract.reserved_count
            assert active == self.model.live(contract.contract_id)
            assert active + reserved <= contract.max_replicas
            # Given back within a moment of their time, or when somebody wants them.
            at_least = self.model.reserved(contract.contract_id, now_us)
            at_most = self.model.reserved(contract.contract_id, before_us)
            assert at_least <= reserved <= max(at_least, at_most)
            assert found.contract.key_id == contract.key_id
            latch = self.model.latch(f"contract/{contract.contract_id}")
            switch = found.contract.kill_switch
            assert (switch.engaged, switch.epoch) == (latch.engaged, latch.epoch)

    def _check_record(self) -> None:
        """Every birth, end, kill, release and quarantine is on record, once."""
        for worker in self.model.workers.values():
            assert self.auditor.births[worker.worker_id] == 1, f"{worker} is not on record"
            ends = [worker.end_reason] if worker.end_reason else []
            assert self.auditor.ends[worker.worker_id] == ends, f"{worker} is not on record as it ended"
        born = {name for name, count in self.auditor.births.items() if count}
        assert born == self.model.workers.keys(), "births are on record that never were"
        assert self.auditor.turns == self.turns, f"{self.auditor.turns - self.turns} more, or less"

    def read_latch(self, scope: str) -> tuple[bool, int]:
        """Return whether a latch is engaged, and its epoch, as the controller's database has it."""
        key = Scope.from_key(scope)
        latch = self.world.read(lambda tx: tx.latches([key]).get(key))
        assert latch is None or latch.scope.kind in ScopeKind
        return (False, 0) if latch is None else (latch.engaged, latch.epoch)


def _state(worker: resources_pb2.Worker) -> str:
    return resources_pb2.State.Name(worker.state).removeprefix("STATE_").lower()


def _end_reason(worker: resources_pb2.Worker) -> str:
    if not worker.HasField("exit"):
        return ""
    return resources_pb2.EndReason.Name(worker.exit.reason).removeprefix("END_REASON_").lower()
