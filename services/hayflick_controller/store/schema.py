"""The tables, in SQLAlchemy Core; the migrations make the same.

All instants are microseconds since the Unix epoch. Partial indexes cover the
live part of each table, so that history can grow without slowing a decision.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Sequence,
    String,
    Table,
    Text,
    text,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# Compared as bytes whatever the database's locale: a subtree is a range of paths.
Path = Text().with_variant(Text(collation="C"), "postgresql")

turns = Sequence("turns", metadata=metadata)
"""Numbers commits where several controllers take turns; SQLite has one controller, and no sequences."""

identity = Table(
    "identity",
    metadata,
    Column("controller_id", String(64), primary_key=True),
    Column("boot", BigInteger, nullable=False),
)

contracts = Table(
    "contracts",
    metadata,
    Column("contract_id", String(64), primary_key=True),
    Column("display_name", Text, nullable=False),
    Column("max_depth", Integer, nullable=False),
    Column("max_replicas", Integer, nullable=False),
    Column("cooldown_us", BigInteger, nullable=False),
    Column("expiration_us", BigInteger),
    Column("manifest_ttl_us", BigInteger, nullable=False),
    Column("key_id", String(64), nullable=False),
    Column("create_us", BigInteger, nullable=False),
    Column("active_count", Integer, nullable=False),
    Column("reserved_count", Integer, nullable=False),
    Column("population_version", BigInteger, nullable=False),
    Column("terms", Text, nullable=False, server_default=text("''")),
    Index("ix_contracts_create_us_contract_id", "create_us", "contract_id"),
)

conditions = Table(
    "conditions",
    metadata,
    Column("contract_id", ForeignKey("contracts.contract_id"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("name", Text, nullable=False),
    Column("description", Text, nullable=False),
    Column("cel", Text, nullable=False),
    Column("pickled", LargeBinary),
    Column("python_version", Text, nullable=False),
    Column("timeout_us", BigInteger, nullable=False),
)

keys = Table(
    "keys",
    metadata,
    Column("key_id", String(64), primary_key=True),
    Column("contract_id", ForeignKey("contracts.contract_id"), nullable=False),
    Column("secret", LargeBinary, nullable=False),
    Column("create_us", BigInteger, nullable=False),
    Column("retire_us", BigInteger),
    Column("revoke_us", BigInteger),
    Index("ix_keys_create_us_key_id", "create_us", "key_id"),
)

latches = Table(
    "latches",
    metadata,
    Column("scope", String(128), primary_key=True),
    Column("engaged", Boolean, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("reason", Text, nullable=False),
    Column("change_us", BigInteger, nullable=False),
)

RESERVED = text("status = 'reserved'")

manifests = Table(
    "manifests",
    metadata,
    Column("manifest_id", String(64), primary_key=True),
    Column("contract_id", ForeignKey("contracts.contract_id"), nullable=False),
    Column("worker_id", String(64), nullable=False),
    Column("parent_id", String(64), nullable=False),
    Column("status", String(16), nullable=False),
    Column("depth", Integer, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("snapshot", Text, nullable=False),
    Column("resources", Text, nullable=False),
    Column("issue_us", BigInteger, nullable=False),
    Column("expire_us", BigInteger, nullable=False),
    Column("key_id", String(64), nullable=False),
    Column("signature", LargeBinary, nullable=False),
    Index("ix_manifests_expire_us", "expire_us", sqlite_where=RESERVED, postgresql_where=RESERVED),
    Index(
        "ix_manifests_contract_id_expire_us",
        "contract_id",
        "expire_us",
        sqlite_where=RESERVED,
        postgresql_where=RESERVED,
    ),
    Index(
        "ix_manifests_parent_id_issue_us",
        "parent_id",
        "issue_us",
        sqlite_where=RESERVED,
        postgresql_where=RESERVED,
    ),
)

# What a worker's row is joined with: the parts of its manifest that it does not have itself.
manifest_columns = (
    manifests.c.resources,
    manifests.c.epoch,
    manifests.c.issue_us,
    manifests.c.expire_us.label("manifest_expire_us"),
    manifests.c.key_id,
    manifests.c.signature,
)

LIVE = text("state <> 'ended'")
STOPPING = text("state = 'stopping'")

workers = Table(
    "workers",
    metadata,
    Column("worker_id", String(64), primary_key=True),
    Column("manifest_id", ForeignKey("manifests.manifest_id"), nullable=False),
    Column("contract_id", ForeignKey("contracts.contract_id"), nullable=False),
    Column("parent_id", String(64), nullable=False),
    Column("root_id", String(64), nullable=False),
    Column("path", Path, nullable=False),
    Column("depth", Integer, nullable=False),
    Column("node_id", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("create_us", BigInteger, nullable=False),
    Column("expire_us", BigInteger),
    Column("last_heartbeat_us", BigInteger, nullable=False),
    Column("memory_bytes", BigInteger, nullable=False),
    Column("memory_peak_bytes", BigInteger, nullable=False),
    Column("cpu_us", BigInteger, nullable=False),
    Column("pids", BigInteger, nullable=False),
    Column("degraded_layers", Text, nullable=False),
    Column("stop_reason", String(32)),
    Column("stop_detail", Text, nullable=False),
    Column("end_reason", String(32)),
    Column("end_detail", Text, nullable=False),
    Column("exit_code", BigInteger, nullable=False),
    Column("signal", BigInteger, nullable=False),
    Column("end_us", BigInteger),
    Column("attestation", LargeBinary),
    Column("spawn_count", BigInteger, nullable=False, server_default=text("0")),
    Column("network", Text, nullable=False, server_default=text("''")),
    Index("ix_workers_create_us_worker_id", "create_us", "worker_id"),
    Index("ix_workers_contract_id_create_us_worker_id", "contract_id", "create_us", "worker_id"),
    Index("ix_workers_parent_id_create_us", "parent_id", "create_us"),
    Index("ix_workers_manifest_id", "manifest_id"),
    Index("uq_workers_path", "path", unique=True),
    Index("ix_workers_live_contract_id", "contract_id", sqlite_where=LIVE, postgresql_where=LIVE),
    Index("ix_workers_live_node_id", "node_id", sqlite_where=LIVE, postgresql_where=LIVE),
    Index("ix_workers_live_root_id", "root_id", sqlite_where=LIVE, postgresql_where=LIVE),
    Index("ix_workers_stopping", "node_id", sqlite_where=STOPPING, postgresql_where=STOPPING),
)

# Apart from the workers, whose rows are read many at a time.
attestations = Table(
    "attestations",
    metadata,
    Column("worker_id", String(64), primary_key=True),
    Column("body", LargeBinary, nullable=False),
)

nodes = Table(
    "nodes",
    metadata,
    Column("node_id", String(64), primary_key=True),
    Column("session_digest", String(64), nullable=False),
    Column("address", Text, nullable=False),
    Column("python_version", Text, nullable=False),
    Column("connect_us", BigInteger, nullable=False),
    Column("last_ack_us", BigInteger, nullable=False),
    Column("connected", Boolean, nullable=False),
    Column("controller_id", String(64), nullable=False, server_default=text("''")),
)

answers = Table(
    "answers",
    metadata,
    Column("request_id", String(64), primary_key=True),
    Column("method", Text, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("body", LargeBinary),
    Column("position", BigInteger, nullable=False),
    Column("create_us", BigInteger, nullable=False),
    Index("ix_answers_create_us", "create_us"),
)

outbox = Table(
    "outbox",
    metadata,
    Column("position", BigInteger, primary_key=True, autoincrement=False),
    Column("body", LargeBinary, nullable=False),
    Column("controller_id", String(64), nullable=False, server_default=text("''")),
    Index("ix_outbox_controller_id_position", "controller_id", "position"),
)
