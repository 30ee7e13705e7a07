"""The rules of a birth."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_controller import admission
from hayflick_controller.admission import Denial, Facts, FamilyFacts, Grant, Presented
from hayflick_controller.model import (
    EVERYTHING,
    Contract,
    Latch,
    Manifest,
    ManifestStatus,
    Policy,
    Resources,
    Scope,
    ScopeKind,
    State,
    Worker,
)
from hayflick_controller.terms import FamilyBudget, Terms

NOW_US = 1_000_000_000
CONTRACT = Contract("contract", Policy(max_depth=3, max_replicas=10, cooldown_us=1_000_000), "key", 0)
MANIFEST = Manifest(
    "manifest", "contract", "child", "parent", 1, 0, "{}", Resources(100, 2**25), NOW_US, NOW_US + 1, "key"
)
PARENT = Worker(
    worker_id="parent",
    contract_id="contract",
    parent_id="",
    root_id="parent",
    path="parent/",
    depth=0,
    node_id="node",
    state=State.RUNNING,
    create_us=0,
    expire_us=None,
    last_heartbeat_us=0,
    manifest=MANIFEST,
)
ROOT = Facts(NOW_US, CONTRACT)
CHILD = Facts(NOW_US, CONTRACT, parent_id="parent", parent=PARENT)
GOOD = Presented(MANIFEST, signature_valid=True, status=ManifestStatus.RESERVED)

scopes = st.sampled_from(
    [
        EVERYTHING,
        Scope(ScopeKind.CONTRACT, "contract"),
        Scope(ScopeKind.WORKER, "parent"),
        Scope(ScopeKind.QUARANTINE, "parent"),
    ]
)
latches = st.lists(
    st.builds(Latch, scopes, st.booleans(), st.integers(0, 5)),
    max_size=4,
    unique_by=lambda latch: latch.scope,
).map(tuple)
policies = st.builds(
    Policy,
    max_depth=st.integers(0, 4),
    max_replicas=st.integers(1, 6),
    cooldown_us=st.sampled_from([0, 1, 5_000_000]),
)
contracts = st.builds(
    Contract,
    st.just("contract"),
    policies,
    st.just("key"),
    st.just(0),
    active_count=st.integers(0, 6),
    reserved_count=st.integers(0, 6),
)
parents = st.none() | st.builds(
    lambda state, depth, contract_id, expire_us: replace(
        PARENT, state=state, depth=depth, contract_id=contract_id, expire_us=expire_us
    ),
    st.sampled_from(State),
    st.integers(0, 5),
    st.sampled_from(["contract", "contract", "other"]),
    st.sampled_from([None, NOW_US, NOW_US + 1]),
)
facts = st.builds(
    lambda contract, latches, parent, asked, last: Facts(
        NOW_US,
        contract,
        latches,
        "parent" if asked else "",
        parent if asked else None,
        last if asked and parent else None,
    ),
    contracts,
    latches,
    parents,
    st.booleans(),
    st.none() | st.integers(NOW_US - 10_000_000, NOW_US),
)


def reason(decision: Grant | Denial) -> str:
    """Name why a birth was refused."""
    assert isinstance(decision, Denial)
    return decision.error().reason_name


@given(facts, st.none() | st.integers(0, 3))
def test_a_grant_breaks_no_rule(facts: Facts, claimed: int | None) -> None:
    """Whatever is granted has room, an open parent, no latch over it, and its parent's depth plus one."""
    decision = admission.decide_issue(facts, claimed)
    if isinstance(decision, Denial):
        return
    policy = facts.contract.policy
    assert not any(latch.engaged for latch in facts.latches)
    assert facts.contract.active_count + facts.contract.reserved_count < policy.max_replicas
    assert decision.depth <= policy.max_depth
    if facts.parent_id:
        assert facts.parent is not None
        assert facts.parent.state in admission.BREEDING_STATES
        assert facts.parent.contract_id == facts.contract.contract_id
        assert decision.depth == facts.parent.depth + 1
        assert facts.last_birth_us is None or NOW_US - facts.last_birth_us >= policy.cooldown_us
    else:
        assert decision.depth == 0
        assert not claimed


