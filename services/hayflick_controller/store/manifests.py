"""Manifests, and the slots that they reserve."""

from __future__ import annotations

from sqlalchemy import ColumnElement, and_, bindparam, func, insert, select, true, update

from hayflick_controller.model import Manifest, ManifestStatus, Scope, ScopeKind
from hayflick_controller.store import rows, schema
from hayflick_controller.store.part import Part
from hayflick_controller.store.workers import in_subtree

manifests, workers = schema.manifests, schema.workers

MANIFEST = select(
    manifests.c.manifest_id,
    manifests.c.contract_id,
    manifests.c.worker_id,
    manifests.c.parent_id,
    manifests.c.depth,
    manifests.c.status,
    *schema.manifest_columns,
).where(manifests.c.manifest_id == bindparam("manifest_id"))
MANIFEST_WITH_SNAPSHOT = MANIFEST.add_columns(manifests.c.snapshot)
ADD_MANIFEST = insert(manifests)
STATUS = select(manifests.c.contract_id, manifests.c.status).where(
    manifests.c.manifest_id == bindparam("manifest_id")
)
SETTLE = (
    update(manifests).where(manifests.c.manifest_id == bindparam("key")).values(status=bindparam("value"))
)
LAST_RESERVATION = (
    select(manifests.c.issue_us)
    .where(
        schema.RESERVED,
        manifests.c.parent_id == bindparam("parent_id"),
        manifests.c.expire_us > bindparam("now_us"),
    )
    .order_by(manifests.c.issue_us.desc())
    .limit(1)
)


class Manifests(Part):
    """See :class:`~hayflick_controller.store.protocol.Tx`."""

    def add_manifest(self, manifest: Manifest) -> None:  # noqa: D102
        self._known.statuses.pop(manifest.manifest_id, None)
        self._driver.later(ADD_MANIFEST, rows.manifest_values(manifest))
        self._population[manifest.contract_id].reserved += 1

    def manifest(  # noqa: D102
        self, manifest_id: str, *, with_snapshot: bool = False
    ) -> tuple[Manifest, ManifestStatus] | None:
        statement = MANIFEST_WITH_SNAPSHOT if with_snapshot else MANIFEST
        row = self._driver.one(statement, {"manifest_id": manifest_id})
        if row is None:
            return None
        return rows.manifest(row, row.snapshot if with_snapshot else ""), ManifestStatus(row.status)

    def manifest_status(self, manifest_id: str) -> ManifestStatus | None:  # noqa: D102
        found = self._status(manifest_id)
        return None if found is None else found[1]

    def settle(self, manifest_id: str, status: ManifestStatus) -> None:  # noqa: D102
        found = self._status(manifest_id)
        if found is None or found[1] is status:
            return
        contract_id, before = found
        self._known.statuses.pop(manifest_id, None)
        self._driver.later(SETTLE, {"key": manifest_id, "value": status.value})
        change = self._population[contract_id]
        change.reserved += (status is ManifestStatus.RESERVED) - (before is ManifestStatus.RESERVED)

    def return_expired(self, now_us: int, contract_id: str | None = None) -> dict[str, int]:  # noqa: D102
        expired = manifests.c.expire_us <= now_us
        if contract_id is not None:
            expired = and_(expired, manifests.c.contract_id == contract_id)
        return self._return(expired)

    def return_reserved(self, scope: Scope, path: str = "") -> dict[str, int]:  # noqa: D102
        match scope.kind:
            case ScopeKind.EVERYTHING:
                return self._return(true())
            case ScopeKind.CONTRACT:
                return self._return(manifests.c.contract_id == scope.id)
            case _:
                members = select(workers.c.worker_id).where(in_subtree(path))
                return self._return(manifests.c.parent_id.in_(members))

    def last_reservation_us(self, parent_id: str, now_us: int) -> int | None:  # noqa: D102
        row = self._driver.one(LAST_RESERVATION, {"parent_id": parent_id, "now_us": now_us})
        return None if row is None else int(row.issue_us)

    def _status(self, manifest_id: str) -> tuple[str, ManifestStatus] | None:
        if manifest_id in self._known.statuses:
            return self._known.statuses[manifest_id]
        row = self._driver.one(STATUS, {"manifest_id": manifest_id})
        return None if row is None else (row.contract_id, ManifestStatus(row.status))

    def _return(self, which: ColumnElement[bool]) -> dict[str, int]:
        """Move RESERVED manifests for which *which* holds to RETURNED; count them by contract."""
        chosen = and_(schema.RESERVED, which)
        found = self._driver.query(
            select(manifests.c.contract_id, func.count()).where(chosen).group_by(manifests.c.contract_id)
        ).all()
        if found:
            self._known.statuses.clear()
            self._driver.writing()
            self._driver.query(update(manifests).where(chosen).values(status=ManifestStatus.RETURNED.value))
        returned = {contract_id: int(count) for contract_id, count in found}
        for contract_id, count in returned.items():
            self._population[contract_id].reserved -= count
        return returned
