"""Every row of the table."""

from __future__ import annotations

from .attacks import calls, files, identity, lifecycle, network, proc, record, unlisted

ROWS = [
    row
    for theme in (identity, files, proc, calls, network, lifecycle, record, unlisted)
    for row in theme.ROWS
]  # fmt: skip
