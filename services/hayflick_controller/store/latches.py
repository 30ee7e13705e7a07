"""Kill switches and quarantines."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from sqlalchemy import Select, bindparam, insert, select, update

from hayflick_controller.model import Latch, Scope, ScopeKind
from hayflick_controller.store import rows, schema
from hayflick_controller.store.part import Part, batches, new

latches = schema.latches

ENGAGED = select(latches).where(latches.c.engaged).order_by(latches.c.scope)
CHANGE_LATCH = (
    update(latches)
    .where(latches.c.scope == bindparam("key"))
    .values({name: bindparam(f"new_{name}") for name in ("engaged", "epoch", "reason", "change_us")})
)
ADD_LATCH = insert(latches)


@functools.cache
def latches_of(count: int) -> Select[Any]:
    """Return the statement that reads the latches over *count* scopes, bound as ``s0`` and so on."""
    return select(latches).where(latches.c.scope.in_([bindparam(f"s{place}") for place in range(count)]))


class Latches(Part):
    """See :class:`~hayflick_controller.store.protocol.Tx`."""

    def latches(self, scopes: Iterable[Scope]) -> dict[Scope, Latch]:  # noqa: D102
        found: dict[Scope, Latch] = {}
        names = [scope.key for scope in scopes]
        if all(name in self._known.latches for name in names):
            known = (self._known.latches[name] for name in names)
            return {latch.scope: latch for latch in known if latch is not None}
        for part in batches(names):
            parameters = {f"s{place}": key for place, key in enumerate(part)}
            for row in self._driver.all(latches_of(len(part)), parameters):
                latch = rows.latch(row)
                found[latch.scope] = latch
        return found

    def engaged(self) -> list[Latch]:  # noqa: D102
        return [rows.latch(row) for row in self._driver.all(ENGAGED)]

    def put_latch(self, latch: Latch) -> None:  # noqa: D102
        values = rows.latch_values(latch)
        self._known.latches.pop(values["scope"], None)
        if latch.scope.kind is ScopeKind.QUARANTINE:
            self._quarantines.append(latch.scope.id)
        if not self._driver.run(CHANGE_LATCH, {"key": values["scope"], **new(values)}):
            self._driver.run(ADD_LATCH, values)
