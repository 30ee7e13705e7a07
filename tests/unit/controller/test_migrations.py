"""The migrations, against the tables that the code speaks of."""

from __future__ import annotations

import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateIndex, CreateTable

from hayflick_controller.store import (
    answers,
    attestations,
    contracts,
    keys,
    latches,
    manifests,
    migrations,
    nodes,
    outbox,
    schema,
    sqlite,
    workers,
)
from hayflick_controller.store.prepared import Prepared

PARTS = (answers, attestations, contracts, keys, latches, manifests, nodes, outbox, workers)
STATEMENTS = {
    name: value
    for part in PARTS
    for name, value in vars(part).items()
    if isinstance(value, sqlalchemy.Executable)
} | {"LATCHES": latches.latches_of(4)}


def test_migrations_make_the_schema() -> None:
    """The migrations make exactly the tables, columns and indexes that the schema names."""
    engine = sqlite.engine(None)
    with engine.connect() as connection:
        with connection.begin():
            migrations.upgrade(connection)
        with connection.begin():
            context = MigrationContext.configure(connection)
            assert compare_metadata(context, schema.metadata) == []
    engine.dispose()


def test_everything_can_be_said_to_postgresql() -> None:
    """Tables, indexes and statements compile for PostgreSQL; there a contract is locked for update."""
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    for table in schema.metadata.sorted_tables:
        CreateTable(table).compile(dialect=dialect)
        for index in table.indexes:
            CreateIndex(index).compile(dialect=dialect)
    assert len(STATEMENTS) > 30
    for statement in STATEMENTS.values():
        statement.compile(dialect=dialect)  # type: ignore[attr-defined]
    assert "FOR UPDATE" in str(contracts.CONTRACT_LOCKED.compile(dialect=dialect))
    # Its driver binds by name; a literal in the statement is bound with the rest.
    prepared = Prepared(workers.LAST_BIRTH, dialect)
    assert prepared.arguments({"parent_id": "p"}) == {
        "parent_id": "p",
        "end_reason_1": "launch_failed",
        "param_1": 1,
    }


def test_decisions_scan_no_table() -> None:
    """Each statement that a decision needs finds its rows by an index."""
    engine = sqlite.engine(None)
    with engine.connect() as connection:
        with connection.begin():
            migrations.upgrade(connection)
        for name in (
            "ANSWER",
            "CONTRACT_LOCKED",
            "SECRET",
            "MANIFEST",
            "LAST_RESERVATION",
            "WORKER",
            "LAST_BIRTH",
            "FAMILY",
            "SPAWN_COUNT",
            "SPAWNED",
            "PROMISED_SPAWNS",
            "LATCHES",
            "STATUS",
            "SETTLE",
            "LIVE_OF_ROOT",
            "STATE",
            "END",
            "BEAT",
            "NODE",
            "ATTESTATION",
            "ATTEST",
        ):
            text = Prepared(STATEMENTS[name], engine.dialect).text
            count = text.count("?")
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", tuple([1] * count)).all()
            assert not [step for step in plan if step[3].startswith("SCAN")], (name, plan)
    engine.dispose()
