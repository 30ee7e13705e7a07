"""docs/containment.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from hayflick_sandbox import grades

DOCS = Path(__file__).parents[3] / "docs" / "containment.md"
# The newest kernel's: it has every check that any kernel can have.
NEWEST_ABI = 7


def test_every_check_of_a_grade_is_in_the_document() -> None:
    """The table names each check with its grade and layer, and no other."""
    rows = re.findall(r"^\| ([ABC]) \| `([a-z0-9/-]+)` \| ([a-z-]+) \|", DOCS.read_text(), re.MULTILINE)
    criteria = {(one.grade, one.name, one.layer) for one in grades.criteria(NEWEST_ABI)}
    assert set(rows) == criteria
    assert len(rows) == len(criteria)


def test_every_wall_is_in_the_document() -> None:
    """The table has each number of the checklist, once, in the checklist's words."""
    checklist = Path(__file__).parents[2] / "escape" / "checklist.py"
    scope: dict[str, dict[int, str]] = {}
    exec(compile(checklist.read_text(), str(checklist), "exec"), scope)  # this checkout's own
    rows = re.findall(r"^\| (\d+) \| (.*?) \| (.*?) \|$", DOCS.read_text(), re.MULTILINE)
    assert {int(number): text for number, text, _ in rows} == scope["CHECKLIST"]
    assert all(layers != "…" for number, _, layers in rows if number != "70")
