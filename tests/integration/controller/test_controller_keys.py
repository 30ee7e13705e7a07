"""Keys that sign manifests: rotated, revoked, listed."""

from __future__ import annotations

from typing import Any

import pytest

from hayflick.v1 import controller_pb2 as pb


async def rotate(bench: Any, request_id: Any, contract_id: str, **fields: Any) -> pb.Key:
    """Rotate a contract's key."""
    request = pb.RotateKeyRequest(request_id=request_id(), contract_id=contract_id, reason="due", **fields)
    return (await bench.ask(bench.stub.RotateKey(request))).key


async def revoke(bench: Any, request_id: Any, key_id: str) -> pb.RevokeKeyResponse:
    """Revoke a key."""
    request = pb.RevokeKeyRequest(request_id=request_id(), key_id=key_id, reason="leaked")
    return await bench.ask(bench.stub.RevokeKey(request))


async def test_new_manifests_use_the_new_key_and_old_ones_stay_good(bench: Any, request_id: Any) -> None:
    """After a rotation a manifest from before still registers, and new ones name the new key."""
    contract = await bench.contract()
    node = await bench.node()
    before = await bench.issue(contract.contract_id)
    key = await rotate(bench, request_id, contract.contract_id)
    after = await bench.issue(contract.contract_id)
    assert (before.key_id, after.key_id) == (contract.key_id, key.key_id)
    assert key.key_id != contract.key_id
    for manifest in (before, after):
        assert (await node.register(manifest)).worker_id == manifest.worker_id


async def test_a_revoked_key_is_refused_at_once(bench: Any, request_id: Any, denied: Any) -> None:
    """What a revoked key signed never registers again, the contract has another, and the log says so."""
    contract = await bench.contract()
    node = await bench.node()
    manifest = await bench.issue(contract.contract_id)
    answer = await revoke(bench, request_id, contract.key_id)
    assert answer.key.HasField("revoke_time")
    assert answer.successor.contract_id == contract.contract_id
    error = await denied(node.register(manifest))
    assert (error.reason_name, error.metadata) == ("KEY_REVOKED", {"key_id": contract.key_id})
    fresh = await bench.issue(contract.contract_id)
    assert fresh.key_id == answer.successor.key_id
    await node.register(fresh)
    assert {"key_revoked", "deny_key_revoked"} <= set(await bench.decisions(contract.contract_id))


async def test_a_revocation_and_a_rotation_outlive_the_controller(
    bench: Any, request_id: Any, denied: Any
) -> None:
    """After a restart the revoked key is still refused and the current one still signs."""
    contract = await bench.contract()
    manifest = await bench.issue(contract.contract_id)
    key = await rotate(bench, request_id, contract.contract_id)
    await revoke(bench, request_id, contract.key_id)
    await bench.stop()
    await bench.start()
    node = await bench.node()
    assert (await denied(node.register(manifest))).reason_name == "KEY_REVOKED"
    assert (await bench.issue(contract.contract_id)).key_id == key.key_id


async def test_revoking_a_retired_key_makes_no_other(bench: Any, request_id: Any) -> None:
    """A key that was replaced before needs no successor, and revoking it twice changes nothing."""
    contract = await bench.contract()
    key = await rotate(bench, request_id, contract.contract_id)
    first = await revoke(bench, request_id, contract.key_id)
    assert not first.HasField("successor")
    assert (await revoke(bench, request_id, contract.key_id)).key.revoke_time == first.key.revoke_time
    fresh = await bench.issue(contract.contract_id)
    assert fresh.key_id == key.key_id


async def test_keys_are_listed_newest_first_without_secrets(bench: Any, request_id: Any) -> None:
    """Pages hold every key of a contract once, the current one first; no field has a secret."""
    contract = await bench.contract()
    await bench.contract()
    rotated = [await rotate(bench, request_id, contract.contract_id) for _ in range(4)]
    made = [contract.key_id, *(key.key_id for key in rotated)]
    listed: list[pb.Key] = []
    token = ""
    while True:
        request = pb.ListKeysRequest(contract_id=contract.contract_id, page_size=2, page_token=token)
        page = await bench.ask(bench.stub.ListKeys(request))
        listed += page.keys
        token = page.next_page_token
        if not token:
            break
    assert [key.key_id for key in listed] == made[::-1]
    assert [key.HasField("retire_time") for key in listed] == [False, True, True, True, True]
    everyone = await bench.ask(bench.stub.ListKeys(pb.ListKeysRequest()))
    assert len(everyone.keys) == 6


async def test_a_repeated_rotation_makes_one_key(bench: Any) -> None:
    """The same request again gets the same key."""
    contract = await bench.contract()
    request = pb.RotateKeyRequest(request_id="again", contract_id=contract.contract_id, reason="due")
    first = await bench.ask(bench.stub.RotateKey(request))
    assert await bench.ask(bench.stub.RotateKey(request)) == first


@pytest.mark.parametrize("kind", ["rotate", "revoke"])
async def test_what_does_not_exist_is_named(bench: Any, request_id: Any, denied: Any, kind: str) -> None:
    """A contract or a key that there is not is refused by its own reason."""
    call = rotate(bench, request_id, "c0ffee") if kind == "rotate" else revoke(bench, request_id, "c0ffee")
    reason = {"rotate": "CONTRACT_UNKNOWN", "revoke": "KEY_UNKNOWN"}[kind]
    assert (await denied(call)).reason_name == reason
