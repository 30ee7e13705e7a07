"""Hayflick's SDK: workers that may replicate themselves, under a contract and in a sandbox.

::

    contract = ReplicationContract(max_depth=2, max_replicas=5, cooldown_seconds=0.5)
    controller = Controller(contract, secret="my-secret-key")
    orchestrator = SandboxOrchestrator()
    manifest = controller.issue_manifest(None, 0, {}, ResourceSpec(0.5, 256))
    with Worker(manifest, contract, controller, orchestrator) as root:
        root.perform_task(lambda worker: print("hello from", worker.worker_id))

Without addresses the services are started for this program and stopped with it.

Names are imported when they are first used (:pep:`562`): every sandbox imports
this package, and must not pay for gRPC, which it does not use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from replication.contract import (
        DenialClass,
        FamilyBudget,
        Manifest,
        NetworkPolicy,
        Predicate,
        ReplicationContext,
        ReplicationContract,
        ResourceSpec,
        StopCondition,
        Tripwire,
        TripwireScope,
    )
    from replication.controller import Controller, KillSwitchResult, Lineage, RegistryEntry
    from replication.errors import (
        HayflickError,
        InternalError,
        InvalidField,
        JournalCorrupt,
        LimitNotEnforceable,
        NodeFull,
        NotAllowed,
        NotFound,
        NotPicklable,
        PythonVersionMismatch,
        ReplicationDenied,
        SandboxFailed,
        ServiceUnavailable,
        TaskError,
        TaskFailed,
        TaskKilled,
        TaskTimeout,
        TooLarge,
        WorkerEnded,
    )
    from replication.observability import JournalCheck, Metric, StructuredLogger
    from replication.orchestrator import ContainerRecord, Evidence, FileSummary, SandboxOrchestrator
    from replication.signer import ManifestSigner
    from replication.worker import EndReason, Stage, Usage, Worker, WorkerExit, WorkerState

__all__ = [
    "ContainerRecord",
    "Controller",
    "DenialClass",
    "EndReason",
    "Evidence",
    "FamilyBudget",
    "FileSummary",
    "HayflickError",
    "InternalError",
    "InvalidField",
    "JournalCheck",
    "JournalCorrupt",
    "KillSwitchResult",
    "LimitNotEnforceable",
    "Lineage",
    "Manifest",
    "ManifestSigner",
    "Metric",
    "NetworkPolicy",
    "NodeFull",
    "NotAllowed",
    "NotFound",
    "NotPicklable",
    "Predicate",
    "PythonVersionMismatch",
    "RegistryEntry",
    "ReplicationContext",
    "ReplicationContract",
    "ReplicationDenied",
    "ResourceSpec",
    "SandboxFailed",
    "SandboxOrchestrator",
    "ServiceUnavailable",
    "Stage",
    "StopCondition",
    "StructuredLogger",
    "TaskError",
    "TaskFailed",
    "TaskKilled",
    "TaskTimeout",
    "TooLarge",
    "Tripwire",
    "TripwireScope",
    "Usage",
    "Worker",
    "WorkerEnded",
    "WorkerExit",
    "WorkerState",
]

# Where each name lives, but for errors, which are most of them.
_HOMES = {
    **dict.fromkeys(
        (
            "DenialClass",
            "FamilyBudget",
            "Manifest",
            "NetworkPolicy",
            "Predicate",
            "ReplicationContext",
            "ReplicationContract",
            "ResourceSpec",
            "StopCondition",
            "Tripwire",
            "TripwireScope",
        ),
        "contract",
    ),
    **dict.fromkeys(("Controller", "KillSwitchResult", "Lineage", "RegistryEntry"), "controller"),
    **dict.fromkeys(("JournalCheck", "Metric", "StructuredLogger"), "observability"),
    **dict.fromkeys(("ContainerRecord", "Evidence", "FileSummary", "SandboxOrchestrator"), "orchestrator"),
    **dict.fromkeys(("EndReason", "Stage", "Usage", "Worker", "WorkerExit", "WorkerState"), "worker"),
    "ManifestSigner": "signer",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'replication' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"replication.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value  # the next time it is simply there
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
