"""Every wall holds against the attack on it, and every attack succeeds once its wall is taken away."""

from __future__ import annotations

import os
import re

import pytest

from . import host
from .checklist import CHECKLIST
from .conftest import FINDINGS, Trials
from .rows import ROWS
from .table import Row

ids = [row.name for row in ROWS]


@pytest.mark.parametrize("row", ROWS, ids=ids)
def test_the_wall_holds(row: Row, trials: Trials) -> None:
    """The attack is refused inside, and outside nothing changed."""
    if absent := trials.missing.intersection(row.needs):
        FINDINGS.degraded[row.name] = f"this node lacks {', '.join(sorted(absent))}"
        pytest.skip(f"degraded: {FINDINGS.degraded[row.name]}")
    verdict = trials.verdict(row, weakened=False)
    assert "error" not in verdict, verdict
    assert verdict["held"], verdict["seen"]
    assert FINDINGS.host_changed[row.name] == []


@pytest.mark.parametrize("row", [row for row in ROWS if not row.informational], ids=lambda row: row.name)
def test_the_attack_succeeds_without_the_wall(row: Row, trials: Trials) -> None:
    """The very same attack reports the hole once its walls are gone, and the host is unchanged still."""
    if row.name in FINDINGS.degraded or trials.missing.intersection(row.needs):
        pytest.skip("degraded")
    if row.weakening_needs_root and os.geteuid() != 0:
        pytest.skip("only root can take this wall away")
    assert row.weakened_by
    verdict = trials.verdict(row, weakened=True)
    assert "error" not in verdict, verdict
    assert not verdict["held"], verdict["seen"]
    assert re.search(row.hole, verdict["seen"]), verdict["seen"]
    assert FINDINGS.host_changed[row.name] == []


def test_only_what_is_taken_away_is_missing(trials: Trials) -> None:
    """Where a test could weaken everything and weakens nothing, every wall that is attacked inside holds."""
    fallen = {name: one for name, one in trials.unweakened().items() if not one.get("held")}
    degraded = {row.name for row in ROWS if trials.missing.intersection(row.needs)}
    assert fallen.keys() <= degraded, fallen


def test_every_row_has_its_number() -> None:
    """No row is about a wall that the checklist does not name."""
    assert {row.number for row in ROWS} <= set(CHECKLIST)
    assert len(set(ids)) == len(ids)


def test_a_changed_host_is_seen() -> None:
    """A fact of the host that changed is reported, and one that did not is not."""
    before = host.look({"mounts", "settings", "devices"})
    after = {**before, "devices": [*before["devices"], "evil"]}  # type: ignore[misc]
    assert host.changed(before, after) == ["devices"]


def test_every_number_of_the_checklist_has_a_row() -> None:
    """No wall is promised that nobody attacks."""
    assert {row.number for row in ROWS} == set(CHECKLIST)
