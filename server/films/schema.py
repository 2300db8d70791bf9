"""The database's schema: brought up to date at start, by one server at a time, or refused with the reason.

A newer server adds columns that may be empty, and no more, so that servers of two versions can share a database while
they are changed over; an older one does not start on what a newer one has migrated.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from sqlalchemy import Connection, Inspector, inspect, text

from server.films.migrations.versions import v0001_videos
from server.films.tables import Base

VERSION_TABLE = "rmd_schema"
"""A name of its own: in a PostgreSQL shared with others Alembic's may be theirs."""

_LOCK = 7_265_683_100_1
_LOCK_SECONDS = 60
_MIGRATIONS = Path(__file__).parent / "migrations"


class SchemaError(Exception):
    """The database is not this server's to use; the message says why, and the way out."""


def bring_up_to_date(connection: Connection) -> None:
    """Migrate, in one transaction, while no other server does.

    Args:
        connection: new, to SQLite or PostgreSQL; has no transaction yet.

    Raises:
        SchemaError: another program's, a newer server's, or damaged.
        SQLAlchemyError: the database failed.
    """
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells each step of every start
    _lock(connection)
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    known = [step.revision for step in ScriptDirectory.from_config(config).walk_revisions()]
    found = inspect(connection)
    if found.has_table(VERSION_TABLE):
        version = connection.scalar(text(f"SELECT version_num FROM {VERSION_TABLE}"))
        if version not in known:
            raise SchemaError(
                f"its schema is of version {version}, and this server knows those up to {known[0]}: "
                "use the newer server that made it, or another database"
            )
    elif found.has_table("videos"):
        _check_columns(found, "videos", [column.name for column in v0001_videos.columns()])
        command.stamp(config, v0001_videos.revision)
    command.upgrade(config, "head")
    found = inspect(connection)
    for table in Base.metadata.sorted_tables:
        _check_columns(found, table.name, table.columns.keys())
    connection.commit()


def _lock(connection: Connection) -> None:
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql(f"PRAGMA busy_timeout={1000 * _LOCK_SECONDS}")
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        return
    connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{_LOCK_SECONDS}s'")
    connection.exec_driver_sql(f"SET LOCAL statement_timeout = '{_LOCK_SECONDS}s'")
    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")


def _check_columns(found: Inspector, table: str, wanted: Iterable[str]) -> None:
    if not found.has_table(table):
        raise SchemaError(f"its table {table} is missing: restore it from a copy, or use another database")
    missing = sorted(set(wanted) - {column["name"] for column in found.get_columns(table)})
    if missing:
        raise SchemaError(
            f"its table {table} has no column {missing[0]}: another program's, or damaged; use another database"
        )
