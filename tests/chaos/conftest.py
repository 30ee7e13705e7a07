"""What a chaos run is told, and the table that it prints."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .run import Report

SECONDS = 300.0
SLACK_SECONDS = 300.0
REPORTS: list[Report] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of `make chaos`."""
    group = parser.getgroup("chaos")
    group.addoption(
        "--chaos-seconds", type=float, default=SECONDS, help="how long faults are injected, in all"
    )
    group.addoption("--chaos-seed", type=int, default=None, help="of every choice; printed by each run")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave these tests out unless they are asked for: they take minutes, and everything they can get."""
    own = [item for item in items if Path(__file__).parent in item.path.parents]
    if "chaos" not in str(config.option.markexpr):
        items[:] = [item for item in items if item not in own]
        config.hook.pytest_deselected(items=own)
        return
    limit = float(config.getoption("--chaos-seconds")) + SLACK_SECONDS
    for item in own:
        item.add_marker(pytest.mark.timeout(limit))


@pytest.fixture(scope="session")
def chaos_seed(pytestconfig: pytest.Config) -> int:
    """The seed of every choice."""
    given = pytestconfig.getoption("--chaos-seed")
    return secrets.randbelow(2**31) if given is None else int(given)


@pytest.fixture(scope="session")
def chaos_seconds(pytestconfig: pytest.Config) -> float:
    """How long faults are injected in all."""
    return float(pytestconfig.getoption("--chaos-seconds"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what was injected and what was found."""
    for report in REPORTS:
        terminalreporter.write_line("")
        for line in report.lines():
            terminalreporter.write_line(line)
