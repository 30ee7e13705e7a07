"""Any order of births, ends and faults: the controller does what a small model of its promises does."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from simulation.births import Births
from simulation.endings import Endings
from simulation.faults import Faults


class Machine(Births, Endings, Faults):
    """All rules together."""


COMMON = settings(
    deadline=None,  # an example is as long as its steps, and those of a busy machine take longer
    print_blob=True,
    # Starting a controller on a database of its own is what makes an example slow.
    suppress_health_check=[HealthCheck.too_slow],
)


def test_any_history_keeps_every_promise() -> None:
    """Whatever happens in whatever order, the controller answers and records as its promises foresee."""
    run_state_machine_as_test(Machine, settings=settings(COMMON, max_examples=40, stateful_step_count=30))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_long_histories_keep_every_promise() -> None:
    """The same holds for longer histories, and for as many of them as HAYFLICK_HISTORIES says."""
    count = int(os.environ.get("HAYFLICK_HISTORIES", "30"))
    run_state_machine_as_test(Machine, settings=settings(COMMON, max_examples=count, stateful_step_count=80))
