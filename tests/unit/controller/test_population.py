"""Promise 2 as a machine: whatever is asked, in whatever order and at whatever time, the contract holds."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hayflick_controller import ends, registrations, wishes
from hayflick_controller.admission import Denial
from hayflick_controller.killswitch import subject
from hayflick_controller.model import (
    EVERYTHING,
    Contract,
    EndReason,
    Exit,
    Latch,
    Manifest,
    Node,
    Policy,
    Resources,
    Scope,
    ScopeKind,
    State,
    Worker,
)
from hayflick_controller.nodes import digest
from hayflick_controller.registrations import Registration
from hayflick_controller.store.sql import sqlite_store
from hayflick_controller.wishes import Wish

MAX_REPLICAS, MAX_DEPTH, COOLDOWN_US, TTL_US = 3, 2, 50, 100

picks = st.integers(0, 1_000)


class Population(RuleBasedStateMachine):
    """Issues, registers, ends, kills and lets time pass, through the code that serves requests."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.now_us = 1_000_000
        self.store = sqlite_store(None)
        self.manifests: list[Manifest] = []
        self.used: set[str] = set()
        self.children: dict[str, list[int]] = {}
        self.stale: set[str] = set()
        self.runner.run(self.store.open(lambda _: None))
        policy = Policy(MAX_DEPTH, MAX_REPLICAS, COOLDOWN_US, manifest_ttl_us=TTL_US)
        contract = Contract("contract", policy, "key", 0)
        self.transact(lambda tx: tx.add_contract(contract, b"secret"))
        self.transact(lambda tx: tx.put_node(Node("node", digest("session"), "", "", 0, 0)))

    def transact(self, fn: Any) -> Any:
        """Run *fn* in a transaction."""
        return self.runner.run(self.store.transact(fn))

    def living(self) -> list[Worker]:
        """Return who lives."""
        found: list[Worker] = self.transact(lambda tx: tx.live_workers())
        return sorted(found, key=lambda worker: worker.path)

    @rule(pick=picks, root=st.booleans())
    def issue(self, pick: int, root: bool) -> None:
        """Ask for a root, or for a child of somebody."""
        living = self.living()
        parent_id = "" if root or not living else living[pick % len(living)].worker_id
        wish = Wish("contract", parent_id, None, "{}", Resources(100, 2**25), "")
        outcome = self.transact(lambda tx: wishes.decide(tx, wish, self.now_us))
        if isinstance(outcome, Manifest):
            self.manifests.append(outcome)

    @rule(pick=picks)
    def register(self, pick: int) -> None:
        """Register any manifest that was ever issued, fresh, used, late or stale."""
        if not self.manifests:
            return
        manifest = self.manifests[pick % len(self.manifests)]
        registration = Registration(manifest, "node", "session", ())
        outcome = self.transact(lambda tx: registrations.decide(tx, registration, None, self.now_us))
        if isinstance(outcome, Denial):
            return
        assert manifest.manifest_id not in self.used, "a manifest was used twice"
        assert manifest.manifest_id not in self.stale, "a manifest passed a kill switch"
        assert self.now_us < manifest.expire_us, "a manifest was used late"
        self.used.add(manifest.manifest_id)
        if manifest.parent_id:
            births = self.children.setdefault(manifest.parent_id, [])
            assert not births or self.now_us - births[-1] >= COOLDOWN_US, "a parent spawned too fast"
            births.append(self.now_us)

    @rule(pick=picks)
    def end(self, pick: int) -> None:
        """Let somebody be seen dead."""
        living = self.living()
        if living:
            worker = living[pick % len(living)]
            exit_ = Exit(EndReason.COMPLETED, self.now_us)
            self.transact(lambda tx: ends.end(tx, [(worker, exit_)], self.now_us, lambda each: each))

    @rule(pick=picks, engaged=st.booleans())
    def turn_a_switch(self, pick: int, engaged: bool) -> None:
        """Engage or release a kill switch over everything, the contract, or somebody."""
        living = self.living()
        scopes = [EVERYTHING, Scope(ScopeKind.CONTRACT, "contract")]
        scopes += [Scope(ScopeKind.WORKER, worker.worker_id) for worker in living]
        scope = scopes[pick % len(scopes)]

        def turn(tx: Any) -> None:
            _, path = subject(tx, scope)
            latch = tx.latches([scope]).get(scope, Latch(scope))
            tx.put_latch(replace(latch, engaged=engaged, epoch=latch.epoch + 1))
            if engaged:
                tx.return_reserved(scope, path)
                ends.stop(tx, tx.live_workers(path=path), EndReason.KILL_SWITCH, "")

        covered = [
            manifest.manifest_id
            for manifest in self.manifests
            if scope.kind is not ScopeKind.WORKER or self.descends(manifest.parent_id, scope.id)
        ]
        self.transact(turn)
        self.stale.update(covered)

    @rule(elapsed_us=st.integers(1, 120))
    def wait(self, elapsed_us: int) -> None:
        """Let time pass."""
        self.now_us += elapsed_us

    @rule()
    def sweep(self) -> None:
        """Give back what was reserved too long ago."""
        self.transact(lambda tx: tx.return_expired(self.now_us))

    @invariant()
    def the_contract_holds(self) -> None:
        """At every instant: no more workers than allowed, none too deep, and counts that tell the truth."""
        living = self.living()
        contract = self.transact(lambda tx: tx.contract("contract"))
        assert contract.active_count == len(living) <= MAX_REPLICAS
        assert contract.active_count + contract.reserved_count <= MAX_REPLICAS
        assert contract.reserved_count >= 0
        for worker in living:
            assert worker.depth == worker.path.count("/") - 1 <= MAX_DEPTH
            parent = self.transact(lambda tx, worker=worker: tx.worker(worker.parent_id))
            assert parent is None or parent.live or worker.state is State.STOPPING

    def descends(self, worker_id: str, ancestor_id: str) -> bool:
        """Return whether a worker is an ancestor's, or itself it."""
        worker = self.transact(lambda tx: tx.worker(worker_id)) if worker_id else None
        return worker is not None and ancestor_id in worker.path.split("/")

    def teardown(self) -> None:
        """Close the store."""
        self.runner.run(self.store.close())
        self.runner.close()


TestPopulation = Population.TestCase
TestPopulation.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
