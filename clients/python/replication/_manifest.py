"""The signed permission for one birth, as the SDK shows it."""

# ruff: noqa: TRY004 -- users are promised one kind of error for every bad value

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from replication import _checks
from replication._resources import ResourceSpec

MAX_SNAPSHOT_BYTES = 1024 * 1024
MAX_UINT32 = 2**32 - 1
MAX_UINT64 = 2**64 - 1
_MAX_ID_CHARS = 128


@dataclass(frozen=True)
class Manifest:
    """The signed permission for one birth.

    Made by :meth:`~replication.Controller.issue_manifest`. It is good once, until
    ``expires_at``; a changed copy, say from :func:`dataclasses.replace`, is refused
    when its worker registers.

    Attributes:
        worker_id: The identity the new worker will have.
        parent_id: Its parent; ``None`` for a root.
        depth: Its generation; 0 for a root.
        state_snapshot: What it starts from: JSON values.
        issued_at: When it was issued, in UTC.
        resources: What it may use.
        signature: The HMAC-SHA256 over all other fields, in lower-case hex.
        contract_id: The contract that allowed it.
        manifest_id: Unique among all manifests; what makes it single-use.
        expires_at: When it stops being good, in UTC.
        key_id: The key that signed it.
        epoch: The sum of the epochs of the kill switches over it.

    Raises:
        ValueError: A field cannot be a manifest's; the message begins with it.
    """

    worker_id: str
    parent_id: str | None
    depth: int
    state_snapshot: dict[str, Any]
    issued_at: datetime
    resources: ResourceSpec
    signature: str = ""
    contract_id: str = ""
    manifest_id: str = ""
    expires_at: datetime | None = None
    key_id: str = ""
    epoch: int = 0
    # The proto3 JSON it came as. What was signed are those very values: text
    # that is parsed and written again may differ in a digit or a space. A
    # replaced copy has none, and is sent as its fields say.
    _wire: Mapping[str, Any] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("worker_id", "contract_id", "manifest_id", "key_id", "signature"):
            _checks.text(name, getattr(self, name), _MAX_ID_CHARS)
        if self.parent_id is not None:
            _checks.text("parent_id", self.parent_id, _MAX_ID_CHARS)
        _checks.integer("depth", self.depth, 0, MAX_UINT32)
        _checks.integer("epoch", self.epoch, 0, MAX_UINT64)
        if not isinstance(self.resources, ResourceSpec):
            raise ValueError(f"resources: must be a ResourceSpec, not {self.resources!r}")
        for name in ("issued_at", "expires_at"):
            _require_aware(name, getattr(self, name), optional=name == "expires_at")

    @property
    def state_snapshot_json(self) -> str:
        """The snapshot as JSON text.

        Raises:
            ValueError: It is not JSON, or over 1 MiB.
        """
        if self._wire is not None:
            original: str = self._wire.get("stateSnapshotJson", "{}")
            if _same_json(json.loads(original), self.state_snapshot):
                return original
        return _checks.json_object("state_snapshot", self.state_snapshot, MAX_SNAPSHOT_BYTES)


def _same_json(one: object, other: object) -> bool:
    """Return whether two values are the same JSON; unlike ``==``, 1 is not True."""
    try:
        return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    except (TypeError, ValueError):
        return False


def _require_aware(name: str, value: datetime | None, *, optional: bool) -> None:
    if value is None and optional:
        return
    if not isinstance(value, datetime) or value.utcoffset() is None:
        raise ValueError(f"{name}: must be a datetime with a time zone, such as UTC, not {value!r}")
    try:
        value.astimezone(UTC)
    except OverflowError:
        raise ValueError(f"{name}: is out of range in UTC") from None
