"""What the record costs: durable appends, and verifying them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from report import Report

from hayflick_rpc.audit import AuditClient
from hayflick_tlog.note import Verifier
from hayflick_tlog.verify import verify_log

APPEND_SECONDS = 4.0


def measure(report: Report, workers: int) -> None:
    """Measure a logger of its own."""
    del workers
    with tempfile.TemporaryDirectory(prefix="hayflick-bench-", dir="/var/tmp") as directory:
        data, address = Path(directory, "data"), f"unix://{directory}/logger.sock"
        command = [sys.executable, "-m", "hayflick_logger", "--listen", address, "--data-dir", str(data)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            try:
                assert process.stdout is not None
                process.stdout.readline()
                asyncio.run(_measure(report.row, address, data))
            finally:
                process.terminate()


async def _measure(row: Callable[[str, str, str], None], address: str, log: Path) -> None:
    """Append through the service with 1 and 64 writers, then verify the files.

    Args:
        row: Takes what was measured, the figure, and a note.
        address: The logger's.
        log: Its data directory.
    """
    for writers, at_once in ((1, 1), (64, 1), (64, 16)):
        clients = [AuditClient(address, f"bench/{writers}/{at_once}/{number}") for number in range(writers)]
        for client in clients:
            await client.start()
            await client.wait_connected(20)
        began = time.perf_counter()
        counts = await asyncio.gather(
            *(_write(client, began + APPEND_SECONDS, at_once) for client in clients)
        )
        rate = sum(counts) / (time.perf_counter() - began)
        for client in clients:
            await client.close(5)
        row(
            f"durable appends a second, {writers} writers",
            f"{rate:,.0f} /s",
            "one at a time each" if at_once == 1 else f"{at_once} under way each",
        )
    await asyncio.sleep(2.0)  # the checkpoint on disk follows within a second
    began = time.perf_counter()
    finding = verify_log(
        lambda path: (log / "log" / path).read_bytes(),
        (log / "log" / "checkpoint").read_text(encoding="utf-8"),
        Verifier.parse((log / "log.pub").read_text(encoding="utf-8")),
    )
    took = time.perf_counter() - began
    assert finding.intact, finding
    size = finding.checkpoint.size
    row("entries verified a second, offline", f"{size / took:,.0f} /s", f"{size:,} entries")


async def _write(client: AuditClient, deadline: float, at_once: int) -> int:
    from hayflick.v1 import logger_pb2

    event = logger_pb2.Event(event="audit", worker_id="0123456789abcdef", contract_id="0123456789abcdef")
    event.timestamp.GetCurrentTime()
    event.details.update({"decision": "bench", "depth": 1, "node_id": "node", "reason": "x" * 100})
    count = 0
    while time.perf_counter() < deadline:
        for _ in range(at_once):
            sequence = client.enqueue(event)
        await client.wait_acknowledged(sequence, 30)
        count += at_once
    return count
