"""The signature on a manifest: HMAC-SHA256 over RFC 8785 JSON. Pure.

``docs/manifest.md`` publishes the canonical form and test vectors, so that a
manifest can be checked in any language.
"""

from __future__ import annotations

import hmac
import json
from dataclasses import replace
from typing import TYPE_CHECKING

from hayflick_controller.model import MAX_EXACT_INTEGER

if TYPE_CHECKING:
    from hayflick_controller.model import Manifest

SIGNATURE_BYTES = 32

_LIMITS = (
    "cpu_millis",
    "memory_limit_bytes",
    "pids_limit",
    "open_files_limit",
    "file_size_limit_bytes",
    "workspace_limit_bytes",
    "tmp_limit_bytes",
    "cpu_time_limit_us",
    "output_limit_bytes",
)

# The standard library's encoder writes RFC 8785 for what a manifest holds:
# names in ASCII, strings, booleans, null, and integers within 2**53. It is ten
# times as fast as one that also knows how to spell floats.
_encode = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode


def canonical(manifest: Manifest) -> bytes:
    """Return the octets that are signed: every field of *manifest* but its signature.

    The snapshot goes in as the string that it is on the wire, not as the value
    it spells: nothing then depends on how a language reads JSON numbers.

    Raises:
        ValueError: A number is too large to be exact in JSON, or a text is not Unicode.
    """
    resources = manifest.resources
    limits = {name: getattr(resources, name) for name in _LIMITS}
    numbers = {
        "depth": manifest.depth,
        "epoch": manifest.epoch,
        "issue_time_us": manifest.issue_us,
        "expire_time_us": manifest.expire_us,
    }
    network = resources.network
    for name, number in (
        *numbers.items(),
        *limits.items(),
        ("egress_limit_bytes", network.egress_limit_bytes),
    ):
        if number is not None and abs(number) > MAX_EXACT_INTEGER:
            raise ValueError(f"{name}: is too large to be exact in JSON")
    return _encode(
        {
            "manifest_id": manifest.manifest_id,
            "contract_id": manifest.contract_id,
            "worker_id": manifest.worker_id,
            "parent_id": manifest.parent_id,
            "state_snapshot_json": manifest.state_snapshot_json,
            "resources": {
                **limits,
                "network": {
                    "allow_controller": network.allow_controller,
                    "allow_external": network.allow_external,
                    "allow_loopback": network.allow_loopback,
                    "allowed_hosts": network.allowed_hosts,
                    "egress_limit_bytes": network.egress_limit_bytes,
                },
            },
            "key_id": manifest.key_id,
            **numbers,
        }
    ).encode()


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
