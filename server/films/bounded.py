"""Connections to PostgreSQL that do not wait for ever: a server may hang whose machine still answers.

The network's own bounds (keepalives, ``tcp_user_timeout``) see nothing amiss where the kernel takes the packets, and
the server's own (``statement_timeout``) hangs with it. So the bound is on this side, and on each statement.
"""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg.abc import RV, PQGen
from sqlalchemy import Engine, event

_GRACE_SECONDS = 5.0
"""Beyond the server's own bound: one that is merely slow says so itself."""


class BoundedConnection(psycopg.Connection[Any]):
    """One that is given up as lost where the server does not answer a statement in time.

    Attributes:
        bound: seconds; None: as long as it takes.
    """

    bound: float | None = None

    def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:
        """Let the driver wait for the server, but not for longer than the bound."""
        if timeout is not None or self.bound is None:
            return super().wait(gen, interval, timeout)
        try:
            return super().wait(gen, interval, self.bound)
        except psycopg.OperationalError as error:
            if error.sqlstate is None:  # no server's word: what it may still say is no answer to the next statement
                self.close()
            raise


def bound_waits(engine: Engine) -> None:
    """Have a PostgreSQL's statements waited for no longer than it may take for them itself, and a little more.

    Args:
        engine: its connections from now on; where ``statement_timeout`` is 0 they wait as before.
    """

    @event.listens_for(engine, "do_connect")
    def _connect(_dialect: object, _record: object, arguments: Any, settings: Any) -> BoundedConnection:
        connection = BoundedConnection.connect(*arguments, **settings)
        connection.bound = _GRACE_SECONDS  # it has just answered
        found = connection.execute("SELECT setting::integer FROM pg_settings WHERE name = 'statement_timeout'")
        (milliseconds,) = found.fetchone() or (0,)
        connection.rollback()
        connection.bound = milliseconds / 1000 + _GRACE_SECONDS if milliseconds else None
        return connection
