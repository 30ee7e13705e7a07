"""Keys that sign manifests. Secrets leave by :meth:`secret` alone."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Select, bindparam, insert, select, tuple_, update

from hayflick_controller.model import Key
from hayflick_controller.store import rows, schema
from hayflick_controller.store.part import Part

keys, contracts = schema.keys, schema.contracts

KEY_COLUMNS = (keys.c.key_id, keys.c.contract_id, keys.c.create_us, keys.c.retire_us, keys.c.revoke_us)
KEY = select(*KEY_COLUMNS).where(keys.c.key_id == bindparam("key_id"))
SECRET = select(keys.c.secret).where(
    keys.c.key_id == bindparam("key_id"), keys.c.contract_id == bindparam("contract_id")
)
ADD_KEY = insert(keys)
PUT_KEY = (
    update(keys)
    .where(keys.c.key_id == bindparam("key"))
    .values(retire_us=bindparam("new_retire_us"), revoke_us=bindparam("new_revoke_us"))
)
MAKE_CURRENT = (
    update(contracts)
    .where(contracts.c.contract_id == bindparam("key"))
    .values(key_id=bindparam("new_key_id"))
)


class Keys(Part):
    """See :class:`~hayflick_controller.store.protocol.Tx`."""

    def add_key(self, key: Key, secret: bytes) -> None:  # noqa: D102
        self._driver.run(ADD_KEY, {**rows.key_values(key), "secret": secret})
        self._driver.run(MAKE_CURRENT, {"key": key.contract_id, "new_key_id": key.key_id})
        self._known.keys.pop(key.key_id, None)
        self._known.contracts.pop(key.contract_id, None)

    def put_key(self, key: Key) -> None:  # noqa: D102
        self._known.keys.pop(key.key_id, None)
        self._driver.run(
            PUT_KEY, {"key": key.key_id, "new_retire_us": key.retire_us, "new_revoke_us": key.revoke_us}
        )

    def key(self, key_id: str) -> Key | None:  # noqa: D102
        if key_id in self._known.keys:
            return self._known.keys[key_id]
        row = self._driver.one(KEY, {"key_id": key_id})
        return None if row is None else rows.key(row)

    def keys(  # noqa: D102
        self, before: tuple[int, str] | None, limit: int, contract_id: str = ""
    ) -> list[Key]:
        query: Select[Any] = select(*KEY_COLUMNS).order_by(keys.c.create_us.desc(), keys.c.key_id.desc())
        if before is not None:
            query = query.where(tuple_(keys.c.create_us, keys.c.key_id) < before)
        if contract_id:
            query = query.where(keys.c.contract_id == contract_id)
        return [rows.key(row) for row in self._driver.query(query.limit(limit)).all()]

    def secret(self, key_id: str, contract_id: str) -> bytes | None:  # noqa: D102
        known = self._known.immutable.secrets.get((key_id, contract_id))
        if known is None:
            row = self._driver.one(SECRET, {"key_id": key_id, "contract_id": contract_id})
            if row is None:
                return None
            known = self._known.immutable.secrets[key_id, contract_id] = bytes(row.secret)
        return known
