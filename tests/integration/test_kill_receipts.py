"""What a kill tells, what it waits for, and what ends workers when nobody can order it."""

from __future__ import annotations

import hashlib
import json
import signal
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc
import pytest
import rfc8785
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from hayflick.v1 import controller_pb2, logger_pb2

from .conftest import Stack, duration, info_of, reason_of, request_id, running_stack, shell, until
from .test_orchestrator_kill import STUBBORN, processes_of, uids

if TYPE_CHECKING:
    from hayflick.v1.resources_pb2 import Worker


def engage(stack: Stack, contract_id: str, **fields: object) -> controller_pb2.EngageKillSwitchResponse:
    """Engage the kill switch of a contract."""
    request = controller_pb2.EngageKillSwitchRequest(
        request_id=request_id(),
        scope=controller_pb2.Scope(contract_id=contract_id),
        reason="test",
        **fields,  # type: ignore[arg-type]
    )
    return stack.controller.EngageKillSwitch(request)


def details_of(stack: Stack, name: str, decision: str = "", contract_id: str = "") -> dict[str, object]:
    """Return the details of the newest event of that name, decision and contract, once there is one."""

    def found() -> dict[str, object] | None:
        wanted = logger_pb2.EventFilter(events=[name], contract_id=contract_id)
        request = logger_pb2.ListEventsRequest(filter=wanted, page_size=1_000)
        all_ = [dict(recorded.event.details) for recorded in stack.logger.ListEvents(request).events]
        chosen = [one for one in all_ if not decision or one.get("decision") == decision]
        return chosen[-1] if chosen else None

    details: dict[str, object] = until(found)
    return details


def test_a_kill_answers_with_a_receipt_that_anyone_can_check(stack: Stack) -> None:
    """The receipt is canonical JSON, signed by the key in the log, and says how each worker was seen dead."""
    contract = stack.contract()
    parent = stack.launch(contract)
    workers = [parent, stack.launch(contract, parent.worker_id), stack.launch(contract)]
    answer = engage(stack, contract)
    receipt = answer.receipt
    document = json.loads(receipt.document_json)
    assert rfc8785.dumps(document) == receipt.document_json.encode()
    started = details_of(stack, "controller_started")
    assert (started["receipt_key_id"], started["receipt_public_key"]) == (
        receipt.key_id,
        receipt.public_key.hex(),
    )
    key = Ed25519PublicKey.from_public_bytes(receipt.public_key)
    key.verify(receipt.signature, receipt.document_json.encode())
    with pytest.raises(InvalidSignature):
        key.verify(receipt.signature, receipt.document_json.replace('"running":3', '"running":2').encode())
    assert (document["scope"], document["epoch"], document["running"]) == (f"contract/{contract}", 1, 3)
    assert {one["worker_id"] for one in document["dead"]} == {worker.worker_id for worker in workers}
    assert document["unconfirmed"] == []
    (node,) = document["nodes"]
    assert (node["node_id"], node["confirmed"], node["error"]) == (stack.node_id, 3, "")
    assert node["unpopulated"] == (answer.nodes[0].unpopulated)
    assert 0 < node["last_death_seconds"] <= node["elapsed_seconds"] <= document["elapsed_seconds"]
    logged = details_of(stack, "audit", "kill_switch_confirmed", contract)
    assert logged["receipt_sha256"] == hashlib.sha256(receipt.document_json.encode()).hexdigest()


@pytest.mark.root
def test_a_receipt_has_the_kernels_word(stack: Stack) -> None:
    """The kernel says that the contract's control group is empty, also after workers that fork and hang."""
    contract = stack.contract()
    for script in STUBBORN.values():
        stack.begin(stack.launch(contract, cpu_millis=100), shell(script))
    answer = engage(stack, contract)
    assert [(node.unpopulated, node.confirmed_count) for node in answer.nodes] == [(True, len(STUBBORN))]
    assert json.loads(answer.receipt.document_json)["nodes"][0]["unpopulated"] is True


def test_a_receipt_lists_what_it_could_not_see_dead(own_stack: Stack) -> None:
    """A node that does not answer leaves its workers unconfirmed, in the receipt too, and under pursuit."""
    stack = own_stack
    contract = stack.contract()
    worker = stack.launch(contract)
    orchestrator = stack.processes["orchestrator"]
    orchestrator.send_signal(signal.SIGSTOP)
    try:
        answer = engage(stack, contract, timeout=duration(0.5))
    finally:
        orchestrator.send_signal(signal.SIGCONT)
    document = json.loads(answer.receipt.document_json)
    assert ([one["worker_id"] for one in document["unconfirmed"]], document["dead"]) == (
        [worker.worker_id],
        [],
    )
    assert document["nodes"][0]["error"] == "did not confirm in time"
    assert document["nodes"][0]["unpopulated"] is False
    assert stack.end_reason(worker.worker_id) == "KILL_SWITCH"


def test_a_slot_is_good_again_as_soon_as_the_switch_is_released(stack: Stack) -> None:
    """What the dead left in the kernel is waited for: no birth is refused for what is being cleared away."""
    contract = stack.contract(max_replicas=8)
    for _ in range(3):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: stack.launch(contract, cpu_millis=100), range(8)))
        assert len(engage(stack, contract).worker_ids) == 8
        release = controller_pb2.ReleaseKillSwitchRequest(
            request_id=request_id(), scope=controller_pb2.Scope(contract_id=contract), reason="again"
        )
        stack.controller.ReleaseKillSwitch(release)
    stack.stop(stack.launch(contract))


