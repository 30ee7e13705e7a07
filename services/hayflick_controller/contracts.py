"""Contracts: created once with their key, then only read."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from hayflick.v1 import controller_pb2, resources_pb2
from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_controller import clock, events, render
from hayflick_controller.decisions import Decisions, Form, Request
from hayflick_controller.model import Contract, Latch, Policy, Scope, ScopeKind
from hayflick_rpc import wire
from hayflick_rpc.errors import HayflickError

if TYPE_CHECKING:
    from hayflick_controller.admission import Denial
    from hayflick_controller.store import Store, Tx

SECRET_BYTES = 32

_KIND = "contracts"


class Contracts:
    """See the module."""

    def __init__(self, store: Store, decisions: Decisions, clock_: clock.Clock) -> None:
        self._store = store
        self._decisions = decisions
        self._clock = clock_

    async def create(
        self, request: Request, policy: Policy, secret: bytes | None
    ) -> controller_pb2.CreateContractResponse:
        """Create a contract; without *secret*, with one of 256 random bits.

        Raises:
            HayflickError: AUDIT_UNAVAILABLE.
        """

        def create(tx: Tx) -> Contract | Denial:
            contract = Contract(clock.new_contract_id(), policy, clock.new_key_id(), self._clock())
            tx.add_contract(contract, secret or secrets.token_bytes(SECRET_BYTES))
            tx.record(events.contract_created(contract))
            return contract

        def undo(tx: Tx, contract: Contract) -> None:
            # Nobody learned its name; a latch that is never released makes sure
            # that nothing is ever born under it, and the record says why.
            latch = Latch(Scope(ScopeKind.CONTRACT, contract.contract_id), True, 1, "undone", self._clock())
            tx.put_latch(latch)
            tx.record(events.latch_changed("contract_undone", latch, contract_id=contract.contract_id))

        form = Form[Contract, controller_pb2.CreateContractResponse](
            controller_pb2.CreateContractResponse,
            lambda contract: controller_pb2.CreateContractResponse(
                contract=render.contract(contract, _switch(contract))
            ),
        )
        return await self._decisions.take(request, create, form, undo=undo, durable=True)

    async def get(self, contract_id: str) -> resources_pb2.Contract:
        """Return one contract.

        Raises:
            HayflickError: CONTRACT_UNKNOWN.
        """

        def read(tx: Tx) -> resources_pb2.Contract:
            contract = tx.contract(contract_id)
            if contract is None:
                raise HayflickError(
                    ErrorReason.ERROR_REASON_CONTRACT_UNKNOWN,
                    f"contract_id: there is no contract {contract_id}",
                    metadata={"contract_id": contract_id, "field": "contract_id"},
                )
            return _with_switch(tx, contract, with_pickled=True)

        return await self._store.transact(read)

    async def page(self, page_size: int, page_token: str) -> controller_pb2.ListContractsResponse:
        """Return a page of contracts, newest first; predicates without their functions.

        Raises:
            HayflickError: INVALID_FIELD; PAGE_TOKEN_INVALID.
        """
        limit = wire.page_size(page_size)
        mark = wire.fingerprint(_KIND)
        position = wire.decode_page_token(page_token, mark)
        before = None if position is None else (int(position[0]), str(position[1]))

        def read(tx: Tx) -> controller_pb2.ListContractsResponse:
            found = tx.contracts(before, limit + 1)
            page = controller_pb2.ListContractsResponse(
                contracts=[_with_switch(tx, contract, with_pickled=False) for contract in found[:limit]]
            )
            if len(found) > limit:
                last = found[limit - 1]
                page.next_page_token = wire.encode_page_token(mark, last.create_us, last.contract_id)
            return page

        return await self._store.transact(read)


def _with_switch(tx: Tx, contract: Contract, *, with_pickled: bool) -> resources_pb2.Contract:
    latch = _switch(contract)
    latch = tx.latches([latch.scope]).get(latch.scope, latch)
    return render.contract(contract, latch, with_pickled=with_pickled)


def _switch(contract: Contract) -> Latch:
    return Latch(Scope(ScopeKind.CONTRACT, contract.contract_id))
