"""How services end."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

SERVICE = """
import asyncio, sys
from hayflick_rpc import server

async def stands_still():
    await asyncio.Event().wait()

server.STOP_SECONDS = 0.2
asyncio.run(server.serve("it", sys.argv[1], lambda _: [], on_stop=stands_still, drain_seconds=0.1))
"""


def test_a_service_that_stands_still_ends_all_the_same(tmp_path: Path) -> None:
    """Told to stop, a service whose last step never ends leaves with status 1, and without its socket."""
    path = tmp_path / "run" / "it.sock"
    with subprocess.Popen(
        [sys.executable, "-c", SERVICE, f"unix://{path}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"it listening on unix://{path}\n"
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 1
    assert "could not end in time" in errors
    assert not path.exists()
