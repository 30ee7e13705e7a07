"""Who may call what, as data.

A service listens on a Unix socket in a directory that only its own user can
enter: whoever can open the socket is ``LOCAL``. A worker is never local; it
reaches its WorkerService on a line of its own, and that line is what makes it
``WORKER``.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping


class Role(enum.Enum):
    """What a caller is to the service it calls."""

    LOCAL = "local"
    WORKER = "worker"


_LOCAL = frozenset({Role.LOCAL})
_WORKER = frozenset({Role.WORKER})

TABLE: Mapping[str, frozenset[Role]] = {
    "/hayflick.v1.ControllerService/CreateContract": _LOCAL,
    "/hayflick.v1.ControllerService/GetContract": _LOCAL,
    "/hayflick.v1.ControllerService/ListContracts": _LOCAL,
    "/hayflick.v1.ControllerService/IssueManifest": _LOCAL,
    "/hayflick.v1.ControllerService/RegisterWorker": _LOCAL,
    "/hayflick.v1.ControllerService/DeregisterWorker": _LOCAL,
    "/hayflick.v1.ControllerService/ConnectNode": _LOCAL,
    "/hayflick.v1.ControllerService/ListNodes": _LOCAL,
    "/hayflick.v1.ControllerService/GetWorker": _LOCAL,
    "/hayflick.v1.ControllerService/ListWorkers": _LOCAL,
    "/hayflick.v1.ControllerService/WatchWorkers": _LOCAL,
    "/hayflick.v1.ControllerService/GetLineage": _LOCAL,
    "/hayflick.v1.ControllerService/QuarantineWorker": _LOCAL,
    "/hayflick.v1.ControllerService/ReleaseQuarantine": _LOCAL,
    "/hayflick.v1.ControllerService/EngageKillSwitch": _LOCAL,
    "/hayflick.v1.ControllerService/ReleaseKillSwitch": _LOCAL,
    "/hayflick.v1.ControllerService/ReapStaleWorkers": _LOCAL,
    "/hayflick.v1.ControllerService/NarrowNetwork": _LOCAL,
    "/hayflick.v1.ControllerService/RotateKey": _LOCAL,
    "/hayflick.v1.ControllerService/RevokeKey": _LOCAL,
    "/hayflick.v1.ControllerService/ListKeys": _LOCAL,
    "/hayflick.v1.OrchestratorService/LaunchWorker": _LOCAL,
    "/hayflick.v1.OrchestratorService/RunTask": _LOCAL,
    "/hayflick.v1.OrchestratorService/StopWorker": _LOCAL,
    "/hayflick.v1.OrchestratorService/ListSandboxes": _LOCAL,
    "/hayflick.v1.OrchestratorService/PutFile": _LOCAL,
    "/hayflick.v1.OrchestratorService/GetFile": _LOCAL,
    "/hayflick.v1.OrchestratorService/GetEvidence": _LOCAL,
    "/hayflick.v1.OrchestratorService/GetNode": _LOCAL,
    "/hayflick.v1.WorkerService/GetSelf": _WORKER,
    "/hayflick.v1.WorkerService/Replicate": _WORKER,
    "/hayflick.v1.WorkerService/RunDescendantTask": _WORKER,
    "/hayflick.v1.WorkerService/Shutdown": _WORKER,
    "/hayflick.v1.LoggerService/Append": _LOCAL,
    "/hayflick.v1.LoggerService/ListEvents": _LOCAL,
    "/hayflick.v1.LoggerService/TailEvents": _LOCAL,
    "/hayflick.v1.LoggerService/ListMetrics": _LOCAL,
    "/hayflick.v1.LoggerService/VerifyJournal": _LOCAL,
    "/hayflick.v1.LoggerService/GetCheckpoint": _LOCAL,
    "/hayflick.v1.LoggerService/GetInclusionProof": _LOCAL,
    "/hayflick.v1.LoggerService/GetConsistencyProof": _LOCAL,
    "/hayflick.v1.LoggerService/GetTile": _LOCAL,
    # gRPC's own services, without which grpcurl and load balancers are blind.
    "/grpc.health.v1.Health/Check": _LOCAL | _WORKER,
    "/grpc.health.v1.Health/Watch": _LOCAL | _WORKER,
    "/grpc.health.v1.Health/List": _LOCAL | _WORKER,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _LOCAL | _WORKER,
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": _LOCAL | _WORKER,
}


def allowed(method: str, role: Role) -> bool:
    """Return whether a caller in *role* may call *method*; unlisted means no."""
    return role in TABLE.get(method, frozenset())
