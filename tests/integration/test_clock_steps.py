"""A wall clock that somebody sets changes no decision."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from hayflick.v1 import logger_pb2
from hayflick_rpc import wire

from .conftest import Stack, command, duration, running_stack, until

STEPPED = Path(__file__).parents[1] / "support/stepped.py"
EXPIRATION_SECONDS = 3.0


class SteppedStack(Stack):
    """A stack whose services' wall clock can be set."""

    def program(self, name: str) -> list[str]:
        """Run a service by a clock that starts right."""
        if not self.clock.exists():
            self.set_clock(0.0)
        return [str(STEPPED), str(self.clock), f"hayflick_{name}"]

    @property
    def clock(self) -> Path:
        """The file with the step."""
        return self.directory / "clock"

    def set_clock(self, seconds: float) -> None:
        """Set it forward or back from the true one."""
        self.clock.write_bytes(struct.pack("<d", seconds))


@pytest.mark.parametrize("step_seconds", [7_200.0, -7_200.0], ids=["forward", "back"])
def test_a_life_is_as_long_as_its_contract_says(step_seconds: float) -> None:
    """A worker born after the clock was set lives for its contract's expiration, no less and no more."""
    with running_stack(SteppedStack) as stack:
        assert isinstance(stack, SteppedStack)
        contract = stack.contract(expiration=duration(EXPIRATION_SECONDS))
        stack.set_clock(step_seconds)
        worker = stack.launch(contract)
        assert stack.run(worker, command("echo", "alive"), keep=True).stdout == b"alive\n"
        assert stack.end_reason(worker.worker_id) == "EXPIRED"
        ended = until(lambda: _shutdown(stack, worker.worker_id))
        lived = wire.instant(ended.timestamp) - wire.instant(worker.create_time)
        assert EXPIRATION_SECONDS - 0.5 < lived.total_seconds() < EXPIRATION_SECONDS + 2


def _shutdown(stack: Stack, worker_id: str) -> logger_pb2.Event | None:
    """Return the event of a worker's end, if it is on record."""
    wanted = logger_pb2.EventFilter(worker_id=worker_id, events=["worker_shutdown"])
    found = stack.logger.ListEvents(logger_pb2.ListEventsRequest(filter=wanted)).events
    return found[0].event if found else None
