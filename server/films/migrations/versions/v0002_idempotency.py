"""Idempotency keys that outlast a restart, and how long a job may wait by the server that took it."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the columns and the table."""
    op.add_column("videos", sa.Column("idempotency_key", sa.String(256)))
    op.add_column("videos", sa.Column("body_digest", sa.String(64)))
    op.add_column("videos", sa.Column("begin_by", sa.Double))
    op.create_index("ix_videos_idempotency", "videos", ["account", "idempotency_key"], unique=True)
    op.create_table(
        "idempotent_replies",
        sa.Column("account", sa.String(64), primary_key=True),
        sa.Column("key", sa.String(256), primary_key=True),
        sa.Column("body_digest", sa.String(64), nullable=False),
        sa.Column("worker", sa.String(64), nullable=False),
        sa.Column("lease_until", sa.Double, nullable=False),
        sa.Column("finished_at", sa.Double, index=True),
        sa.Column("reply", sa.LargeBinary),
    )
