"""Alembic's migrations, run when the controller starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from alembic import command
from alembic.config import Config

if TYPE_CHECKING:
    import sqlalchemy


def upgrade(connection: sqlalchemy.Connection) -> None:
    """Bring the database behind *connection* to the newest schema."""
    config = Config()
    # Found beside this file, so that an installed wheel migrates too.
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
