"""Check a manifest's signature without asking anyone.

The controller signs when it issues and checks when a worker registers. Whoever
holds the secret can check too, in any language: ``docs/manifest.md`` has the
canonical form and test vectors.
"""

from __future__ import annotations

import dataclasses
import hmac
import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from replication import _checks
from replication._resources import BYTES_PER_MB

if TYPE_CHECKING:
    from replication._manifest import Manifest

__all__ = ["ManifestSigner"]

MIN_SECRET_CHARS = 8
MAX_SECRET_CHARS = 1_024

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class ManifestSigner:
    """HMAC-SHA256 over the RFC 8785 form of every field of a manifest but its signature.

    Args:
        secret: As given to the controller; 8 to 1,024 characters.

    Raises:
        ValueError: The secret is too short, too long, or blank.
    """

    def __init__(self, secret: str) -> None:
        self._key = check_secret(secret).encode()

    def __repr__(self) -> str:
        return "ManifestSigner(secret=…)"

    def sign(self, manifest: Manifest) -> Manifest:
        """Return a copy of *manifest* with its signature.

        A signature alone makes no manifest good: the controller knows which it
        issued.

        Raises:
            ValueError: Its state_snapshot is not JSON.
        """
        signed = dataclasses.replace(manifest, signature=self._digest(manifest).hex())
        # The copy holds the very text that was signed.
        object.__setattr__(signed, "_wire", manifest._wire)  # noqa: SLF001
        return signed

    def verify(self, manifest: Manifest) -> bool:
        """Return whether this secret made the signature on *manifest*, in constant time."""
        try:
            return hmac.compare_digest(self._digest(manifest), bytes.fromhex(manifest.signature))
        except ValueError:
            return False

    def _digest(self, manifest: Manifest) -> bytes:
        return hmac.digest(self._key, canonical(manifest), "sha256")


def check_secret(secret: object) -> str:
    """Return *secret* when it can sign.

    Raises:
        ValueError: It is no string, blank, or not of 8 to 1,024 characters. The
            message holds no part of it.
    """
    checked = _checks.text("secret", secret, MAX_SECRET_CHARS, min_chars=MIN_SECRET_CHARS)
    if not checked.strip():
        raise ValueError("secret: must not be blank")
    return checked


def canonical(manifest: Manifest) -> bytes:
    """Return the octets that are signed.

    RFC 8785 sorts keys and writes numbers as JavaScript does; for our keys, all
    ASCII, and our numbers, all whole, the standard library does the same.
    """
    resources, policy = manifest.resources, manifest.resources.network_policy
    fields = {
        "manifest_id": manifest.manifest_id,
        "contract_id": manifest.contract_id,
        "worker_id": manifest.worker_id,
        "parent_id": manifest.parent_id or "",
        "depth": manifest.depth,
        "epoch": manifest.epoch,
        "state_snapshot_json": manifest.state_snapshot_json,
        "resources": {
            "cpu_millis": round(resources.cpu_limit * 1_000),
            "memory_limit_bytes": _bytes(resources.memory_limit_mb),
            "pids_limit": resources.pids_limit or 0,
            "open_files_limit": resources.open_files_limit or 0,
            "file_size_limit_bytes": _bytes(resources.file_size_limit_mb),
            "workspace_limit_bytes": _bytes(resources.workspace_limit_mb),
            "tmp_limit_bytes": _bytes(resources.tmp_limit_mb),
            "cpu_time_limit_us": (
                None
                if resources.cpu_time_limit_seconds is None
                else round(resources.cpu_time_limit_seconds * 1_000_000)
            ),
            "network": {
                "allow_controller": policy.allow_controller,
                "allow_external": policy.allow_external,
                "allow_loopback": policy.allow_loopback,
                "allowed_hosts": list(policy.allowed_hosts),
                "egress_limit_bytes": _bytes(policy.egress_limit_mb),
            },
            "output_limit_bytes": _bytes(resources.output_limit_mb),
        },
        "issue_time_us": _microseconds(manifest.issued_at),
        "expire_time_us": _microseconds(manifest.expires_at or _EPOCH),
        "key_id": manifest.key_id,
    }
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _bytes(megabytes: float | None) -> int:
    return 0 if megabytes is None else int(megabytes * BYTES_PER_MB)


def _microseconds(value: datetime) -> int:
    elapsed = value - _EPOCH
    return (elapsed.days * 86_400 + elapsed.seconds) * 1_000_000 + elapsed.microseconds
