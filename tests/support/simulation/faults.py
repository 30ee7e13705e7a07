"""Rules about what goes wrong: time, clocks, nodes, the logger, and the controller's own death."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from hayflick_rpc.errors import HayflickError
from simulation.machine import MachineBase, pick, picks
from simulation.node import Node
from simulation.record import Condition


class Faults(MachineBase):
    """See the module."""

    @rule(seconds=st.sampled_from([0.5, 1.0, 2.0, 5.0, 20.0, 70.0]))
    def wait(self, seconds: float) -> None:
        """Let time pass: nodes beat, cooldowns, manifests, lives and leases run out."""
        self.world.sleep(seconds)

    @precondition(lambda self: self.up)
    @rule(condition=st.sampled_from([Condition.DOWN, Condition.MUTE, Condition.DEAF]))
    def lose_logger(self, condition: Condition) -> None:
        """Let the logger go away, or stop reading, or stop answering."""
        self.world.record.turn(condition)
        self.world.sleep(0.01)

    @precondition(lambda self: not self.up)
    @rule()
    def find_logger(self) -> None:
        """Let the logger return."""
        self.raise_logger()

    @rule(away_seconds=st.sampled_from([0.0, 0.0, 5.0, 30.0]), found=st.sampled_from([True, True, False]))
    def crash(self, away_seconds: float, found: bool) -> None:
        """Kill the controller; start it again, perhaps with nodes that find it at once."""
        self.restart(away_seconds)
        if found:
            self.connect_all()

    @precondition(lambda self: any(not node.connected for node in self.world.nodes.values()))
    @rule(node=picks)
    def reconnect(self, node: int) -> None:
        """Let a node come back."""
        self.connect(pick([it for it in self.world.nodes.values() if not it.connected], node))

    @precondition(lambda self: any(node.connected for node in self.world.nodes.values()))
    @rule(node=picks, how=st.sampled_from(["hangs up", "dies", "falls silent", "stops obeying"]))
    def lose_node(self, node: int, how: str) -> None:
        """Let a node lose its stream, or die, or stop to beat, or leave its orders."""
        it = self._connected(node)
        match how:
            case "hangs up":
                self.world.run(it.hang_up())
            case "dies":
                self.world.run(it.die())
            case "falls silent":
                it.beating = False
            case _:
                it.obedient = False

    @precondition(lambda self: any(not it.beating or not it.obedient for it in self.world.nodes.values()))
    @rule()
    def wake_nodes(self) -> None:
        """Let every node beat and obey again."""
        self.compare()
        for node in self.world.nodes.values():
            node.beating = True
            node.obey()
        self.world.sleep(2.0)

    @rule(what=st.sampled_from(["worker", "worker", "clock", "name"]), number=picks)
    def disturb(self, what: str, number: int) -> None:
        """Let a worker beat no more; or set the wall clock, which changes no decision; or take a name."""
        workers = list(self.model.workers.values())
        nodes = [it for it in self.world.nodes.values() if it.connected]
        if what == "clock":
            self.world.time.step_seconds += pick([-3_600.0, 2.0, 86_400.0], number)
        elif what == "worker" and workers:
            it = pick(workers, number)
            self.world.nodes[it.node_id].hushed.add(it.worker_id)
        elif what == "name" and nodes:
            self._impersonate(pick(nodes, number))

    def _impersonate(self, node: Node) -> None:
        """Connect under the name of a node that is there."""
        other = Node(node.node_id, self.world.time)
        with pytest.raises(HayflickError) as caught:
            self.world.run(other.connect(self.world.servicer))
        assert caught.value.reason_name == "NODE_ALREADY_CONNECTED"

    def _connected(self, number: int) -> Node:
        return pick([it for it in self.world.nodes.values() if it.connected], number)
