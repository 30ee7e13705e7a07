"""The disks behind what workers are shown read-only: what a limit on reading is about."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping

from hayflick_sandbox.policy import Limits

# The one controller of both versions, by its names in version 1 and 2.
CONTROLLERS = ("blkio", "io")
_BYTES_V1, _READS_V1 = "blkio.throttle.read_bps_device", "blkio.throttle.read_iops_device"


def behind(paths: Iterable[str], devices: str = "/sys/dev/block") -> tuple[str, ...]:
    """Return the whole disks that hold *paths*, each as ``major:minor``, in order.

    A file system without a block device of its own, such as an overlay, tmpfs or
    one over the network, is behind no disk that could be named.

    Args:
        paths: Existing files or directories; those that are missing are passed over.
        devices: Where the kernel lists block devices; for tests.
    """
    found = set()
    for path in paths:
        try:
            number = os.stat(path).st_dev
        except OSError:
            continue
        name = f"{os.major(number)}:{os.minor(number)}"
        entry = os.path.realpath(f"{devices}/{name}")
        if not os.path.exists(entry):
            continue
        if os.path.exists(f"{entry}/partition"):
            # Only whole disks have a queue to throttle (block/blk-cgroup.c, blkg_conf_open_bdev).
            with open(f"{os.path.dirname(entry)}/dev", encoding="ascii") as file:
                name = file.read().strip()
        found.add(name)
    return tuple(sorted(found))


def settings(limits: Limits, versions: Mapping[str, int], names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield the files to write for a worker that may read from the disks *names*, and what to write."""
    size, count = limits.io_read_bytes_per_second, limits.io_reads_per_second
    for disk in names:
        if "blkio" in versions:
            yield _BYTES_V1, f"{disk} {size}"
            yield _READS_V1, f"{disk} {count}"
        elif "io" in versions:
            yield "io.max", f"{disk} rbps={size} riops={count}"


def unlimited(versions: Mapping[str, int], disk: str) -> Iterator[tuple[str, str]]:
    """Yield what says "no limit" for *disk*; the kernel takes it only for a disk that it can limit."""
    if "blkio" in versions:
        yield _BYTES_V1, f"{disk} 0"
    elif "io" in versions:
        yield "io.max", f"{disk} rbps=max"
