"""Keep when a key was retired and revoked."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns; keys from before are current."""
    op.add_column("keys", sa.Column("retire_us", sa.BigInteger(), nullable=True))
    op.add_column("keys", sa.Column("revoke_us", sa.BigInteger(), nullable=True))
    op.create_index("ix_keys_create_us_key_id", "keys", ["create_us", "key_id"])
