"""The signature on a manifest: HMAC-SHA256 over RFC 8785 JSON. Pure.

``docs/manifest.md`` publishes the canonical form and test vectors, so that a
manifest can be checked in any language.
"""

from __future__ import annotations

import hmac
from dataclasses import replace
from typing import TYPE_CHECKING

import rfc8785

if TYPE_CHECKING:
    from hayflick_controller.model import Manifest, Resources

SIGNATURE_BYTES = 32


def canonical(manifest: Manifest) -> bytes:
    """Return the octets that are signed: every field of *manifest* but its signature.

    The snapshot goes in as the string that it is on the wire, not as the value
    it spells: nothing then depends on how a language reads JSON numbers.

    Raises:
        ValueError: A number is too large to be exact in JSON.
    """
    try:
        octets: bytes = rfc8785.dumps(
            {
                "manifest_id": manifest.manifest_id,
                "contract_id": manifest.contract_id,
                "worker_id": manifest.worker_id,
                "parent_id": manifest.parent_id,
                "depth": manifest.depth,
                "epoch": manifest.epoch,
                "state_snapshot_json": manifest.state_snapshot_json,
                "resources": _resources(manifest.resources),
                "issue_time_us": manifest.issue_us,
                "expire_time_us": manifest.expire_us,
                "key_id": manifest.key_id,
            }
        )
    except rfc8785.CanonicalizationError as error:
        raise ValueError(str(error)) from error
    return octets


def sign(manifest: Manifest, secret: bytes) -> Manifest:
    """Return *manifest* with its signature."""
    return replace(manifest, signature=hmac.digest(secret, canonical(manifest), "sha256"))


def verify(manifest: Manifest, secret: bytes) -> bool:
    """Return whether *secret* made the signature on *manifest*, in constant time."""
    try:
        expected = hmac.digest(secret, canonical(manifest), "sha256")
    except ValueError:
        return False
    return hmac.compare_digest(expected, manifest.signature)


def _resources(resources: Resources) -> dict[str, int | dict[str, int] | None]:
    return {
        "cpu_millis": resources.cpu_millis,
        "memory_limit_bytes": resources.memory_limit_bytes,
        "pids_limit": resources.pids_limit,
        "open_files_limit": resources.open_files_limit,
        "file_size_limit_bytes": resources.file_size_limit_bytes,
        "workspace_limit_bytes": resources.workspace_limit_bytes,
        "tmp_limit_bytes": resources.tmp_limit_bytes,
        "cpu_time_limit_us": resources.cpu_time_limit_us,
        "network": {
            "allow_controller": resources.network.allow_controller,
            "allow_external": resources.network.allow_external,
            "allow_loopback": resources.network.allow_loopback,
        },
    }
