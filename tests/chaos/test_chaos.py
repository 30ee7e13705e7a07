"""Promises 1 to 4, while everything fails at random; judged by the log alone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from postgres_cluster import Cluster

from .conftest import REPORTS
from .fleet import Fleet, Size
from .partitions import cut_off_again_and_again
from .run import Report, keep, settle, storm

pytestmark = [pytest.mark.chaos, pytest.mark.layers("kill", "uid-range")]


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory with a short name: a socket's path has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="hf-chaos-") as made:
        yield Path(made)


def test_one_controller(directory: Path, chaos_seed: int, chaos_seconds: float) -> None:
    """Whatever of one controller, one node and the logger dies or stops, no promise is broken."""
    report = Report("one controller on SQLite", chaos_seed)
    _weather(Fleet(directory, Size()), report, chaos_seconds * 0.45)


def test_two_controllers(directory: Path, cluster: Cluster, chaos_seed: int, chaos_seconds: float) -> None:
    """Two controllers on PostgreSQL keep every promise between them, though the server dies too."""
    report = Report("two controllers on PostgreSQL, two nodes", chaos_seed)
    size = Size(controllers=2, orchestrators=2)
    _weather(Fleet(directory, size, cluster), report, chaos_seconds * 0.35)


def test_partitions(directory: Path, chaos_seed: int, chaos_seconds: float) -> None:
    """However a node is cut off, its workers are dead before anybody else may take their places."""
    report = Report("partitions", chaos_seed)

    def cut_off(fleet: Fleet) -> None:
        cut_off_again_and_again(fleet, report, chaos_seconds * 0.2)
        settle(fleet, report)

    _run(Fleet(directory, Size(lease_seconds=4.0, beat_seconds=0.25)), report, cut_off)


def _weather(fleet: Fleet, report: Report, seconds: float) -> None:
    _run(fleet, report, lambda fleet: storm(fleet, report, seconds))


def _run(fleet: Fleet, report: Report, act: Callable[[Fleet], None]) -> None:
    """Do *act* with a fleet that runs; whatever goes wrong, print the report and keep the log."""
    REPORTS.append(report)
    with fleet:
        try:
            act(fleet)
        except BaseException:
            report.kept = report.kept or keep(fleet)
            raise
    assert not report.wrong, report.wrong
