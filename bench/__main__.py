"""``make bench``: what the promises cost, measured beside a peer in the same run.

Machines are noisy: read the ratios, and the medians before the rest. Each
section starts what it measures afresh and leaves nothing behind.

Usage: python bench [--workers 1000] [--only SECTION ...]
"""

from __future__ import annotations

import argparse
import importlib
import os
import resource
import sys

from report import Report

# Each module has ``measure(report, workers)``, and is imported when its turn
# comes: gRPC must not be loaded before main() has set what it reads.
SECTIONS = {
    "sandbox": "sandboxes",
    "launch": "launches",
    "kill": "kills",
    "deadman": "deadman",
    "controller": "controller",
    "admissions": "admissions",
    "record": "record",
    "neighbours": "neighbours",
}


def main() -> int:
    """Run the sections asked for; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=1_000, help="how many live workers to grow to")
    parser.add_argument("--only", nargs="+", choices=tuple(SECTIONS), default=tuple(SECTIONS))
    arguments = parser.parse_args()
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    report = Report()
    for name in arguments.only:
        print(f"\n{name}")
        importlib.import_module(SECTIONS[name]).measure(report, arguments.workers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
