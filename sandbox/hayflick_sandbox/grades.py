"""What findings amount to: the isolation grade. Pure.

A grade is what every check of it and of those below it found to hold. Nothing
else counts: not what was configured, nor what the machine could do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from hayflick_sandbox import outside, selfprobe
from hayflick_sandbox.messages import Finding

GRADES = ("C", "B", "A")
"""From the least to the most that a sandbox can be found to hold."""
NOT_ASKED = "not asked"


class Criterion(Protocol):
    """A check as the judge sees it."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def layer(self) -> str:
        """The layer that it proves."""

    @property
    def grade(self) -> str:
        """The lowest grade that needs it."""

    @property
    def reason(self) -> str:
        """What could be done if it did not hold."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What findings amount to.

    Attributes:
        grade: One of :data:`GRADES`, or empty when no worker may run there.
        failed: What did not hold, that which costs the most first.
    """

    grade: str
    failed: tuple[Finding, ...]

    def short_of(self, grade: str) -> Finding | None:
        """Return the first finding that keeps it from *grade*; ``None`` when it has it."""
        if at_least(self.grade, grade):
            return None
        return self.failed[0]


def at_least(grade: str, floor: str) -> bool:
    """Return whether *grade* holds all that *floor* does; an empty floor asks for nothing."""
    if not floor:
        return True
    return grade in GRADES and GRADES.index(grade) >= GRADES.index(floor)


def criteria(landlock_abi: int) -> tuple[Criterion, ...]:
    """Return every check, inside and outside, that a kernel with this ABI of Landlock answers."""
    inside = (check for check in selfprobe.CHECKS if check.landlock_abi <= landlock_abi)
    return (*inside, *outside.CHECKS)


def judge(asked: Sequence[Criterion], findings: Iterable[Finding]) -> Verdict:
    """Return what *findings* amount to, when all of *asked* should have been answered.

    Raises:
        ValueError: a finding is none of *asked*, or comes twice.
    """
    found: dict[str, Finding] = {}
    names = {criterion.name for criterion in asked}
    for finding in findings:
        if finding.name not in names or finding.name in found:
            raise ValueError(f"{finding.name!r} is no finding of these checks")
        found[finding.name] = finding
    failed: dict[str, list[Finding]] = {grade: [] for grade in GRADES}
    for criterion in asked:
        finding = found.get(criterion.name) or Finding(criterion.name, False, NOT_ASKED)
        if not finding.held:
            failed[criterion.grade].append(finding)
    reached = ""
    for grade in GRADES:
        if failed[grade]:
            break
        reached = grade
    return Verdict(reached, tuple(finding for grade in GRADES for finding in failed[grade]))


def best(missing_layers: Iterable[str]) -> str:
    """Return the best grade that a machine without these layers can give; empty for none."""
    missing = frozenset(missing_layers)
    # No check is about these two: where one is missing, nothing is there to be checked.
    if missing & {"kernel", "launch"}:
        return ""
    asked: tuple[Criterion, ...] = (*selfprobe.CHECKS, *outside.CHECKS)
    return judge(asked, (Finding(check.name, check.layer not in missing, "") for check in asked)).grade
