"""Attacks on the record and on what a kill says of itself, judged by the log's public key alone."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from ..table import Row
from ..tools import Facts, Verdict, syscall, verdict
from .lifecycle import ALIVE_AFTER_INIT, call_service, daemon

if TYPE_CHECKING:
    from ..arena import Arena

DENIALS = 400
# The first of a class at once, then one a second: services/hayflick_orchestrator/tripwires.py.
TOLD_AT_ONCE = 10
FORGED = '{"event":"worker_killed","worker_id":"%s","source":"controller/forged"}'


def reach_records(facts: Facts) -> Verdict:
    """Open the logger's journal, and connect to the logger."""
    import errno
    import socket

    tries = {}
    for path in facts["records"]:
        try:
            os.close(os.open(path, os.O_RDONLY))
            tries[path] = "ok"
        except OSError as error:
            tries[path] = errno.errorcode[error.errno or 0]
    for path in facts["sockets"]:
        with socket.socket(socket.AF_UNIX) as sock:
            tries[path] = errno.errorcode.get(sock.connect_ex(path), "ok")
    return verdict(set(tries.values()) == {"ENOENT"}, ", ".join(sorted(set(tries.values()))))


def survive_the_kill_switch(arena: Arena, words: tuple[str, ...]) -> Verdict:
    """Have a family with daemons survive its kill switch, or be called dead by a receipt that lies."""
    import hashlib
    import json

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    contract, nonce = arena.stack.contract(), arena.nonce()
    root = arena.launch(words, contract_id=contract)
    child = arena.launch(words, contract_id=contract, parent_id=root.worker_id)
    for worker in (root, child):
        arena.begin(worker, daemon(nonce, 2))
    there = len(arena.called(nonce, 4))
    answer = arena.stack.kill(contract_id=contract)
    left = arena.gone(nonce, 0.1)
    ids = {root.worker_id, child.worker_id}
    reasons = {arena.stack.end_reason(worker_id) for worker_id in ids}
    receipt, text = answer.receipt, answer.receipt.document_json.encode()
    told = hashlib.sha256(text).hexdigest()
    entries = arena.log_with(lambda one: one["details"].get("receipt_sha256") == told)
    keys = {one["details"]["receipt_public_key"] for one in entries if one["event"] == "controller_started"}
    # Whoever checks it takes the key from the log; the answer's own is worth nothing.
    (key,) = keys
    Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(receipt.signature, text)
    document = json.loads(text)
    dead = {one["worker_id"] for one in document["dead"]}
    empty = [node["unpopulated"] for node in document["nodes"]]
    milliseconds = document["elapsed_seconds"] * 1_000
    held = (
        there == 4
        and not left
        and reasons == {"KILL_SWITCH"}
        and (dead, document["unconfirmed"], document["scope"]) == (ids, [], f"contract/{contract}")
        and (all(empty) or not arena.kills)
    )
    return verdict(
        held,
        f"{there} daemons before, {len(left)} after; {', '.join(reasons)} in {milliseconds:.0f} ms; receipt "
        f"signed and in the log: {len(dead)} dead, control group empty: {empty}",
    )


def flood(facts: Facts) -> Verdict:
    """Ask for what is refused and seen, again and again, each time the same."""
    answers = {syscall(facts, "ptrace", 0x4206, 1, 0, 0) for _ in range(DENIALS)}
    return verdict(answers == {"EPERM"}, ", ".join(sorted(answers)))


def write_the_record(facts: Facts) -> Verdict:
    """Write entries of one's own: by output, by the words of a call, by what an exception says."""
    forged = FORGED % facts["worker_id"]
    text = f"\n{forged}\n\x1b[2J\x1b]0;owned\x07\r{forged}\u2028"
    os.write(1, text.encode())
    os.write(2, text.encode())
    tries = {
        "a child": call_service("Replicate", {"request_id": "escape", "reason": text[:200]}),
        "a method": call_service(text[:60], {}),
        "a sister": call_service("Shutdown", {"request_id": "escape", "worker_id": text[:200]}),
    }
    return verdict(True, ", ".join(f"{k}: {v.get('reason', v['type'])}" for k, v in tries.items()))


def falsify_the_record(arena: Arena, words: tuple[str, ...]) -> Verdict:
    """Flood the record with denials, write false entries into it, and keep true ones out or waiting."""
    contract = arena.stack.contract(max_replicas=1)  # itself: each child is refused, and that is on record
    worker = arena.launch(words, contract_id=contract, network={"allow_controller": True})
    more = {"worker_id": worker.worker_id}
    # Where a worker is not filtered, nothing of it is denied; then it floods nothing.
    floods = arena.attack(worker, {"flood": flood, "write": write_the_record}, more)
    assert all("error" not in one for one in floods.values()), floods
    mine = {"worker_id": worker.worker_id}
    # While it lives: a record that waits for the end of whom it accuses is too late.
    alive = worker.worker_id in arena.stack.sandboxes()
    entries = arena.log_with(
        lambda one: one.get("contract_id") == contract and one["details"].get("decision") == "deny_quota"
    )
    began = time.monotonic()
    arena.stack.stop(worker)
    entries = arena.log_with(lambda one: one["event"] == "worker_shutdown" and mine.items() <= one.items())
    seconds = time.monotonic() - began
    own = [one for one in entries if mine.items() <= one.items()]
    sources = {str(one["source"]).partition("/")[0] for one in own}
    told = [one for one in own if one["event"] == "denial"]
    left_out = sum(sum(one["details"].get("left_out", {}).values()) for one in told)
    said = sum("call" in one["details"] for one in told)
    forged = [
        one for one in entries if one["source"] == "controller/forged" or one["event"] == "worker_killed"
    ]
    held = (
        alive
        and sources == {"controller", "orchestrator"}
        and not forged
        and said + left_out == DENIALS
        and TOLD_AT_ONCE <= said <= TOLD_AT_ONCE * 3
    )
    return verdict(
        held,
        f"of {DENIALS} denials {said} told and {left_out} counted; {len(forged)} forged of "
        f"{len(entries)} signed; sources {', '.join(sorted(sources))}; its end told in {seconds:.1f} s",
    )


ROWS = [
    Row(
        68,
        survive_the_kill_switch,
        ("cgroup.kill", "pid namespace"),
        ALIVE_AFTER_INIT,
        where="outside",
        hole=r"4 daemons before, [1-4] after",
        limits_of_it="the receipt names each worker and what the kernel calls empty, not each process",
    ),
    Row(69, reach_records, ("mounts",), ("canary-readable", "canary-owned"), hole="ok"),
    Row(
        69,
        falsify_the_record,
        ("rate limits of the node", "entries that only services write"),
        ("tell-every-denial",),
        where="outside",
        needs=("tripwire",),
        hole=f"of {DENIALS} denials {DENIALS} told and 0 counted",
    ),
]
