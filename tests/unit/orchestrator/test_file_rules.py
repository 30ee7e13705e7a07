"""How long a transfer may go on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_orchestrator.file_rules import TRANSFER_SECONDS, Patience
from hayflick_rpc.errors import HayflickError

START = 1_000.0


@given(st.lists(st.floats(0.01, 29.0), min_size=1, max_size=300))
def test_a_transfer_that_drips_ends_all_the_same(pauses: list[float]) -> None:
    """However steadily something goes through, a transfer goes on until its deadline and no longer."""
    patience, now = Patience("a/file", START), START
    for pause in pauses:
        now += pause
        if now > START + TRANSFER_SECONDS:
            with pytest.raises(HayflickError) as caught:
                patience.require(now)
            assert caught.value.reason == ErrorReason.ERROR_REASON_TASK_TIMEOUT
            return
        patience.require(now, 30.0, "the caller")
        patience.moved(now)


def test_whoever_does_nothing_is_named() -> None:
    """A side that does nothing for as long as it may is told so, with the seconds."""
    patience = Patience("a/file", START)
    patience.moved(START + 100)
    patience.require(START + 130, 30.0, "the worker")
    with pytest.raises(HayflickError, match="the worker did nothing for 30 s"):
        patience.require(START + 130.1, 30.0, "the worker")