@given(facts)
def test_the_first_broken_rule_is_the_reason(facts: Facts) -> None:
    """A denial is that of the first rule, in the published order, which refuses."""
    decision = admission.decide_issue(facts)
    refusals = [refusal for rule in admission.RULES if (refusal := rule(facts)) is not None]
    assert decision == refusals[0] if refusals else isinstance(decision, Grant)


@given(facts, st.integers(0, 4), st.integers(0, 30), st.booleans(), st.sampled_from([None, *ManifestStatus]))
def test_what_is_registered_could_be_issued(
    facts: Facts, depth: int, epoch: int, valid: bool, status: ManifestStatus | None
) -> None:
    """A registration is granted only where an issue would be, in its epoch, for a good manifest."""
    presented = Presented(replace(MANIFEST, depth=depth, epoch=epoch), valid, status)
    decision = admission.decide_register(facts, presented)
    if isinstance(decision, Grant):
        assert isinstance(admission.decide_issue(facts), Grant)
        assert valid
        assert status is ManifestStatus.RESERVED
        assert (decision.depth, decision.epoch) == (depth, epoch)
        assert epoch == facts.epoch


@given(facts)
def test_any_change_of_a_switch_makes_a_manifest_stale(facts: Facts) -> None:
    """A manifest issued before any kill switch over it changed can not be registered after."""
    issued = admission.decide_issue(facts)
    if not isinstance(issued, Grant):
        return
    for index, latch in enumerate(facts.latches):
        if latch.scope.kind is ScopeKind.QUARANTINE:
            continue
        changed = list(facts.latches)
        changed[index] = replace(latch, epoch=latch.epoch + 2)  # engaged, and released again
        later = replace(facts, latches=tuple(changed))
        presented = replace(GOOD, manifest=replace(MANIFEST, depth=issued.depth, epoch=issued.epoch))
        assert reason(admission.decide_register(later, presented)) == "KILL_SWITCH_ENGAGED"


def test_a_root_is_generation_zero() -> None:
    """A root that claims another depth is refused; without a claim it is 0."""
    assert reason(admission.decide_issue(ROOT, 1)) == "ROOT_DEPTH_NOT_ZERO"
    assert admission.decide_issue(ROOT, 0) == admission.decide_issue(ROOT) == Grant(depth=0, epoch=0)


def test_the_callers_depth_is_ignored_for_a_child() -> None:
    """A child's depth comes from its parent's record."""
    assert admission.decide_issue(CHILD, 77) == Grant(depth=1, epoch=0)


def test_the_first_child_may_come_at_once() -> None:
    """Cooldown lies between births: there is none before the first, and none for roots."""
    assert isinstance(admission.decide_issue(CHILD), Grant)
    assert isinstance(admission.decide_issue(replace(ROOT, last_birth_us=NOW_US)), Grant)


@given(st.integers(0, 999_999))
def test_cooldown_says_when(elapsed_us: int) -> None:
    """A denial for cooldown says after how long the same birth is allowed, exactly."""
    early = replace(CHILD, last_birth_us=NOW_US - elapsed_us)
    denial = admission.decide_issue(early)
    assert isinstance(denial, Denial)
    assert denial.retry_after_us is not None
    then = replace(early, now_us=NOW_US + denial.retry_after_us)
    assert isinstance(admission.decide_issue(then), Grant)
    assert reason(admission.decide_issue(replace(then, now_us=then.now_us - 1))) == "COOLDOWN_NOT_SATISFIED"


@pytest.mark.parametrize("state", sorted(set(State) - admission.BREEDING_STATES))
def test_the_dying_have_no_children(state: State) -> None:
    """A parent that is stopping or has ended is no parent."""
    dying = replace(CHILD, parent=replace(PARENT, state=state))
    assert reason(admission.decide_issue(dying)) == "PARENT_UNKNOWN"