def test_a_kill_with_grace_lets_tasks_end_by_themselves(stack: Stack) -> None:
    """Tasks hear SIGTERM first; one that heeds it ends in order, one that does not is killed afterwards."""
    contract = stack.contract()
    polite, stubborn = stack.launch(contract), stack.launch(contract)
    heard = stack.begin(polite, shell("trap 'echo bye; exit 0' TERM; echo x; while :; do sleep 0.1; done"))
    deaf = stack.begin(stubborn, shell(STUBBORN["ignores"]))
    started = time.monotonic()
    answer = engage(stack, contract, grace=duration(1.5))
    assert time.monotonic() - started >= 1.5
    assert set(answer.worker_ids) == {polite.worker_id, stubborn.worker_id}
    printed = b"".join(response.output.data for response in heard if response.HasField("output"))
    assert b"bye" in printed
    deaf.cancel()
    for worker in (polite, stubborn):
        assert stack.end_reason(worker.worker_id) == "KILL_SWITCH"


def test_nothing_is_born_during_the_grace(stack: Stack) -> None:
    """The latch is down before the grace begins."""
    contract = stack.contract()
    worker = stack.launch(contract)
    stream = stack.begin(worker, shell(STUBBORN["ignores"]))
    with ThreadPoolExecutor(1) as pool:
        killing = pool.submit(engage, stack, contract, grace=duration(2))
        until(lambda: _refused(stack, contract))
        assert not killing.done()
        killing.result(20)
    stream.cancel()


def _refused(stack: Stack, contract: str) -> bool:
    try:
        stack.manifest(contract)
    except grpc.RpcError as error:
        return reason_of(error) == "KILL_SWITCH_ENGAGED"
    return False


def test_a_stopped_orchestrator_loses_its_workers_with_its_lease() -> None:
    """An orchestrator that somebody stopped cannot keep its lease; its zygote does, and says so later."""
    with running_stack(controller={"lease-seconds": "2"}) as stack:
        worker = stack.launch()
        stack.begin(worker, shell(STUBBORN["forks"]))
        (uid,) = uids(stack, worker)
        orchestrator = stack.processes["orchestrator"]
        orchestrator.send_signal(signal.SIGSTOP)
        stopped_at = time.monotonic()
        try:
            until(lambda: processes_of(uid) == [], seconds=20)
            assert time.monotonic() - stopped_at >= 0.5  # not at once: the lease was good
            assert stack.end_reason(worker.worker_id) == "NODE_LOST"
        finally:
            orchestrator.send_signal(signal.SIGCONT)
        # It lives on, reconciled, and its zygote forks again.
        until(lambda: stack.controller.ListNodes(controller_pb2.ListNodesRequest()).nodes)
        stack.stop(until(lambda: _launched(stack)))


def _launched(stack: Stack) -> Worker | None:
    try:
        return stack.launch()
    except grpc.RpcError:
        return None


def test_workers_are_lost_only_after_they_must_be_dead() -> None:
    """The controller takes a silent node's workers for lost later than the node's own lease ended them."""
    with running_stack(controller={"lease-seconds": "2"}) as stack:
        worker = stack.launch()
        (uid,) = uids(stack, worker)
        orchestrator = stack.processes["orchestrator"]
        orchestrator.send_signal(signal.SIGSTOP)
        try:
            until(lambda: stack.worker(worker.worker_id).HasField("exit"), seconds=20)
            assert processes_of(uid) == []
        finally:
            orchestrator.send_signal(signal.SIGCONT)


def test_a_kill_works_while_the_database_is_away(own_stack: Stack) -> None:
    """Nodes are told to kill although the latch cannot be set; it is set when the database returns."""
    stack = own_stack
    contract = stack.contract()
    worker = stack.launch(contract)
    (uid,) = uids(stack, worker)
    identity = request_id()
    request = controller_pb2.EngageKillSwitchRequest(
        request_id=identity, scope=controller_pb2.Scope(contract_id=contract), reason="test"
    )
    blocker = sqlite3.connect(stack.directory / "controller" / "controller.db", isolation_level=None)
    try:
        blocker.execute("BEGIN EXCLUSIVE")
        with pytest.raises(grpc.RpcError) as caught:
            stack.controller.EngageKillSwitch(request)
        info = info_of(caught.value)
        assert (info.reason, info.metadata["service"]) == ("SERVICE_UNAVAILABLE", "database")
        assert info.metadata["dead_count"] == "1"
        assert processes_of(uid) == []
    finally:
        blocker.rollback()
        blocker.close()
    until(lambda: _refused(stack, contract))
    assert stack.controller.EngageKillSwitch(request).kill_switch.engaged
    assert stack.end_reason(worker.worker_id) == "KILL_SWITCH"


def test_what_a_killed_orchestrator_noted_is_recorded_by_the_next(own_stack: Stack) -> None:
    """Events that the logger could not take are on disk, and delivered once by the node's next start."""
    stack = own_stack
    worker = stack.launch()
    stack.processes["logger"].send_signal(signal.SIGSTOP)
    try:
        ran = stack.run(worker, shell("echo hello"), keep=True)
        assert ran.stdout == b"hello\n"
        stack.processes["orchestrator"].send_signal(signal.SIGKILL)
        stack.processes["orchestrator"].wait(20)
    finally:
        stack.processes["logger"].send_signal(signal.SIGCONT)
    stack.processes.pop("orchestrator").stdout.close()  # type: ignore[union-attr]
    outbox = stack.directory / "orchestrator" / "outbox"
    assert len(list(outbox.glob("*.events"))) == 1
    stack.start("orchestrator")
    until(lambda: stack.events(worker.worker_id).count("task_finished") == 1)
    until(lambda: len(list(outbox.glob("*.events"))) == 1)  # the new boot's own
