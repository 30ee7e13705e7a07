"""What a sandbox costs, straight from the zygote, as the number of live ones grows."""

from __future__ import annotations

import statistics
from pathlib import Path

import peer
from nursery import Nursery
from report import Report

ROUNDS = 60


def measure(report: Report, workers: int) -> None:
    """From the request to ready, interleaved with the peer, as the number of live ones grows."""
    have_peer = peer.installed()
    with Nursery.open() as nursery:
        nursery.launch()
        ours, theirs = [], []
        for _ in range(ROUNDS):
            if have_peer:
                theirs.append(peer.run())
            ours.append(nursery.launch())
        if have_peer:
            report.peer_ms = statistics.median(theirs) * 1_000
            report.times("peer: " + " ".join(peer.COMMAND[:2]) + " … /bin/true", theirs)
        else:
            report.row("peer: bwrap", "not installed", "apt-get install bubblewrap")
        report.times("sandbox: request → ready", ours)
        for mark in (100, workers):
            while len(nursery.live) < mark - ROUNDS // 2:
                nursery.launch()
            some = [nursery.launch() for _ in range(ROUNDS // 2)]
            report.times(f"sandbox: request → ready, {mark} live", some)
        report.row(
            "memory of an idle sandbox (PSS)", f"{average_pss(nursery) / 2**20:.2f} MiB", f"{workers} live"
        )
        report.row(
            f"cgroup.kill of {len(nursery.live)} sandboxes", f"{nursery.kill() * 1_000:.0f} ms", "last pidfd"
        )


def average_pss(nursery: Nursery) -> float:
    """Return the mean proportional set size of the live inits, in bytes."""
    return statistics.mean(pss_bytes(started.pid) for started, _ in nursery.live[-200:])


def pss_bytes(pid: int) -> int:
    """Return the proportional set size of *pid*; proc_pid_smaps(5)."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0
