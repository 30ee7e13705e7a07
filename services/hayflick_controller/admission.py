"""May this worker be born? Facts in, decision out. Pure.

A birth is decided twice. Issuing a manifest *reserves* a slot and a place in
the parent's cooldown; registering it *commits* them. Both ask the same rules, in
the order that :data:`RULES` lists, so that nothing that happened in between (a
kill, a quarantine, a burst of births) can be passed by a manifest issued ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_controller import narrowing
from hayflick_controller.clock import seconds
from hayflick_controller.model import (
    Contract,
    Latch,
    Manifest,
    ManifestStatus,
    Resources,
    ScopeKind,
    State,
    Worker,
)
from hayflick_rpc.errors import HayflickError

BREEDING_STATES = frozenset({State.STARTING, State.RUNNING, State.QUARANTINED})
"""States in which a worker counts as a parent; a quarantined one is refused by its own rule."""


@dataclass(frozen=True, slots=True)
class FamilyFacts:
    """What is true of the family that a birth would join.

    Attributes:
        root_id: Its root.
        root_create_us: When the root was born.
        spawn_count: Births below the root so far; at issue also those promised.
    """

    root_id: str
    root_create_us: int
    spawn_count: int


@dataclass(frozen=True, slots=True)
class Facts:
    """What is true of one birth, read in the transaction that decides it.

    Attributes:
        contract: As it is; its ``reserved_count`` excludes reservations whose
            time is over and, at registration, the manifest's own.
        latches: Every latch over the birth: everything's, the contract's, and
            those over the parent or an ancestor of it, quarantines included.
        parent_id: The parent asked for; empty for a root.
        parent: Its record, or ``None`` when there is none.
        last_birth_us: The parent's last birth: registrations count, and at
            issue also reservations that are still good.
        resources: What the worker would have; ``None`` while nobody said.
        family: The parent's family, where the contract gives families a budget.
    """

    now_us: int
    contract: Contract
    latches: tuple[Latch, ...] = ()
    parent_id: str = ""
    parent: Worker | None = None
    last_birth_us: int | None = None
    resources: Resources | None = None
    family: FamilyFacts | None = None

    @property
    def epoch(self) -> int:
        """The sum of the epochs of the kill switches over the birth; any change of one changes it."""
        return sum(latch.epoch for latch in self.latches if latch.scope.kind is not ScopeKind.QUARANTINE)

    @property
    def depth(self) -> int:
        """The generation that the worker will be of: never the caller's word."""
        return self.parent.depth + 1 if self.parent is not None else 0


@dataclass(frozen=True, slots=True)
class Presented:
    """A manifest as a node presented it, and what the record says of it."""

    manifest: Manifest
    signature_valid: bool
    status: ManifestStatus | None
    key_revoked: bool = False


@dataclass(frozen=True, slots=True)
class Grant:
    """The birth is allowed, with the facts that its manifest must state."""

    depth: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Denial:
    """The birth is refused: why, for programs (reason), the audit log (decision) and people.

    The audit log keeps the numbers in ``metadata`` as numbers; an error's
    metadata can hold text alone.
    """

    reason: ErrorReason.ValueType
    decision: str
    message: str
    metadata: Mapping[str, str | int | float] = field(default_factory=dict)
    retry_after_us: int | None = None

    def error(self) -> HayflickError:
        """Return the denial as the error that the caller gets."""
        retry = None if self.retry_after_us is None else seconds(self.retry_after_us)
        metadata = {name: _text(value) for name, value in self.metadata.items()}
        return HayflickError(self.reason, self.message, metadata=metadata, retry_after_seconds=retry)


def _text(value: str | float) -> str:
    return f"{value:.6f}" if isinstance(value, float) else str(value)


Rule = Callable[[Facts], Denial | None]


def kill_switch(facts: Facts) -> Denial | None:
    """No birth under an engaged kill switch."""
    for latch in facts.latches:
        if latch.engaged and latch.scope.kind is not ScopeKind.QUARANTINE:
            return Denial(
                ErrorReason.ERROR_REASON_KILL_SWITCH_ENGAGED,
                "deny_kill_switch",
                f"the kill switch over {latch.scope.key} is engaged: {latch.reason}",
                {"scope": latch.scope.key, "epoch": facts.epoch},
            )
    return None


