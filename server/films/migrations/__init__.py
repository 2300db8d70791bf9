"""Alembic's: how the tables of `server.films.tables` came to be, one step a file in `versions`."""
