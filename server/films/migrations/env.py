"""Run by Alembic, on the connection and inside the transaction of `server.films.schema`."""

from alembic import context

from server.films.schema import VERSION_TABLE

context.configure(connection=context.config.attributes["connection"], version_table=VERSION_TABLE)
context.run_migrations()
