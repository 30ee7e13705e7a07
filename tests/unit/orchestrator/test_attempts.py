"""Who is refused births too often waits, and who is not does not."""

from __future__ import annotations

import asyncio
import time

import pytest

from hayflick_orchestrator.attempts import Attempts


async def refused(attempts: Attempts) -> None:
    """Make an attempt that is refused."""
    with pytest.raises(ValueError, match="no"):
        async with attempts.one():
            raise ValueError("no")


async def test_refusals_are_paced() -> None:
    """After the first few, a refusal comes no sooner than the rate allows."""
    attempts, began = Attempts(3, 20.0), time.monotonic()
    for _ in range(3):
        await refused(attempts)
    await refused(attempts)
    await refused(attempts)
    assert time.monotonic() - began >= 2 / 20.0 - 0.005


async def test_what_succeeds_costs_nothing() -> None:
    """Any number of attempts that are granted run one after the other without a wait."""
    attempts, began = Attempts(2, 0.001), time.monotonic()
    for _ in range(500):
        async with attempts.one():
            pass
    assert time.monotonic() - began < 60


async def test_a_turn_that_comes_back_is_used_at_once() -> None:
    """Who waits for a turn gets that of an attempt which was granted meanwhile."""
    attempts, entered, leave = Attempts(1, 0.001), asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        async with attempts.one():
            entered.set()
            await leave.wait()

    async def follow() -> None:
        async with attempts.one():
            pass

    holding = asyncio.create_task(hold())
    await entered.wait()
    following = asyncio.create_task(follow())
    await asyncio.sleep(0)
    assert not following.done()
    leave.set()
    async with asyncio.timeout(10):
        await asyncio.gather(holding, following)
