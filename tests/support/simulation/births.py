"""Rules about births: contracts, manifests, registrations, keys, and requests that come again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from hayflick.v1 import controller_pb2 as pb
from hayflick.v1 import resources_pb2
from hayflick_rpc import wire
from hayflick_rpc.errors import HayflickError
from simulation.machine import SECOND_US, Fate, MachineBase, fates, pick, picks
from simulation.model import STOPPING, Contract, Manifest
from simulation.node import Node

MAX_CONTRACTS = 3
RESOURCES = resources_pb2.Resources(cpu_millis=500, memory_limit_bytes=64 * 1024 * 1024)


@dataclass(frozen=True)
class Policy:
    """The limits of a contract."""

    max_depth: int
    max_replicas: int
    cooldown_seconds: int
    expiration_seconds: int | None
    ttl_seconds: int


policies = st.builds(
    Policy,
    st.sampled_from([2, 1, 3, 0]),
    st.sampled_from([4, 3, 2, 1]),
    st.sampled_from([0, 0, 0, 2, 5]),
    st.sampled_from([None, None, None, 4, 20]),
    st.sampled_from([60, 60, 3]),
)

parents = st.one_of(picks, picks, st.none())
"""Chooses a live worker of a contract, or nobody."""

TAMPERED = ("signature", "depth", "epoch", "contract", "parent", "expiry")


class Births(MachineBase):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.signed: dict[str, resources_pb2.Manifest] = {}

    @initialize(
        policy=policies,
        births=st.lists(st.tuples(parents, picks), min_size=1, max_size=5),
    )
    def begin(self, policy: Policy, births: list[tuple[int | None, int]]) -> None:
        """Start the controller, connect the nodes, and let a first family be born."""
        self.start()
        self._create(policy, None)
        for parent, node in births:
            self._bear(self._contract(0).contract_id, parent, node, None)

    @precondition(lambda self: len(self.model.contracts) < MAX_CONTRACTS)
    @rule(policy=policies, fate=fates)
    def create_contract(self, policy: Policy, fate: Fate | None) -> None:
        """Create a contract with small limits."""
        self._create(policy, fate)

    @precondition(lambda self: self.model.contracts)
    @rule(contract=picks, parent=parents, node=picks, fate=fates)
    def bear(self, contract: int, parent: int | None, node: int, fate: Fate | None) -> None:
        """Let a worker be born: ask for a manifest, and present it at once."""
        self._bear(self._contract(contract).contract_id, parent, node, fate)

    def _create(self, policy: Policy, fate: Fate | None) -> None:
        contract = resources_pb2.Contract(
            max_depth=policy.max_depth,
            max_replicas=policy.max_replicas,
            cooldown=wire.duration(policy.cooldown_seconds),
            manifest_ttl=wire.duration(policy.ttl_seconds),
            expiration=policy.expiration_seconds and wire.duration(policy.expiration_seconds),
        )
        request = pb.CreateContractRequest(request_id=self.world.request_id(), contract=contract)

        def apply(answer: pb.CreateContractResponse) -> None:
            made = answer.contract
            self.require_recorded(decision="contract_created", contract_id=made.contract_id)
            self.model.contracts[made.contract_id] = Contract(
                made.contract_id,
                policy.max_depth,
                policy.max_replicas,
                policy.cooldown_seconds * SECOND_US,
                policy.expiration_seconds and policy.expiration_seconds * SECOND_US,
                policy.ttl_seconds * SECOND_US,
                made.key_id,
            )

        self.ask(request, "", apply, fate=fate)

    def _bear(self, contract_id: str, parent: int | None, node: int, fate: Fate | None) -> None:
        family = [it for it in self.model.workers.values() if it.contract_id == contract_id and it.live]
        parent_id = "" if parent is None or not family else pick(family, parent).worker_id
        before = len(self.model.manifests)
        self._issue(contract_id, parent_id, None, None)
        if len(self.model.manifests) > before:
            it = list(self.model.manifests.values())[-1]
            self._register(it, self.signed[it.manifest_id], node, fate, genuine=True)

    @precondition(lambda self: self.model.contracts)
    @rule(
        contract=picks,
        parent=st.sampled_from(["none", "own", "own", "own", "any", "unknown"]),
        number=picks,
        depth=st.sampled_from([None, None, 0, 2]),
        fate=fates,
    )
    def issue(self, contract: int, parent: str, number: int, depth: int | None, fate: Fate | None) -> None:
        """Ask for a manifest: for a root or a child, at any depth, also of another's or of nobody."""
        contract_id = self._contract(contract).contract_id
        parent_id = "0123456789abcdef" if parent == "unknown" else ""
        family = [
            it for it in self.model.workers.values() if parent == "any" or it.contract_id == contract_id
        ]
        if parent in ("own", "any") and family:
            parent_id = pick(family, number).worker_id
        self._issue(contract_id, parent_id, depth, fate)

    @precondition(lambda self: self.model.contracts and self.up)
    @rule(contract=picks, parents=st.lists(st.none() | picks, min_size=2, max_size=5))
    def issue_many(self, contract: int, parents: list[int | None]) -> None:
        """Ask for several births at the same moment: each is decided as if alone, in turn."""
        contract_id, now_us = self._contract(contract).contract_id, self.now_us
        family = [it.worker_id for it in self.model.workers.values() if it.contract_id == contract_id]
        requests, due, promised = [], [], []
        for number in parents:
            parent_id = "" if number is None or not family else pick(family, number)
            request = self._issue_request(contract_id, parent_id, None)
            requests.append(request)
            due.append(self.model.refuse_issue(contract_id, parent_id, None, now_us))
            name = request.request_id
            promised.append(None if due[-1] else self.model.issue(contract_id, parent_id, now_us, name))
        answers = self.world.run(self.world.call_all(requests))
        for answer, refusal, manifest in zip(answers, due, promised, strict=True):
            assert _reason(answer) == refusal, f"{answer!r} where {refusal or 'no refusal'} was due"
            if manifest is not None:
                self._take(answer.manifest, manifest)

    @precondition(lambda self: self.model.manifests)
    @rule(manifest=picks, node=picks, fate=fates)
    def register(self, manifest: int, node: int, fate: Fate | None) -> None:
        """Present a manifest: in time, late, again, or after whatever has happened since."""
        it = pick(list(self.model.manifests.values()), manifest)
        self._register(it, self.signed[it.manifest_id], node, fate, genuine=True)

    @precondition(lambda self: self.model.manifests)
    @rule(manifest=picks, node=picks, tampered=st.sampled_from(TAMPERED))
    def register_forgery(self, manifest: int, node: int, tampered: str) -> None:
        """Present a manifest that was changed since it was signed."""
        it = pick(list(self.model.manifests.values()), manifest)
        forged = resources_pb2.Manifest()
        forged.CopyFrom(self.signed[it.manifest_id])
        match tampered:
            case "signature":
                forged.signature = bytes(32)
            case "depth":
                forged.depth += 1
            case "epoch":
                forged.epoch = self.model.epoch(it.contract_id, it.parent_id) + 1
            case "contract":
                forged.contract_id = "0123456789abcdef"
            case "parent":
                forged.parent_id = "" if it.parent_id else "0123456789abcdef"
            case _:
                forged.expire_time.seconds += 3_600
        self._register(it, forged, node, None, genuine=False)

    @precondition(lambda self: self.model.manifests and self.up)
    @rule(manifest=picks, count=st.integers(2, 3))
    def register_at_once(self, manifest: int, count: int) -> None:
        """Present copies of one manifest at the same moment, on every node: one birth at most."""
        it = pick(list(self.model.manifests.values()), manifest)
        nodes = [node for node in self.world.nodes.values() if node.connected]
        if not nodes:
            return
        used = [nodes[index % len(nodes)] for index in range(count)]
        requests = [self._register_request(self.signed[it.manifest_id], node) for node in used]
        now_us = self.now_us
        due = []
        for node in used:
            due.append(self.model.refuse_register(it, now_us, genuine=True))
            if not due[-1]:
                self.model.register(it, node.node_id, now_us)
        answers = self.world.run(self.world.call_all(requests))
        assert [_reason(answer) for answer in answers] == due
        for node, answer in zip(used, answers, strict=True):
            if isinstance(answer, pb.RegisterWorkerResponse):
                node.launch(answer.worker, self.model.workers[it.worker_id].path)

    @precondition(lambda self: self.answers)
    @rule(answer=picks, changed=st.sampled_from([False, False, True]))
    def ask_again(self, answer: int, changed: bool) -> None:
        """Make a call again that was answered: the answer is the same, unless the call is another."""
        request, before = pick(self.answers, answer)
        if changed:
            other = self._issue_request(self._contract(answer).contract_id, "", 7)
            other.request_id = request.request_id
            self.ask(other, "REQUEST_ID_REUSED", lambda _: None)
            return
        due = self._refuse_again(request)
        again = self.world.run(self.world.try_call(request))
        if isinstance(again, HayflickError):
            assert again.reason_name == due or (
                not due and not self.up and again.reason_name == "AUDIT_UNAVAILABLE"
            ), f"{again!r} where {due or 'the same answer'} was due"
            return
        assert not due, f"an answer where {due} was due"
        assert again == before

    @precondition(lambda self: self.model.contracts)
    @rule(
        contract=picks, what=st.sampled_from(["rotate", "revoke", "revoke old"]), manifest=picks, fate=fates
    )
    def turn_key(self, contract: int, what: str, manifest: int, fate: Fate | None) -> None:
        """Sign with another key from now on; and perhaps refuse what one before has signed."""
        it = self._contract(contract)
        request_id, key_id = self.world.request_id(), it.key_id
        if what == "rotate":
            rotation = pb.RotateKeyRequest(
                request_id=request_id, contract_id=it.contract_id, reason="routine"
            )
            self.ask(rotation, "", lambda _: self._learn_key(it), fate=fate, acts=True)
            return
        if what == "revoke old" and self.model.manifests:
            key_id = pick(list(self.model.manifests.values()), manifest).key_id

        def apply(_: object) -> None:
            self.model.revoked.add(key_id)
            for other in self.model.contracts.values():
                if other.key_id == key_id:
                    self._learn_key(other)

        revocation = pb.RevokeKeyRequest(request_id=request_id, key_id=key_id, reason="leaked")
        self.ask(revocation, "", apply, fate=fate, acts=True)

    def _contract(self, number: int) -> Contract:
        return pick(list(self.model.contracts.values()), number)

    def _learn_key(self, contract: Contract) -> None:
        request = pb.GetContractRequest(contract_id=contract.contract_id)
        key_id = self.world.run(self.world.call(request)).contract.key_id
        assert key_id != contract.key_id, "another key was due"
        contract.key_id = key_id

    def _issue_request(self, contract_id: str, parent_id: str, depth: int | None) -> pb.IssueManifestRequest:
        return pb.IssueManifestRequest(
            request_id=self.world.request_id(),
            contract_id=contract_id,
            parent_id=parent_id,
            depth=depth,
            resources=None if parent_id else RESOURCES,
        )

    def _issue(self, contract_id: str, parent_id: str, depth: int | None, fate: Fate | None) -> None:
        request, now_us = self._issue_request(contract_id, parent_id, depth), self.now_us
        refusal = self.model.refuse_issue(contract_id, parent_id, depth, now_us)

        def apply(answer: pb.IssueManifestResponse) -> None:
            promised = self.model.issue(contract_id, parent_id, now_us, request.request_id)
            self._take(answer.manifest, promised)
            self.require_recorded(decision="replication_requested", worker_id=promised.worker_id)

        self.ask(request, refusal, apply, fate=fate)

    def _take(self, signed: resources_pb2.Manifest, promised: Manifest) -> None:
        """See that a manifest says what was foreseen; keep it under its own name."""
        assert (signed.contract_id, signed.parent_id, signed.depth, signed.epoch, signed.key_id) == (
            promised.contract_id,
            promised.parent_id,
            promised.depth,
            promised.epoch,
            promised.key_id,
        )
        assert signed.issue_time.ToMicroseconds() == promised.issue_us
        assert signed.expire_time.ToMicroseconds() == promised.expire_us
        del self.model.manifests[promised.manifest_id]
        assert signed.manifest_id not in self.signed, "a manifest was issued twice"
        promised.manifest_id, promised.worker_id = signed.manifest_id, signed.worker_id
        self.model.manifests[promised.manifest_id] = promised
        self.signed[promised.manifest_id] = signed

    def _register_request(self, signed: resources_pb2.Manifest, node: Node) -> pb.RegisterWorkerRequest:
        return pb.RegisterWorkerRequest(
            request_id=self.world.request_id(), manifest=signed, node_id=node.node_id, session=node.session
        )

    def _ask_for_birth(self, it: Manifest, node: Node, request: pb.RegisterWorkerRequest) -> None:
        """Ask again for a birth whose answer was lost, in the session that the node has now."""
        request.session = node.session
        due = self._refuse_again(request)
        answer = self.world.run(self.world.try_call(request))
        assert _reason(answer) == due, f"{answer!r} where {due or 'an answer'} was due"
        if not due:
            node.launch(answer.worker, self.model.workers[it.worker_id].path)

    def _refuse_again(self, request: Any) -> str:
        """Return why an answered call is refused when it comes again; "" when it gets its answer.

        A node acts on the answer to a registration, so it must still be true.
        """
        if not isinstance(request, pb.RegisterWorkerRequest):
            return ""
        node = self.world.nodes[request.node_id]
        if not node.connected or request.session != node.session:
            return "NODE_SESSION_INVALID"
        worker = self.model.workers[request.manifest.worker_id]
        return "" if worker.live and worker.state != STOPPING else "WORKER_NOT_RUNNING"

    def _register(
        self,
        it: Manifest,
        signed: resources_pb2.Manifest,
        number: int,
        fate: Fate | None,
        *,
        genuine: bool,
    ) -> None:
        node, now_us = pick(list(self.world.nodes.values()), number), self.now_us
        refusal = "NODE_SESSION_INVALID"
        if node.connected:
            refusal = self.model.refuse_register(it, now_us, genuine=genuine)
        request, born = self._register_request(signed, node), []

        def apply(answer: pb.RegisterWorkerResponse | None) -> None:
            born.append(self.model.register(it, node.node_id, now_us))
            if answer is None:
                return  # the controller died, and its successor does not know the node yet
            self.require_recorded(event="worker_registered", worker_id=it.worker_id)
            assert answer.worker.worker_id == it.worker_id
            assert answer.terms.max_replicas == self.model.contracts[it.contract_id].max_replicas
            node.launch(answer.worker, born[0].path)

        node.births.add(it.worker_id)
        answer = self.ask(request, refusal, apply, fate=fate)
        if born and answer is None and node.connected:
            self._ask_for_birth(it, node, request)
        node.births.discard(it.worker_id)
        if not refusal and not born and it.worker_id in self.world.workers():
            # It could not be recorded in time, and was ended meanwhile by something
            # else, which keeps it: it was no longer there to be undone.
            assert not self.up, "a birth that was refused is registered"
            self.model.register(it, node.node_id, now_us)


def _reason(answer: object) -> str:
    return answer.reason_name if isinstance(answer, HayflickError) else ""
