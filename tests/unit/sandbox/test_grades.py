"""Grades: what findings amount to, by rule."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hayflick_sandbox import grades, outside, probe, selfprobe
from hayflick_sandbox.grades import GRADES, NOT_ASKED, at_least, best, criteria, judge
from hayflick_sandbox.messages import MAX_FINDINGS, MAX_NAME_CHARS, Finding

ALL = criteria(selfprobe.SCOPES_ABI)
NAMES = [check.name for check in ALL]
# Those of the probe, and those that every machine has which can hold a sandbox at all.
LAYERS = {
    *("namespaces", "uid-range", "memory", "cpu", "pids", "kill", "seccomp", "tripwire", "landlock"),
    *("idmapped-mounts", "capabilities", "files", "descriptors", "environment", "process"),
}
some = st.sets(st.sampled_from(NAMES))


def rank(grade: str) -> int:
    """Return how much a grade holds."""
    return GRADES.index(grade) + 1 if grade else 0


def graded(held: set[str]) -> str:
    """Return the grade of a sandbox in which just *held* hold."""
    return judge(ALL, [Finding(name, name in held, "") for name in NAMES]).grade


@given(some, some)
def test_what_holds_more_is_never_graded_lower(held: set[str], more: set[str]) -> None:
    """A check that holds in addition never costs a grade."""
    assert rank(graded(held)) <= rank(graded(held | more))


@given(some)
def test_a_grade_needs_all_of_its_checks(missing: set[str]) -> None:
    """A grade is reached exactly when every check of it, and of those below it, holds."""
    grade = graded(set(NAMES) - missing)
    needed = {check.grade for check in ALL if check.name in missing}
    assert rank(grade) == min((GRADES.index(one) for one in needed), default=len(GRADES))


@given(some)
def test_what_was_not_asked_does_not_hold(unasked: set[str]) -> None:
    """A check without an answer counts as one that failed."""
    verdict = judge(ALL, [Finding(name, True, "") for name in NAMES if name not in unasked])
    assert verdict.grade == graded(set(NAMES) - unasked)
    assert {finding.name for finding in verdict.failed} == unasked
    assert all(finding.seen == NOT_ASKED for finding in verdict.failed)


@given(some, st.sampled_from(["", *GRADES]))
def test_the_first_finding_says_why(missing: set[str], floor: str) -> None:
    """What keeps a sandbox from a grade is a check of that grade, or of one below it."""
    verdict = judge(ALL, [Finding(name, name not in missing, "") for name in NAMES])
    finding = verdict.short_of(floor)
    assert (finding is None) == at_least(verdict.grade, floor)
    if finding is not None:
        (check,) = [check for check in ALL if check.name == finding.name]
        assert finding.name in missing
        assert rank(check.grade) <= rank(floor)


@pytest.mark.parametrize("findings", [[Finding("clone3", True, "")] * 2, [Finding("no-such", True, "")]])
def test_strange_findings_are_no_findings(findings: list[Finding]) -> None:
    """A finding that comes twice, or that nobody asked for, is an error and no grade."""
    with pytest.raises(ValueError, match="no finding of these checks"):
        judge(ALL, findings)


def test_every_check_says_what_it_is_for() -> None:
    """Each check has a name of its own, a layer, a grade and a reason."""
    assert len(set(NAMES)) == len(NAMES) <= MAX_FINDINGS
    for check in ALL:
        assert len(check.name) <= MAX_NAME_CHARS
        assert check.layer in LAYERS
        assert check.grade in GRADES
        assert check.reason
        assert not check.reason.endswith(".")
    assert {check.grade for check in ALL} == set(GRADES)


def test_layers_have_the_names_that_operators_know() -> None:
    """Each layer that can be let go has a check by which its absence costs a grade."""
    layers = {check.layer for check in (*selfprobe.CHECKS, *outside.CHECKS)}
    assert {"uid-range", "memory", "cpu", "pids", "kill", "landlock"} <= layers
    assert {"namespaces", "seccomp"} <= probe.INDISPENSABLE & layers


@pytest.mark.parametrize(
    ("missing", "grade"),
    [
        ([], "A"),
        (["landlock"], "B"),
        (["uid-range"], "B"),
        (["memory"], "C"),
        (["kill", "landlock"], "C"),
        (["seccomp"], ""),
        (["namespaces"], ""),
        (["kernel"], ""),
    ],
)
def test_the_best_grade_of_a_machine(missing: list[str], grade: str) -> None:
    """A machine's best grade is what its layers leave."""
    assert best(missing) == grade


def test_an_older_kernel_is_asked_less() -> None:
    """What a kernel's Landlock cannot do is not asked of it; that it has one at all is."""
    assert {check.name for check in ALL} - {check.name for check in criteria(1)} == {"landlock-scopes"}
    findings = [Finding(check.name, check.layer != "landlock", "") for check in criteria(0)]
    assert grades.judge(criteria(0), findings).grade == "B"