def quarantine(facts: Facts) -> Denial | None:
    """No birth to a quarantined parent, nor below one."""
    for latch in facts.latches:
        if latch.engaged and latch.scope.kind is ScopeKind.QUARANTINE:
            return Denial(
                ErrorReason.ERROR_REASON_QUARANTINED,
                "deny_quarantine",
                f"worker {latch.scope.id} is quarantined: {latch.reason}",
                {"worker_id": latch.scope.id},
            )
    return None


def quota(facts: Facts) -> Denial | None:
    """Never more workers, living and promised, than the contract allows."""
    contract = facts.contract
    if contract.active_count + contract.reserved_count < contract.policy.max_replicas:
        return None
    return Denial(
        ErrorReason.ERROR_REASON_REPLICA_QUOTA_EXCEEDED,
        "deny_quota",
        f"{contract.active_count} workers live and {contract.reserved_count} are promised; "
        f"the contract allows {contract.policy.max_replicas}",
        {
            "max_replicas": contract.policy.max_replicas,
            "active_count": contract.active_count,
            "reserved_count": contract.reserved_count,
        },
    )


def parent_known(facts: Facts) -> Denial | None:
    """A parent must be a live worker of the same contract, within its own life."""
    if not facts.parent_id:
        return None
    parent = facts.parent
    if parent is None or parent.contract_id != facts.contract.contract_id:
        state = "unknown"
    elif parent.state not in BREEDING_STATES:
        state = parent.state.value
    elif parent.expire_us is not None and parent.expire_us <= facts.now_us:
        state = "expired"
    else:
        return None
    return Denial(
        ErrorReason.ERROR_REASON_PARENT_UNKNOWN,
        "deny_parent_unknown",
        f"{facts.parent_id} is not a live worker of this contract",
        {"parent_id": facts.parent_id, "state": state},
    )


def family_budget(facts: Facts) -> Denial | None:
    """No birth that its family has no budget left for, in number or in time."""
    budget, family = facts.contract.policy.terms.family_budget, facts.family
    if budget is None or family is None:
        return None
    if budget.max_spawns and family.spawn_count >= budget.max_spawns:
        field, limit = "max_spawns", float(budget.max_spawns)
        words = f"{family.spawn_count} were born or promised below its root; the contract allows {limit:.0f}"
    elif budget.wall_time_limit_us and facts.now_us >= family.root_create_us + budget.wall_time_limit_us:
        field, limit = "wall_time_limit", seconds(budget.wall_time_limit_us)
        words = f"its root was born more than {limit:g} s ago"
    else:
        return None
    return Denial(
        ErrorReason.ERROR_REASON_FAMILY_BUDGET_EXCEEDED,
        "deny_family_budget",
        f"the budget of family {family.root_id} is used up: {words}",
        {
            "field": f"family_budget.{field}",
            "limit": int(limit) if limit.is_integer() else limit,
            "root_id": family.root_id,
        },
    )


def exceeds_parent(facts: Facts) -> Denial | None:
    """No child with more than its parent has."""
    if facts.parent is None or facts.resources is None:
        return None
    found = narrowing.excess(facts.resources, facts.parent.resources)
    if found is None:
        return None
    return Denial(
        ErrorReason.ERROR_REASON_EXCEEDS_PARENT,
        "deny_exceeds_parent",
        f"resources.{found.field}: a child may have no more than its parent, which has {found.limit}",
        {"field": f"resources.{found.field}", "limit": found.limit},
    )


def cooldown(facts: Facts) -> Denial | None:
    """One parent's births lie at least the contract's cooldown apart."""
    if not facts.parent_id or facts.last_birth_us is None:
        return None
    wait_us = facts.last_birth_us + facts.contract.policy.cooldown_us - facts.now_us
    if wait_us <= 0:
        return None
    return Denial(
        ErrorReason.ERROR_REASON_COOLDOWN_NOT_SATISFIED,
        "deny_cooldown",
        f"{facts.parent_id} replicated too recently; again in {seconds(wait_us):.3f} s",
        {"parent_id": facts.parent_id, "retry_after_seconds": seconds(wait_us)},
        retry_after_us=wait_us,
    )


