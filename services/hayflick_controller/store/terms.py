"""What a contract says about containment, as the text of one column."""

from __future__ import annotations

import dataclasses
import functools
import json

from hayflick_controller.terms import (
    NO_TERMS,
    DenialClass,
    FamilyBudget,
    GradeFloor,
    IsolationGrade,
    Terms,
    Tripwire,
    TripwireScope,
)


def text_of(terms: Terms) -> str:
    """Return *terms* as JSON; most contracts have none, which is the empty text."""
    return "" if terms == NO_TERMS else json.dumps(dataclasses.asdict(terms), separators=(",", ":"))


@functools.lru_cache(maxsize=1_024)  # they never change, and every birth reads its contract
def from_text(text: str) -> Terms:
    """Return the terms that :func:`text_of` wrote."""
    if not text:
        return NO_TERMS
    fields = json.loads(text)
    budget = fields["family_budget"]
    return Terms(
        grade_floors=tuple(
            GradeFloor(one["from_depth"], IsolationGrade(one["min_grade"])) for one in fields["grade_floors"]
        ),
        family_budget=None if budget is None else FamilyBudget(**budget),
        tripwires=tuple(
            Tripwire(
                one["name"],
                one["count"],
                one["window_us"],
                tuple(DenialClass(name) for name in one["classes"]),
                TripwireScope(one["scope"]),
            )
            for one in fields["tripwires"]
        ),
    )
