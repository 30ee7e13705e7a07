"""Decisions: a request is answered alike however often it is sent, also when it is undone meanwhile."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from hayflick.v1 import resources_pb2
from hayflick_controller.decisions import Decisions, Form, Request
from hayflick_controller.model import Event
from hayflick_controller.outbox import Outbox, unavailable
from hayflick_controller.store.sql import sqlite_store
from hayflick_rpc.errors import HayflickError

WAIT_SECONDS = 10.0


class Recorder:
    """An outbox whose waits end when, and as, the test says."""

    def __init__(self) -> None:
        self.up = True
        self.waits: asyncio.Queue[asyncio.Future[None]] = asyncio.Queue()

    async def durable(self, position: int, timeout_seconds: float) -> None:
        """Wait for the test."""
        del position, timeout_seconds
        wait: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waits.put_nowait(wait)
        await wait


@pytest.mark.parametrize("again", [False, True], ids=["undone", "undone and taken again"])
async def test_who_repeats_what_is_undone_is_not_told_that_it_holds(tmp_path: Path, again: bool) -> None:
    """A repeated request that outwaits the first is refused as that was, not given what was undone."""
    store = sqlite_store(tmp_path / "data" / "controller.db")
    await store.open(lambda _: None)
    recorder = Recorder()
    decisions = Decisions(store, cast(Outbox, recorder), lambda: 1, WAIT_SECONDS)
    request = Request("request", "Method", "digest")
    form = Form[str, resources_pb2.Contract](
        resources_pb2.Contract, lambda name: resources_pb2.Contract(contract_id=name)
    )

    def decide(tx: Any) -> str:
        tx.record(Event("audit", 1))
        return "decided"

    def undo(tx: Any, value: str) -> None:
        tx.record(Event("audit", 1, details={"undone": value}))

    def take() -> asyncio.Task[resources_pb2.Contract]:
        return asyncio.create_task(decisions.take(request, decide, form, undo=undo))

    try:
        async with asyncio.timeout(WAIT_SECONDS):
            first, first_wait = take(), await recorder.waits.get()
            repeated, repeated_wait = take(), await recorder.waits.get()
            first_wait.set_exception(unavailable("not in time"))
            with pytest.raises(HayflickError) as refusal:
                await first
            if again:
                third, third_wait = take(), await recorder.waits.get()
            repeated_wait.set_result(None)
            with pytest.raises(HayflickError) as caught:
                await repeated
            assert caught.value.reason == refusal.value.reason
            assert caught.value.reason_name == "AUDIT_UNAVAILABLE"
            if again:
                third_wait.set_result(None)
                assert (await third).contract_id == "decided"
    finally:
        await decisions.close()
        await store.close()
