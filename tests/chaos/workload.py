"""Callers that never rest: they issue, launch, breed from inside, end, kill, freeze, and ask again."""

from __future__ import annotations

import contextlib
import json
import random
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from google.protobuf.duration_pb2 import Duration

from hayflick.v1 import controller_pb2 as pb
from hayflick.v1 import orchestrator_pb2 as opb
from hayflick.v1.resources_pb2 import Contract, NetworkPolicy, Resources

from ..integration.conftest import call, duration, info_of, request_id

if TYPE_CHECKING:
    from .fleet import Fleet
    from .ledger import Ledger

T = TypeVar("T")

MIB = 1024 * 1024
ATTEMPT_SECONDS = 8.0
INSIST_SECONDS = 40.0
PAUSE_SECONDS = 0.15
TRANSIENT = {"AUDIT_UNAVAILABLE", "SERVICE_UNAVAILABLE", "SHUTTING_DOWN", "NODE_SESSION_INVALID"}
FAULTS_OF_OURS = ("INTERNAL", "UNKNOWN", "UNIMPLEMENTED", "DATA_LOSS")

POLICIES: list[dict[str, Any]] = [
    {"max_replicas": 6, "max_depth": 3, "cooldown": duration(0.3)},
    {"max_replicas": 4, "max_depth": 2, "cooldown": Duration(), "expiration": duration(6)},
    {"max_replicas": 8, "max_depth": 5, "cooldown": duration(0.05), "manifest_ttl": duration(4)},
]


