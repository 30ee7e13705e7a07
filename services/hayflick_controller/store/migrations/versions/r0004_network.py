"""Keep what was taken from a worker's network policy while it lived."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; from workers of before nothing was taken."""
    op.add_column("workers", sa.Column("network", sa.Text(), server_default=sa.text("''"), nullable=False))
