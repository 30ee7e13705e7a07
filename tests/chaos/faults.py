"""What goes wrong: each fault begins, lasts, and is healed."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .kernel import Held, processes

if TYPE_CHECKING:
    from .fleet import Fleet

Heal = Callable[[], None]
MAX_STEP_SECONDS = 7_200.0


@dataclass(frozen=True)
class Fault:
    """One kind.

    Attributes:
        name: What the summary calls it.
        begin: Does it; returns what undoes it.
        possible: Whether this fleet can have it.
    """

    name: str
    begin: Callable[[Fleet, random.Random], Heal]
    possible: Callable[[Fleet], bool] = lambda _: True


def _some(fleet: Fleet, service: str, chance: random.Random) -> str:
    return chance.choice([name for name in fleet.names if name.startswith(service)])


def _pid(fleet: Fleet, name: str) -> list[int]:
    return [fleet.processes[name].pid] if fleet.alive(name) else []


def _kill(service: str, number: signal.Signals) -> Callable[[Fleet, random.Random], Heal]:
    def begin(fleet: Fleet, chance: random.Random) -> Heal:
        name = _some(fleet, service, chance)
        if fleet.alive(name):
            fleet.processes[name].send_signal(number)
            fleet.processes[name].wait(30)
        return fleet.mend

    return begin


def _stop(find: Callable[[Fleet, random.Random], list[int]]) -> Callable[[Fleet, random.Random], Heal]:
    def begin(fleet: Fleet, chance: random.Random) -> Heal:
        held = Held(find(fleet, chance))
        held.send(signal.SIGSTOP)

        def heal() -> None:
            held.send(signal.SIGCONT)
            held.close()

        return heal

    return begin


def _shoot(find: Callable[[Fleet, random.Random], list[int]]) -> Callable[[Fleet, random.Random], Heal]:
    def begin(fleet: Fleet, chance: random.Random) -> Heal:
        held = Held(find(fleet, chance))
        held.send(signal.SIGKILL)
        held.all_dead(30)
        held.close()
        return fleet.mend

    return begin


def _service(service: str) -> Callable[[Fleet, random.Random], list[int]]:
    return lambda fleet, chance: _pid(fleet, _some(fleet, service, chance))


def _zygote(fleet: Fleet, chance: random.Random) -> list[int]:
    name = _some(fleet, "orchestrator", chance)
    return fleet.zygote(name) if fleet.alive(name) else []


def _worker(fleet: Fleet, chance: random.Random) -> list[int]:
    found = sorted(pid for node_id in fleet.node_ids for pid in processes(node_id))
    return [chance.choice(found)] if found else []


def _crash_database(fleet: Fleet, chance: random.Random) -> Heal:
    del chance
    assert fleet.cluster is not None
    fleet.cluster.crash()
    return fleet.mend


def _database(fleet: Fleet, chance: random.Random) -> list[int]:
    del chance
    assert fleet.cluster is not None
    return fleet.cluster.processes()


def _fill_disk(fleet: Fleet, chance: random.Random) -> Heal:
    del chance
    assert fleet.disk is not None
    fleet.disk.fill()
    return fleet.disk.empty


def _partition(fleet: Fleet, chance: random.Random) -> Heal:
    relay = fleet.relays[chance.choice(fleet.orchestrators)]
    (relay.hold if chance.random() < 0.5 else relay.cut)()
    return relay.heal


def _step_clock(fleet: Fleet, chance: random.Random) -> Heal:
    # It stays so: nobody who set a clock wrongly sets it back at once.
    fleet.step_clock(chance.uniform(-MAX_STEP_SECONDS, MAX_STEP_SECONDS))
    return lambda: None


def _kill_node_and_zygote(fleet: Fleet, chance: random.Random) -> Heal:
    name = _some(fleet, "orchestrator", chance)
    if fleet.alive(name):
        zygotes = Held(fleet.zygote(name))
        zygotes.send(signal.SIGSTOP)  # it must not clear up first
        fleet.processes[name].kill()
        fleet.processes[name].wait(30)
        zygotes.send(signal.SIGKILL)
        zygotes.close()
    return fleet.mend


def _has_database(fleet: Fleet) -> bool:
    return fleet.cluster is not None


FAULTS: tuple[Fault, ...] = (
    Fault("controller killed", _kill("controller", signal.SIGKILL)),
    Fault("controller stopped", _stop(_service("controller"))),
    Fault("controller restarted", _kill("controller", signal.SIGTERM)),
    Fault("logger killed", _kill("logger", signal.SIGKILL)),
    Fault("logger stopped", _stop(_service("logger"))),
    Fault("logger restarted", _kill("logger", signal.SIGTERM)),
    Fault("logger's disk full", _fill_disk, lambda fleet: fleet.disk is not None),
    Fault("orchestrator killed", _kill("orchestrator", signal.SIGKILL)),
    Fault("orchestrator stopped", _stop(_service("orchestrator"))),
    Fault("zygote killed", _shoot(_zygote)),
    Fault("zygote stopped", _stop(_zygote)),
    Fault("orchestrator and zygote killed", _kill_node_and_zygote),
    Fault("worker's process killed", _shoot(_worker)),
    Fault("worker's process stopped", _stop(_worker)),
    Fault("database killed", _crash_database, _has_database),
    Fault("database stopped", _stop(_database), _has_database),
    Fault("partition", _partition),
    Fault("clock set", _step_clock),
)
