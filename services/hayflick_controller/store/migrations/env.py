"""What Alembic runs to find its connection: always the one that the store opened."""

from __future__ import annotations

from alembic import context

from hayflick_controller.store.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    # SQLite alters a table by copying it.
    render_as_batch=True,
)

with context.begin_transaction():
    context.run_migrations()
