"""Whose turn it is: films of several accounts are made in turn."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the column. Jobs of before, and of servers of before, go first."""
    op.add_column("videos", sa.Column("turn", sa.Integer, nullable=False, server_default="0"))
