"""Keep what contracts say about containment, and how often each family has spawned."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns; contracts and workers from before have none of it."""
    # Columns with a constant default are added in place, by SQLite and PostgreSQL alike.
    op.add_column("contracts", sa.Column("terms", sa.Text(), server_default=sa.text("''"), nullable=False))
    op.add_column(
        "workers", sa.Column("spawn_count", sa.BigInteger(), server_default=sa.text("0"), nullable=False)
    )
