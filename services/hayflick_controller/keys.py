"""The keys that sign manifests: rotated, revoked, listed. Their secrets never leave the store.

A contract has one current key; those before it stay good until what they signed
expires. A revoked key is refused at once, whatever it signed.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hayflick.v1 import controller_pb2
from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_controller import clock, events, render
from hayflick_controller.contracts import SECRET_BYTES
from hayflick_controller.decisions import Decisions, Form, Request
from hayflick_controller.facts import require_contract
from hayflick_controller.model import Key
from hayflick_rpc import wire
from hayflick_rpc.errors import HayflickError

if TYPE_CHECKING:
    from hayflick_controller.admission import Denial
    from hayflick_controller.store import Store, Tx

_KIND = "keys"


@dataclass(frozen=True, slots=True)
class _Revoked:
    """A key that was revoked, and the one that took its place, if none had."""

    key: Key
    successor: Key | None


class Keys:
    """See the module."""

    def __init__(self, store: Store, decisions: Decisions, clock_: clock.Clock) -> None:
        self._store = store
        self._decisions = decisions
        self._clock = clock_

    async def rotate(
        self, request: Request, contract_id: str, secret: bytes | None, reason: str
    ) -> controller_pb2.RotateKeyResponse:
        """Sign the contract's new manifests with a new key; without *secret*, one of 256 random bits.

        Raises:
            HayflickError: CONTRACT_UNKNOWN; AUDIT_UNAVAILABLE.
        """

        def rotate(tx: Tx) -> Key | Denial:
            contract = require_contract(tx, contract_id)
            successor = _succeed(tx, contract.key_id, contract_id, secret, self._clock())
            tx.record(events.key_rotated(successor, contract.key_id, reason))
            return successor

        form = Form[Key, controller_pb2.RotateKeyResponse](
            controller_pb2.RotateKeyResponse,
            lambda key: controller_pb2.RotateKeyResponse(key=render.key(key)),
        )
        # A new key that could not be recorded yet does no harm, and the old one stays good.
        return await self._decisions.take(request, rotate, form, durable=True)

    async def revoke(self, request: Request, key_id: str, reason: str) -> controller_pb2.RevokeKeyResponse:
        """Refuse every manifest that a key signed; a contract that it was current for gets another.

        Raises:
            HayflickError: KEY_UNKNOWN; AUDIT_UNAVAILABLE: it is revoked all the
                same, and recorded when the logger returns.
        """

        def revoke(tx: Tx) -> _Revoked | Denial:
            now_us = self._clock()
            key = tx.key(key_id)
            if key is None:
                raise HayflickError(
                    ErrorReason.ERROR_REASON_KEY_UNKNOWN,
                    f"key_id: there is no key {key_id}",
                    metadata={"key_id": key_id, "field": "key_id"},
                )
            contract = require_contract(tx, key.contract_id)
            successor = None
            if contract.key_id == key_id:
                successor = _succeed(tx, key_id, key.contract_id, None, now_us)
                key = replace(key, retire_us=now_us)
            key = replace(key, revoke_us=key.revoke_us or now_us)
            tx.put_key(key)
            tx.record(events.key_revoked(key, successor, now_us, reason))
            return _Revoked(key, successor)

        form = Form[_Revoked, controller_pb2.RevokeKeyResponse](
            controller_pb2.RevokeKeyResponse,
            lambda revoked: controller_pb2.RevokeKeyResponse(
                key=render.key(revoked.key),
                successor=None if revoked.successor is None else render.key(revoked.successor),
            ),
        )
        return await self._decisions.take(request, revoke, form, durable=True)

    async def page(
        self, contract_id: str, page_size: int, page_token: str
    ) -> controller_pb2.ListKeysResponse:
        """Return a page of keys, newest first.

        Raises:
            HayflickError: INVALID_FIELD; PAGE_TOKEN_INVALID.
        """
        limit = wire.page_size(page_size)
        mark = wire.fingerprint(_KIND, contract_id)
        position = wire.decode_page_token(page_token, mark)
        before = None if position is None else (int(position[0]), str(position[1]))
        found = await self._store.transact(lambda tx: tx.keys(before, limit + 1, contract_id))
        page = controller_pb2.ListKeysResponse(keys=[render.key(key) for key in found[:limit]])
        if len(found) > limit:
            last = found[limit - 1]
            page.next_page_token = wire.encode_page_token(mark, last.create_us, last.key_id)
        return page


def _succeed(tx: Tx, current_id: str, contract_id: str, secret: bytes | None, now_us: int) -> Key:
    """Make a new key the current one of a contract, and retire the one before."""
    successor = Key(clock.new_key_id(), contract_id, now_us)
    tx.add_key(successor, secret or secrets.token_bytes(SECRET_BYTES))
    before = tx.key(current_id)
    if before is not None:
        tx.put_key(replace(before, retire_us=now_us))
    return successor
