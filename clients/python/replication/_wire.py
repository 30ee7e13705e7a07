"""The dataclasses of this package and proto3 JSON: the one conversion, both ways.

Outside a sandbox the JSON becomes protobuf messages; inside, where neither
gRPC nor protobuf is wanted, it travels as it is. See https://protobuf.dev/programming-guides/json/.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeAlias, TypeVar

from replication._contract import LineageFacts, ParentFacts, ReplicationContext, ReplicationContract
from replication._manifest import Manifest
from replication._records import EndReason, RegistryEntry, Stage, Usage, WorkerExit
from replication._resources import BYTES_PER_MB, NetworkPolicy, ResourceSpec
from replication._terms import GRADES, DenialClass, FamilyBudget, Tripwire, TripwireScope, grade_floors

Json: TypeAlias = Mapping[str, Any]
T = TypeVar("T")

_GRADE = "ISOLATION_GRADE_"


def resources_to_json(resources: ResourceSpec) -> dict[str, Any]:
    """Return *resources* as a ``hayflick.v1.Resources``."""
    policy = resources.network_policy
    return _without_empty(
        cpuMillis=round(resources.cpu_limit * 1_000),
        memoryLimitBytes=_bytes(resources.memory_limit_mb),
        pidsLimit=resources.pids_limit,
        openFilesLimit=resources.open_files_limit,
        fileSizeLimitBytes=_bytes(resources.file_size_limit_mb),
        workspaceLimitBytes=_bytes(resources.workspace_limit_mb),
        tmpLimitBytes=_bytes(resources.tmp_limit_mb),
        cpuTimeLimit=duration(resources.cpu_time_limit_seconds),
        outputLimitBytes=_bytes(resources.output_limit_mb),
        network=network_to_json(policy),
    )


def network_to_json(policy: NetworkPolicy) -> dict[str, Any]:
    """Return *policy* as a ``hayflick.v1.NetworkPolicy``."""
    return _without_empty(
        allowController=policy.allow_controller,
        allowExternal=policy.allow_external,
        allowLoopback=policy.allow_loopback,
        allowedHosts=list(policy.allowed_hosts) or None,
        egressLimitBytes=_bytes(policy.egress_limit_mb),
    )


def resources_from_json(value: Json) -> ResourceSpec:
    """Return a ``hayflick.v1.Resources`` as a :class:`ResourceSpec`."""
    network = value.get("network", {})
    return ResourceSpec(
        cpu_limit=value.get("cpuMillis", 0) / 1_000,
        memory_limit_mb=_megabytes(value.get("memoryLimitBytes")) or 0,
        network_policy=NetworkPolicy(
            allow_controller=network.get("allowController", False),
            allow_external=network.get("allowExternal", False),
            allow_loopback=network.get("allowLoopback", False),
            allowed_hosts=tuple(network.get("allowedHosts", ())),
            egress_limit_mb=_megabytes(network.get("egressLimitBytes")),
        ),
        pids_limit=value.get("pidsLimit") or None,
        open_files_limit=value.get("openFilesLimit") or None,
        file_size_limit_mb=_megabytes(value.get("fileSizeLimitBytes")),
        workspace_limit_mb=_megabytes(value.get("workspaceLimitBytes")),
        tmp_limit_mb=_megabytes(value.get("tmpLimitBytes")),
        cpu_time_limit_seconds=seconds(value["cpuTimeLimit"]) if "cpuTimeLimit" in value else None,
        output_limit_mb=_megabytes(value.get("outputLimitBytes")),
    )


def manifest_to_json(manifest: Manifest) -> Json:
    """Return *manifest* as a ``hayflick.v1.Manifest``: as it was signed, unless it was changed since.

    Raises:
        ValueError: Its state_snapshot is not JSON.
    """
    snapshot = manifest.state_snapshot_json
    wire = manifest._wire  # noqa: SLF001 -- kept for this conversion alone
    unchanged = wire is not None and manifest_from_json(wire) == manifest
    if wire is not None and unchanged and wire.get("stateSnapshotJson", "{}") == snapshot:
        return wire
    return _without_empty(
        manifestId=manifest.manifest_id,
        contractId=manifest.contract_id,
        workerId=manifest.worker_id,
        parentId=manifest.parent_id,
        depth=manifest.depth,
        epoch=str(manifest.epoch) if manifest.epoch else None,
        stateSnapshotJson=snapshot,
        resources=resources_to_json(manifest.resources),
        issueTime=timestamp(manifest.issued_at),
        expireTime=timestamp(manifest.expires_at),
        keyId=manifest.key_id,
        signature=base64.b64encode(_signature_bytes(manifest.signature)).decode(),
    )


def manifest_from_json(value: Json) -> Manifest:
    """Return a ``hayflick.v1.Manifest`` as a :class:`Manifest`."""
    manifest = Manifest(
        worker_id=value.get("workerId", ""),
        parent_id=value.get("parentId") or None,
        depth=value.get("depth", 0),
        state_snapshot=json.loads(value.get("stateSnapshotJson") or "{}"),
        issued_at=instant(value["issueTime"]),
        resources=resources_from_json(value.get("resources", {})),
        signature=base64.b64decode(value.get("signature", "")).hex(),
        contract_id=value.get("contractId", ""),
        manifest_id=value.get("manifestId", ""),
        expires_at=instant(value["expireTime"]) if "expireTime" in value else None,
        key_id=value.get("keyId", ""),
        epoch=int(value.get("epoch", 0)),
    )
    object.__setattr__(manifest, "_wire", value)  # frozen for users, not for its maker
    return manifest


def worker_from_json(value: Json) -> RegistryEntry:
    """Return a ``hayflick.v1.Worker`` as a :class:`RegistryEntry`."""
    return RegistryEntry(
        manifest=manifest_from_json(value["manifest"]),
        stage=_member(Stage, value.get("state", ""), "STATE_") or Stage.STOPPING,
        created_at=_optional_instant(value, "createTime"),
        expires_at=_optional_instant(value, "expireTime"),
        exit=_exit_from_json(value["exit"]) if "exit" in value else None,
        last_heartbeat=_optional_instant(value, "lastHeartbeatTime"),
        root_id=value.get("rootId", ""),
        node_id=value.get("nodeId", ""),
        usage=_usage_from_json(value["usage"]) if "usage" in value else None,
        degraded_layers=tuple(value.get("degradedLayers", ())),
        isolation_grade=_grade(value.get("attestation", {}).get("grade", "")),
    )


def contract_to_json(contract: ReplicationContract) -> dict[str, Any]:
    """Return *contract* as a ``hayflick.v1.Contract``, less its stop conditions."""
    return _without_empty(
        displayName=contract.display_name,
        maxDepth=contract.max_depth,
        maxReplicas=contract.max_replicas,
        cooldown=duration(contract.cooldown_seconds),
        expiration=duration(contract.expiration_seconds),
        manifestTtl=duration(contract.manifest_ttl_seconds),
        familyBudget=None if contract.family_budget is None else _budget_to_json(contract.family_budget),
        tripwires=[_tripwire_to_json(tripwire) for tripwire in contract.tripwires] or None,
        gradeFloors=[
            {"fromDepth": depth, "minGrade": f"{_GRADE}{grade}"}
            for depth, grade in grade_floors(contract.min_grade)
        ]
        or None,
    )


def contract_from_json(value: Json) -> ReplicationContract:
    """Return a ``hayflick.v1.Contract``, less its stop conditions."""
    return ReplicationContract(
        max_depth=value.get("maxDepth", 0),
        max_replicas=value.get("maxReplicas", 0),
        cooldown_seconds=seconds(value.get("cooldown", "0s")),
        expiration_seconds=seconds(value["expiration"]) if "expiration" in value else None,
        manifest_ttl_seconds=seconds(value["manifestTtl"]) if "manifestTtl" in value else None,
        display_name=value.get("displayName", ""),
        family_budget=_budget_from_json(value["familyBudget"]) if "familyBudget" in value else None,
        tripwires=tuple(_tripwire_from_json(tripwire) for tripwire in value.get("tripwires", ())),
        min_grade=_min_grade(value.get("gradeFloors", ())),
    )


def _grade(name: object) -> str:
    """Return the short name of a grade; empty for one that this version does not know."""
    short = str(name).removeprefix(_GRADE)
    return short if short in GRADES else ""


def _min_grade(floors: Sequence[Json]) -> str | dict[int, str] | None:
    strictest: dict[int, str] = {}
    for floor in floors:
        depth, grade = floor.get("fromDepth", 0), _grade(floor.get("minGrade", ""))
        if grade:
            strictest[depth] = min(grade, strictest.get(depth, grade))
    return strictest or None


def context_from_json(value: Json) -> ReplicationContext:
    """Return the facts that a stop condition is asked about, as the controller lays them out flat."""
    manifest, contract = value["manifest"], value["contract"]
    parent, lineage = value.get("parent", {}), value.get("lineage", {})
    return ReplicationContext(
        manifest=Manifest(
            worker_id=manifest["worker_id"],
            parent_id=manifest.get("parent_id") or None,
            depth=manifest["depth"],
            state_snapshot=json.loads(manifest.get("state_snapshot_json") or "{}"),
            issued_at=instant(manifest["issue_time"]) if "issue_time" in manifest else datetime.now(UTC),
            resources=ResourceSpec(
                cpu_limit=manifest["cpu_millis"] / 1_000,
                memory_limit_mb=_megabytes(manifest["memory_limit_bytes"]) or 0,
                network_policy=NetworkPolicy(
                    allow_controller=manifest.get("allow_controller", False),
                    allow_external=manifest.get("allow_external", False),
                ),
            ),
            contract_id=manifest.get("contract_id", ""),
            manifest_id=manifest.get("manifest_id", ""),
            epoch=manifest.get("epoch", 0),
        ),
        active_count=value["active_count"],
        contract=ReplicationContract(
            max_depth=contract["max_depth"],
            max_replicas=contract["max_replicas"],
            cooldown_seconds=contract["cooldown_seconds"],
            expiration_seconds=contract.get("expiration_seconds") or None,
            display_name=contract.get("display_name", ""),
        ),
        # By name: what a newer controller adds must not make a rule deny.
        parent=ParentFacts(
            worker_id=parent["worker_id"],
            depth=parent["depth"],
            age_seconds=parent["age_seconds"],
            live_child_count=parent["live_child_count"],
        )
        if parent.get("worker_id")
        else None,
        lineage=LineageFacts(
            root_id=lineage["root_id"], depth=lineage["depth"], live_count=lineage["live_count"]
        )
        if lineage
        else None,
    )


def end_reason(name: str) -> EndReason | None:
    """Return the ``END_REASON_…`` called *name*; ``None`` when unspecified or unknown here."""
    return _member(EndReason, name, "END_REASON_")


def timestamp(value: datetime | None) -> str | None:
    """Return *value* as a ``google.protobuf.Timestamp``, to the microsecond."""
    if value is None:
        return None
    return value.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def instant(text: str) -> datetime:
    """Return what a ``google.protobuf.Timestamp`` says, to the microsecond."""
    whole, _, fraction = text.removesuffix("Z").partition(".")
    return datetime.fromisoformat(whole).replace(
        tzinfo=UTC, microsecond=int(fraction[:6].ljust(6, "0")) if fraction else 0
    )


def duration(value: float | None) -> str | None:
    """Return *value* seconds as a ``google.protobuf.Duration``, to the microsecond as all services count."""
    return None if value is None else f"{value:.6f}s"


def seconds(text: str) -> float:
    """Return the seconds in a ``google.protobuf.Duration``."""
    return float(text.removesuffix("s"))


def _budget_to_json(budget: FamilyBudget) -> dict[str, Any]:
    return _without_empty(
        memoryLimitBytes=_bytes(budget.memory_limit_mb),
        cpuMillis=None if budget.cpu_limit is None else round(budget.cpu_limit * 1_000),
        pidsLimit=budget.pids_limit,
        maxSpawns=budget.max_spawns,
        wallTimeLimit=duration(budget.wall_time_limit_seconds),
    )


def _budget_from_json(value: Json) -> FamilyBudget:
    return FamilyBudget(
        memory_limit_mb=_megabytes(value.get("memoryLimitBytes")),
        cpu_limit=value["cpuMillis"] / 1_000 if value.get("cpuMillis") else None,
        pids_limit=value.get("pidsLimit") or None,
        max_spawns=value.get("maxSpawns") or None,
        wall_time_limit_seconds=seconds(value["wallTimeLimit"]) if "wallTimeLimit" in value else None,
    )


def _tripwire_to_json(tripwire: Tripwire) -> dict[str, Any]:
    return _without_empty(
        name=tripwire.name,
        classes=[f"DENIAL_CLASS_{one.name}" for one in tripwire.classes] or None,
        count=tripwire.count,
        window=duration(tripwire.window_seconds),
        scope=f"TRIPWIRE_SCOPE_{tripwire.scope.name}",
    )


def _tripwire_from_json(value: Json) -> Tripwire:
    return Tripwire(
        name=value.get("name", ""),
        count=value.get("count", 0),
        window_seconds=seconds(value.get("window", "0s")),
        classes=tuple(DenialClass[name.removeprefix("DENIAL_CLASS_")] for name in value.get("classes", ())),
        scope=_member(TripwireScope, value.get("scope", ""), "TRIPWIRE_SCOPE_") or TripwireScope.WORKER,
    )


def _exit_from_json(value: Json) -> WorkerExit:
    return WorkerExit(
        reason=end_reason(value.get("reason", "")),
        detail=value.get("detail", ""),
        exit_code=value.get("exitCode", 0),
        signal=value.get("signal", 0),
        ended_at=_optional_instant(value, "endTime"),
    )


def _usage_from_json(value: Json) -> Usage:
    return Usage(
        memory_bytes=int(value.get("memoryBytes", 0)),
        memory_peak_bytes=int(value.get("memoryPeakBytes", 0)),
        cpu_seconds=seconds(value.get("cpuTime", "0s")),
        pids=value.get("pids", 0),
    )


def _member(enum: type[T], name: str, prefix: str) -> T | None:
    members: Mapping[str, T] = enum.__members__  # type: ignore[attr-defined]
    return members.get(name.removeprefix(prefix))


def _signature_bytes(signature: str) -> bytes:
    """Return the bytes of *signature*; of one that is not hex, bytes that no key can have made."""
    try:
        return bytes.fromhex(signature)
    except ValueError:
        return signature.encode()


def _optional_instant(value: Json, name: str) -> datetime | None:
    return instant(value[name]) if name in value else None


def _bytes(megabytes: float | None) -> str | None:
    return None if megabytes is None else str(int(megabytes * BYTES_PER_MB))


def _megabytes(size: str | int | None) -> float | None:
    """Return *size* in MiB, as an int where it is whole; 0 and nothing are ``None``."""
    count = int(size or 0)
    if count == 0:
        return None
    return count // BYTES_PER_MB if count % BYTES_PER_MB == 0 else count / BYTES_PER_MB


def _without_empty(**fields: Any) -> dict[str, Any]:  # noqa: ANN401 -- JSON has no narrower type
    """Return *fields* less those that proto3 does not tell from their absence."""
    return {
        name: value for name, value in fields.items() if value is not None and value not in ("", 0, False)
    }
