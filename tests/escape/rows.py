"""Every row of the table."""

from __future__ import annotations

from .attacks import calls, files, identity, lifecycle, network, proc, record

ROWS = [
    row
    for theme in (identity, files, proc, calls, network, lifecycle, record)
    for row in theme.ROWS
]  # fmt: skip
