"""The implementations of a store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from stores import Place, opened

from hayflick_controller.store import Commit
from hayflick_controller.store.sql import SqlStore


@pytest.fixture(params=["sqlite file", "sqlite memory", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """The implementations under test."""
    if request.param == "postgresql":
        return Place(request.param, request.getfixturevalue("cluster").new_database())
    return Place(request.param, "" if "memory" in request.param else str(tmp_path / "data" / "controller.db"))


@pytest.fixture
def commits() -> list[Commit]:
    """What the store told after its commits."""
    return []


@pytest.fixture
async def store(place: Place, commits: list[Commit]) -> AsyncIterator[SqlStore]:
    """An open store."""
    made = await opened(place.store(), commits)
    commits.clear()
    yield made
    await made.close()
