"""What a warm fork brings along: nothing that belongs to a sister."""

from __future__ import annotations

import hashlib
import json
import secrets
from typing import TYPE_CHECKING, Any

from hayflick.v1 import controller_pb2
from hayflick.v1 import orchestrator_pb2 as opb
from hayflick.v1.resources_pb2 import NetworkPolicy, Resources, Worker

from .conftest import MIB, Stack, call, request_id

if TYPE_CHECKING:
    from collections.abc import Callable

ID_DIGITS = 16
MARK = "canary-"
MARK_DIGITS = 24


def digest(word: str) -> str:
    """Return what stands for a word, so that asking for it does not put it into anybody's memory."""
    return hashlib.sha256(word.encode()).hexdigest()


def searcher(prefix: str, digits: int) -> Callable[[Any], list[str]]:
    """Return a task that finds *digits* hexadecimal digits after *prefix*, wherever its process may write."""

    def search(worker: Any) -> list[str]:
        import ctypes
        import re
        from pathlib import Path

        # Overlapping, so that an identity inside a longer number is found too.
        pattern = re.compile(b"(?=(%s[0-9a-f]{%d}))" % (prefix.encode(), digits))
        found = set()
        for line in Path("/proc/self/maps").read_text().splitlines():
            addresses, rights = line.split()[:2]
            # What it may not write came from files, or is the kernel's.
            if rights.startswith("rw"):
                start, end = (int(number, 16) for number in addresses.split("-"))
                found |= set(pattern.findall(ctypes.string_at(start, end - start)))
        return sorted(hashlib.sha256(word).hexdigest() for word in found)

    return search


def launch(stack: Stack, canary: str, contract_id: str, parent_id: str = "") -> Worker:
    """Return a worker with *canary* in its snapshot, in its task's environment and in its task's argv."""
    asked = controller_pb2.IssueManifestRequest(
        request_id=request_id(),
        contract_id=contract_id,
        parent_id=parent_id,
        state_snapshot_json=json.dumps({"secret": canary}),
        resources=Resources(
            cpu_millis=1_000, memory_limit_bytes=64 * MIB, network=NetworkPolicy(allow_controller=True)
        ),
    )
    manifest = stack.controller.IssueManifest(asked).manifest
    request = opb.LaunchWorkerRequest(request_id=request_id(), manifest=manifest)
    worker = stack.orchestrator.LaunchWorker(request).worker
    command = opb.Command(argv=["/bin/sh", "-c", f": {canary}"], environment={"SECRET": canary})
    assert stack.run(worker, opb.Task(command=command)).outcome == "SUCCEEDED"
    own = json.loads(stack.run(worker, call(lambda worker: worker.manifest.state_snapshot)).result.value_json)
    assert own == {"secret": canary}
    return worker


def test_no_worker_finds_a_sister_in_its_memory(own_stack: Stack) -> None:
    """Identity, contract, family, environment and snapshot of earlier workers are in no later memory."""
    stack = own_stack
    canaries = [MARK + secrets.token_hex(MARK_DIGITS // 2) for _ in range(5)]
    sisters = []
    for canary in canaries[:-1]:
        root = launch(stack, canary, stack.contract())
        sisters += [root, launch(stack, canary, root.contract_id, root.worker_id)]
    stack.stop(sisters[0])  # what was freed is memory too
    curious = launch(stack, canaries[-1], stack.contract())
    ids = json.loads(stack.run(curious, call(searcher("", ID_DIGITS))).result.value_json)
    marks = json.loads(stack.run(curious, call(searcher(MARK, MARK_DIGITS))).result.value_json)
    # The search finds what is there: its own.
    assert digest(curious.worker_id) in ids
    assert digest(canaries[-1]) in marks
    assert not {digest(canary) for canary in canaries[:-1]} & set(marks)
    foreign = {sister.worker_id for sister in sisters} | {sister.contract_id for sister in sisters}
    foreign |= {sister.manifest.manifest_id[:ID_DIGITS] for sister in sisters}
    assert not [name for name in foreign if digest(name) in ids]