def depth(facts: Facts) -> Denial | None:
    """No generation deeper than the contract allows."""
    if facts.depth <= facts.contract.policy.max_depth:
        return None
    return Denial(
        ErrorReason.ERROR_REASON_DEPTH_EXCEEDED,
        "deny_depth",
        f"the child would be of generation {facts.depth}; "
        f"the contract allows {facts.contract.policy.max_depth}",
        {"depth": facts.depth, "max_depth": facts.contract.policy.max_depth},
    )


RULES: tuple[Rule, ...] = (
    kill_switch,
    quarantine,
    quota,
    family_budget,
    parent_known,
    cooldown,
    depth,
    exceeds_parent,
)
"""The rules of any birth, in the order in which a denial is reported."""


def decide_issue(facts: Facts, claimed_depth: int | None = None) -> Grant | Denial:
    """Decide whether a manifest may be issued.

    Args:
        facts: See :class:`Facts`.
        claimed_depth: The depth that the caller named. A root must be 0; for a
            child it is ignored.
    """
    for rule in RULES:
        if denial := rule(facts):
            return denial
    if not facts.parent_id and claimed_depth:
        return Denial(
            ErrorReason.ERROR_REASON_ROOT_DEPTH_NOT_ZERO,
            "deny_depth",
            f"a root is generation 0, not {claimed_depth}",
            {"depth": claimed_depth},
        )
    return Grant(depth=facts.depth, epoch=facts.epoch)


def check_presented(presented: Presented) -> Denial | None:
    """Refuse a manifest that was never issued, or was used, whatever else holds."""
    manifest = presented.manifest
    if not presented.signature_valid:
        return Denial(
            ErrorReason.ERROR_REASON_MANIFEST_SIGNATURE_INVALID,
            "deny_signature",
            "the manifest was not issued under this contract, or was changed since",
        )
    if presented.key_revoked:
        return Denial(
            ErrorReason.ERROR_REASON_KEY_REVOKED,
            "deny_key_revoked",
            f"key {manifest.key_id}, which signed the manifest, was revoked; ask for another manifest",
            {"key_id": manifest.key_id},
        )
    if presented.status is ManifestStatus.REGISTERED:
        return Denial(
            ErrorReason.ERROR_REASON_MANIFEST_ALREADY_USED,
            "deny_replay",
            f"manifest {manifest.manifest_id} was registered before; each allows one birth",
            {"manifest_id": manifest.manifest_id},
        )
    return None


def decide_register(facts: Facts, presented: Presented) -> Grant | Denial:
    """Decide whether the birth that a manifest allows may be committed; stop conditions come after."""
    manifest = presented.manifest
    if denial := check_presented(presented) or kill_switch(facts) or _epoch(facts, manifest):
        return denial
    for rule in RULES[1:]:
        if denial := rule(facts):
            return denial
    if presented.status is not ManifestStatus.RESERVED or manifest.expire_us <= facts.now_us:
        return Denial(
            ErrorReason.ERROR_REASON_MANIFEST_EXPIRED,
            "deny_manifest_expired",
            "the manifest's time is over and its slot was given back; ask for another",
            {"expire_time": seconds(manifest.expire_us)},
        )
    if facts.depth != manifest.depth:  # a signed manifest can only differ if our own record changed
        return Denial(
            ErrorReason.ERROR_REASON_MANIFEST_SIGNATURE_INVALID,
            "deny_signature",
            "the manifest does not agree with its parent's record",
        )
    return Grant(depth=facts.depth, epoch=facts.epoch)


def _epoch(facts: Facts, manifest: Manifest) -> Denial | None:
    if manifest.epoch == facts.epoch:
        return None
    return Denial(
        ErrorReason.ERROR_REASON_KILL_SWITCH_ENGAGED,
        "deny_kill_switch",
        "a kill switch was engaged since the manifest was issued; ask for another",
        {"scope": f"contract/{facts.contract.contract_id}", "epoch": facts.epoch},
    )


def over_quota(decision: Grant | Denial) -> bool:
    """Return whether only a slot is wanting; one may be held by a manifest whose time is over."""
    return isinstance(decision, Denial) and decision.reason == ErrorReason.ERROR_REASON_REPLICA_QUOTA_EXCEEDED
