"""Keep whose each event and each node is, for several controllers on one database."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns; what is there belongs to the one controller that there was."""
    identity = sa.table("identity", sa.column("controller_id"))
    for table in ("outbox", "nodes"):
        op.add_column(
            table,
            sa.Column("controller_id", sa.String(length=64), server_default=sa.text("''"), nullable=False),
        )
        owner = sa.select(sa.func.min(identity.c.controller_id)).scalar_subquery()
        owned = sa.table(table, sa.column("controller_id"))
        op.execute(sa.update(owned).values(controller_id=sa.func.coalesce(owner, "")))
    op.create_index("ix_outbox_controller_id_position", "outbox", ["controller_id", "position"])
