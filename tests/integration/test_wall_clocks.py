"""Wall clocks differ between machines and are set while things run; no decision rests on one."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hayflick.v1 import controller_pb2, logger_pb2

from .conftest import Stack, command, duration, refused, running_stack, until

if TYPE_CHECKING:
    from collections.abc import Iterator

OTHER_WALL_CLOCK = str(Path(__file__).with_name("other_wall_clock.py"))


class OtherClocks(Stack):
    """A stack whose controller has a wall clock that is :attr:`ahead_seconds` ahead of its node's."""

    ahead_seconds = 0.0

    def program(self, name: str) -> list[str]:
        """Return what of Python is run for a service."""
        if name == "controller":
            return [OTHER_WALL_CLOCK, str(self.ahead_seconds)]
        return super().program(name)


class Behind(OtherClocks):
    """A controller that lives an hour ago."""

    ahead_seconds = -3_600.0


class Ahead(OtherClocks):
    """A controller that lives an hour from now."""

    ahead_seconds = 3_600.0


@pytest.fixture(params=[Behind, Ahead])
def elsewhen(request: pytest.FixtureRequest) -> Iterator[Stack]:
    """A stack whose controller and node differ about the time."""
    with running_stack(request.param) as running:
        yield running


def test_a_life_is_as_long_as_its_contract_says(elsewhen: Stack) -> None:
    """A worker lives as long as its contract says, whatever its controller's and node's wall clocks say."""
    stack = elsewhen
    lasting = stack.launch(stack.contract(expiration=duration(600)))
    begun = time.monotonic()
    brief = stack.launch(stack.contract(expiration=duration(2)))
    assert stack.end_reason(brief.worker_id) == "EXPIRED"
    # Below the margin after which its controller, rather than its node, would have ended it.
    assert time.monotonic() - begun < 2 + 4
    assert stack.run(lasting, command("echo", "here")).stdout == b"here\n"
    stack.stop(lasting)


def test_a_step_between_two_starts_moves_nothing() -> None:
    """A wall clock set while the controller is away ends no cooldown and no life, and is on record."""
    with running_stack(OtherClocks) as stack:
        contract = stack.contract(cooldown=duration(600), expiration=duration(600))
        parent = stack.launch(contract)
        born = stack.launch(contract, parent.worker_id)
        stack.end("controller", signal.SIGKILL)
        OtherClocks.ahead_seconds = 3_600.0
        try:
            stack.start("controller")
        finally:
            OtherClocks.ahead_seconds = 0.0
        until(lambda: _stepped(stack))
        nodes = controller_pb2.ListNodesRequest()
        until(lambda: stack.controller.ListNodes(nodes, wait_for_ready=True).nodes)
        with refused("COOLDOWN_NOT_SATISFIED"):
            stack.manifest(contract, parent.worker_id)
        other = stack.launch(contract)
        assert other.create_time.seconds - born.create_time.seconds < 600
        for worker in (parent, born, other):
            assert stack.run(worker, command("true")).outcome == "SUCCEEDED"


def _stepped(stack: Stack) -> bool:
    request = logger_pb2.ListEventsRequest(filter=logger_pb2.EventFilter(events=["clock_stepped"]))
    told = [recorded.event.details["step_seconds"] for recorded in stack.logger.ListEvents(request).events]
    assert all(abs(seconds - 3_600) < 60 for seconds in told)
    return len(told) == 1
