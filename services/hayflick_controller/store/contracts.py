"""Contracts: their policies and populations."""

from __future__ import annotations

from dataclasses import replace

from sqlalchemy import bindparam, insert, select, tuple_, update

from hayflick_controller.model import Contract, Key, StopCondition
from hayflick_controller.store import rows, schema
from hayflick_controller.store.part import Change, Part

contracts, conditions, keys = schema.contracts, schema.conditions, schema.keys

CONTRACT = select(contracts).where(contracts.c.contract_id == bindparam("contract_id"))
CONTRACT_LOCKED = CONTRACT.with_for_update()
CONDITIONS = (
    select(conditions)
    .where(conditions.c.contract_id == bindparam("contract_id"))
    .order_by(conditions.c.position)
)
POPULATION = (
    update(contracts)
    .where(contracts.c.contract_id == bindparam("key"))
    .values(
        active_count=contracts.c.active_count + bindparam("active"),
        reserved_count=contracts.c.reserved_count + bindparam("reserved"),
        population_version=contracts.c.population_version + bindparam("version"),
    )
)
ADD_CONTRACT = insert(contracts)
ADD_CONDITION = insert(conditions)
ADD_KEY = insert(keys)


class Contracts(Part):
    """See :class:`~hayflick_controller.store.protocol.Tx`."""

    def add_contract(self, contract: Contract, secret: bytes) -> None:  # noqa: D102
        self._driver.run(ADD_CONTRACT, rows.contract_values(contract))
        self._driver.run_many(
            ADD_CONDITION,
            [
                rows.condition_values(contract.contract_id, position, condition)
                for position, condition in enumerate(contract.policy.stop_conditions)
            ],
        )
        self._driver.run(
            ADD_KEY,
            {
                **rows.key_values(Key(contract.key_id, contract.contract_id, contract.create_us)),
                "secret": secret,
            },
        )

    def contract(self, contract_id: str, *, lock: bool = False) -> Contract | None:  # noqa: D102
        # Known ones are locked; what this transaction has changed of one is held back in full.
        if (known := self._known.contracts.get(contract_id)) is not None:
            return changed(known, self._population.get(contract_id))
        self._write_population()
        row = self._driver.one(CONTRACT_LOCKED if lock else CONTRACT, {"contract_id": contract_id})
        return None if row is None else rows.contract(row, self._conditions(contract_id))

    def contracts(self, before: tuple[int, str] | None, limit: int) -> list[Contract]:  # noqa: D102
        self._write_population()
        place = tuple_(contracts.c.create_us, contracts.c.contract_id)
        query = select(contracts).order_by(contracts.c.create_us.desc(), contracts.c.contract_id.desc())
        if before is not None:
            query = query.where(place < before)
        found = self._driver.query(query.limit(limit)).all()
        return [rows.contract(row, self._conditions(row.contract_id)) for row in found]

    def _conditions(self, contract_id: str) -> tuple[StopCondition, ...]:
        known = self._known.immutable.conditions.get(contract_id)
        if known is None:
            found = self._driver.all(CONDITIONS, {"contract_id": contract_id})
            known = self._known.immutable.conditions[contract_id] = tuple(
                rows.condition(row) for row in found
            )
        return known

    def _write_population(self) -> None:
        # Held back so that a birth, which gives back a reservation and takes a
        # slot, writes its contract's row once.
        for contract_id, change in self._population.items():
            self._known.contracts.pop(contract_id, None)
            self._driver.later(
                POPULATION,
                {
                    "key": contract_id,
                    "active": change.active,
                    "reserved": change.reserved,
                    "version": change.version,
                },
            )
        self._population.clear()


def changed(contract: Contract, change: Change | None) -> Contract:
    """Return *contract* after a change of its population."""
    if change is None:
        return contract
    return replace(
        contract,
        active_count=contract.active_count + change.active,
        reserved_count=contract.reserved_count + change.reserved,
        population_version=contract.population_version + change.version,
    )
