"""Wall clocks differ between machines and are set while things run; no decision rests on one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .conftest import Stack, command, duration, running_stack

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
