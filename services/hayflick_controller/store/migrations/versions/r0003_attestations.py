"""Keep what nodes attest of their workers' sandboxes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column and the table; workers from before were not attested."""
    op.add_column("workers", sa.Column("attestation", sa.LargeBinary(), nullable=True))
    op.create_table(
        "attestations",
        sa.Column("worker_id", sa.String(length=64), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("worker_id", name=op.f("pk_attestations")),
    )