def test_forged_and_used_come_first() -> None:
    """A forged or used manifest is called so even under an engaged kill switch."""
    killed = replace(CHILD, latches=(Latch(EVERYTHING, engaged=True, epoch=1),))
    forged = replace(GOOD, signature_valid=False)
    used = replace(GOOD, status=ManifestStatus.REGISTERED)
    assert reason(admission.decide_register(killed, forged)) == "MANIFEST_SIGNATURE_INVALID"
    assert reason(admission.decide_register(killed, used)) == "MANIFEST_ALREADY_USED"


@pytest.mark.parametrize(
    ("presented", "now_us"),
    [
        (GOOD, MANIFEST.expire_us),
        (replace(GOOD, status=ManifestStatus.RETURNED), NOW_US),
        (replace(GOOD, status=None), NOW_US),
    ],
    ids=["too late", "given back", "forgotten"],
)
def test_a_manifest_without_a_reservation_is_expired(presented: Presented, now_us: int) -> None:
    """A manifest is good until its very last microsecond, and only while it holds its slot."""
    assert isinstance(admission.decide_register(CHILD, GOOD), Grant)
    late = replace(CHILD, now_us=now_us)
    assert reason(admission.decide_register(late, presented)) == "MANIFEST_EXPIRED"


def test_every_denial_has_an_audit_name() -> None:
    """Each rule's denial names itself to the audit log and to programs."""
    full = replace(CONTRACT, active_count=10)
    cases = {
        "deny_kill_switch": replace(ROOT, latches=(Latch(EVERYTHING, engaged=True),)),
        "deny_quarantine": replace(
            CHILD, latches=(Latch(Scope(ScopeKind.QUARANTINE, "parent"), engaged=True),)
        ),
        "deny_quota": replace(ROOT, contract=full),
        "deny_parent_unknown": replace(CHILD, parent=None),
        "deny_cooldown": replace(CHILD, last_birth_us=NOW_US),
        "deny_depth": replace(CHILD, parent=replace(PARENT, depth=3)),
    }
    for name, case in cases.items():
        denial = admission.decide_issue(case)
        assert isinstance(denial, Denial)
        assert denial.decision == name
        assert denial.reason != ErrorReason.ERROR_REASON_UNSPECIFIED


BUDGETED = replace(
    CONTRACT, policy=replace(CONTRACT.policy, terms=Terms(family_budget=FamilyBudget(0, 0, 0, 5, 60)))
)


@pytest.mark.parametrize(
    ("family", "field", "limit"),
    [
        (FamilyFacts("parent", NOW_US, 5), "family_budget.max_spawns", 5),
        (FamilyFacts("parent", NOW_US - 60, 0), "family_budget.wall_time_limit", 0.00006),
        (FamilyFacts("parent", NOW_US - 60, 9), "family_budget.max_spawns", 5),
    ],
)
def test_a_family_that_used_up_its_budget(family: FamilyFacts, field: str, limit: float) -> None:
    """The limit that was reached is named with the root; that comes before what follows from it."""
    over = replace(CHILD, contract=BUDGETED, family=family, parent=replace(PARENT, expire_us=NOW_US))
    denial = admission.decide_issue(over)
    assert isinstance(denial, Denial)
    assert reason(denial) == "FAMILY_BUDGET_EXCEEDED"
    assert denial.metadata == {"field": field, "limit": limit, "root_id": "parent"}


def test_a_family_with_some_left() -> None:
    """One birth before its last, and an instant before its end, a family may still grow."""
    family = FamilyFacts("parent", NOW_US - 59, 4)
    assert isinstance(admission.decide_issue(replace(CHILD, contract=BUDGETED, family=family)), Grant)


def test_a_child_is_held_to_its_parent_at_registration_too() -> None:
    """What was issued is asked again: its parent may have less by then."""
    wide = replace(MANIFEST, resources=Resources(101, 2**25))
    facts = replace(CHILD, resources=wide.resources)
    decision = admission.decide_register(facts, Presented(wide, True, ManifestStatus.RESERVED))
    assert reason(decision) == "EXCEEDS_PARENT"