class Refused(Exception):
    """A request was answered: no."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class GivenUp(Exception):
    """Nobody answered a request before it was too late to ask again."""


def breed(me: Any) -> list[str]:
    """Replicate from inside, and leave the child alone."""
    try:
        return [me.replicate("chaos", {"generation": 1}).worker_id]
    except Exception as error:  # noqa: BLE001 -- whatever it is, the driver hears its name
        return ["", str(getattr(error, "reason", type(error).__name__))]


class Workload:
    """Threads that call the public services of a fleet, until they are told to stop.

    Args:
        fleet: Whom.
        ledger: Where they note what they were told.
        seed: Of their choices.
        breeders: How many make and end workers; one more kills, freezes and rotates keys.
    """

    def __init__(self, fleet: Fleet, ledger: Ledger, seed: int, breeders: int = 3) -> None:
        self._fleet, self._ledger = fleet, ledger
        self._stopping = threading.Event()
        self._contracts: list[str] = []
        self._living: dict[str, str] = {}
        self._threads = [
            threading.Thread(target=self._live, args=(self._breed_once, random.Random(seed + number)))
            for number in range(breeders)
        ]
        self._threads.append(
            threading.Thread(target=self._live, args=(self._govern_once, random.Random(seed + 99)))
        )
        self._task = call(breed, timeout=10)
        self.errors: list[str] = []

    def start(self) -> None:
        """Make the contracts, and begin."""
        chance = random.Random(0)
        for policy in POLICIES:
            request = pb.CreateContractRequest(request_id=request_id(), contract=Contract(**policy))
            answer = self._ask(
                "create", chance, lambda stub, r=request: stub.CreateContract(r, timeout=ATTEMPT_SECONDS)
            )
            self._contracts.append(answer.contract.contract_id)
            self._ledger.created(answer.contract.contract_id)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ask nothing more; return when nobody waits for an answer."""
        self._stopping.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(ATTEMPT_SECONDS + 20)
                assert not thread.is_alive()

    def _live(self, act: Callable[[random.Random], None], chance: random.Random) -> None:
        while not self._stopping.wait(chance.expovariate(1 / PAUSE_SECONDS)):
            try:
                act(chance)
            except (Refused, GivenUp):
                continue  # noted already
            except Exception as error:  # noqa: BLE001 -- a thread's death must be seen
                self.errors.append(f"{act.__name__}: {error!r}"[:500])

    # What each does

    def _breed_once(self, chance: random.Random) -> None:
        act = chance.choices([self._launch, self._breed_inside, self._end], [5, 3, 2])[0]
        act(chance)

    def _govern_once(self, chance: random.Random) -> None:
        acts = [self._kill_contract, self._kill_family, self._freeze, self._rotate, self._reap]
        chance.choices(acts, [2, 2, 3, 1, 1])[0](chance)
        self._stopping.wait(chance.uniform(0.2, 1.0))

    def _launch(self, chance: random.Random) -> None:
        parent, node = "", chance.choice(self._fleet.orchestrators)
        contract = chance.choice(self._contracts)
        if self._living and chance.random() < 0.6:
            parent, node = self._someone(chance)
        issue = pb.IssueManifestRequest(
            request_id=request_id(), contract_id=contract, parent_id=parent, state_snapshot_json="{}"
        )
        if parent:
            known = self._ask(
                "get",
                chance,
                lambda stub: stub.GetWorker(pb.GetWorkerRequest(worker_id=parent), timeout=ATTEMPT_SECONDS),
            )
            issue.contract_id = known.worker.contract_id
        else:
            issue.resources.CopyFrom(
                Resources(
                    cpu_millis=500,
                    memory_limit_bytes=64 * MIB,
                    network=NetworkPolicy(allow_controller=True),
                )
            )
        manifest = self._ask(
            "issue", chance, lambda stub: stub.IssueManifest(issue, timeout=ATTEMPT_SECONDS)
        ).manifest
        launch = opb.LaunchWorkerRequest(request_id=request_id(), manifest=manifest)
        stub = self._fleet.nodes[node]
        worker = self._insist("launch", lambda: stub.LaunchWorker(launch, timeout=ATTEMPT_SECONDS)).worker
        self._born(worker.worker_id, node)

    def _breed_inside(self, chance: random.Random) -> None:
        worker_id, node = self._someone(chance)
        request = opb.RunTaskRequest(worker_id=worker_id, task=self._task, keep_worker_on_error=True)
        value = ""
        with contextlib.suppress(grpc.RpcError):  # hanging up ends the task, and nothing else
            for response in self._fleet.nodes[node].RunTask(request, timeout=12):
                if response.HasField("result"):
                    value = response.result.value_json
        told = json.loads(value) if value else []
        if told and told[0]:
            self._born(told[0], node)
        elif told:
            self._ledger.refused("replicate", told[1])

    def _end(self, chance: random.Random) -> None:
        worker_id, node = self._someone(chance)
        request = opb.StopWorkerRequest(request_id=request_id(), worker_id=worker_id)
        stub = self._fleet.nodes[node]
        self._living.pop(worker_id, None)
        self._insist("stop", lambda: stub.StopWorker(request, timeout=ATTEMPT_SECONDS))
        self._ledger.ended(worker_id)

    def _kill_contract(self, chance: random.Random) -> None:
        contract = chance.choice(self._contracts)
        scope = pb.Scope(contract_id=contract)
        self._kill(chance, scope, f"contract/{contract}")
        self._stopping.wait(chance.uniform(0, 0.5))
        request = pb.ReleaseKillSwitchRequest(request_id=request_id(), scope=scope, reason="chaos")
        answer = self._ask(
            "release", chance, lambda stub: stub.ReleaseKillSwitch(request, timeout=ATTEMPT_SECONDS)
        )
        self._ledger.turned(f"contract/{contract}", answer.kill_switch.epoch)

    def _kill_family(self, chance: random.Random) -> None:
        worker_id, _ = self._someone(chance)
        self._kill(chance, pb.Scope(worker_id=worker_id), f"worker/{worker_id}")

    def _kill(self, chance: random.Random, scope: pb.Scope, key: str) -> None:
        request = pb.EngageKillSwitchRequest(
            request_id=request_id(), scope=scope, reason="chaos", timeout=duration(chance.choice([0.5, 2, 5]))
        )
        answer = self._ask(
            "kill", chance, lambda stub: stub.EngageKillSwitch(request, timeout=ATTEMPT_SECONDS + 4)
        )
        self._ledger.killed(key, answer)

    def _freeze(self, chance: random.Random) -> None:
        worker_id, _ = self._someone(chance)
        freeze = pb.QuarantineWorkerRequest(request_id=request_id(), worker_id=worker_id, reason="chaos")
        with contextlib.suppress(Refused, GivenUp):
            self._ask(
                "freeze", chance, lambda stub: stub.QuarantineWorker(freeze, timeout=ATTEMPT_SECONDS), 3
            )
        self._stopping.wait(chance.uniform(0, 1.0))
        thaw = pb.ReleaseQuarantineRequest(request_id=request_id(), worker_id=worker_id, reason="chaos")
        self._ask("thaw", chance, lambda stub: stub.ReleaseQuarantine(thaw, timeout=ATTEMPT_SECONDS), 10)

    def _rotate(self, chance: random.Random) -> None:
        request = pb.RotateKeyRequest(
            request_id=request_id(), contract_id=chance.choice(self._contracts), reason="chaos"
        )
        self._ask("rotate", chance, lambda stub: stub.RotateKey(request, timeout=ATTEMPT_SECONDS))

    def _reap(self, chance: random.Random) -> None:
        request = pb.ReapStaleWorkersRequest(
            request_id=request_id(), contract_id=chance.choice(self._contracts), timeout=duration(5)
        )
        self._ask(
            "reap", chance, lambda stub: stub.ReapStaleWorkers(request, timeout=ATTEMPT_SECONDS + 10), 20
        )

    # How

    def _born(self, worker_id: str, node: str) -> None:
        self._ledger.born(worker_id)
        self._living[worker_id] = node
        while len(self._living) > 40:  # those that were killed are asked for long enough
            self._living.pop(next(iter(self._living)), None)

    def _someone(self, chance: random.Random) -> tuple[str, str]:
        living = list(self._living.items())
        if not living:
            raise Refused("nobody lives")
        return chance.choice(living)

    def _ask(
        self, what: str, chance: random.Random, ask: Callable[[Any], T], seconds: float = INSIST_SECONDS
    ) -> T:
        """Ask a controller, and another where there is one, until one answers."""
        return self._insist(what, lambda: ask(chance.choice(self._fleet.stubs)), seconds)

    def _insist(self, what: str, ask: Callable[[], T], seconds: float = INSIST_SECONDS) -> T:
        return insist(what, ask, self._ledger, seconds, self._stopping)


def insist(
    what: str,
    ask: Callable[[], T],
    ledger: Ledger,
    seconds: float = INSIST_SECONDS,
    stopping: threading.Event | None = None,
) -> T:
    """Ask the same again until it is answered, as a caller should that was not.

    Raises:
        Refused: It was answered with no.
        GivenUp: It was not answered in time, or the driver stops.
    """
    import time

    pause = threading.Event() if stopping is None else stopping
    deadline = time.monotonic() + seconds
    while True:
        try:
            return ask()
        except grpc.RpcError as error:
            reason = _reason(error)
            if reason is not None:
                ledger.refused(what, reason)
                raise Refused(reason) from None
        if time.monotonic() > deadline or pause.wait(0.2):
            ledger.gave_up(what)
            raise GivenUp(what)


def _reason(error: grpc.RpcError) -> str | None:
    """Return why a call was refused; ``None`` where the same should be asked again."""
    assert isinstance(error, grpc.Call)
    try:
        reason = info_of(error).reason
    except AssertionError:  # no service said it: a connection that broke, a deadline
        code = error.code().name
        return f"{code}: {error.details()}" if code in FAULTS_OF_OURS else None
    return None if reason in TRANSIENT else str(reason)
