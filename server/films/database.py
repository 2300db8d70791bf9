"""The database that jobs and idempotent replies are kept in: SQLite, or PostgreSQL by URL.

Whatever it fails at while the server runs is one error, :class:`DatabaseError`, which clients are told as 503. From
then on the server is not ready, until a write has succeeded; and, where a file of SQLite was damaged, until all of it
has been read.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from server.core.faults import Fault, RequestError
from server.core.promises import in_a_while
from server.films.schema import VERSION_TABLE, SchemaError, bring_up_to_date

log = logging.getLogger("rmd.server")

_PROBE_SECONDS = 5.0
_RETRY_SECONDS = 1.0
_BUSY_SECONDS = 3
_POSTGRESQL = {
    "connect_timeout": 5,
    "tcp_user_timeout": 10_000,  # ms: a network that swallows packets
    "options": "-c lock_timeout=5s -c statement_timeout=15s",
}
"""For connections; the URL's own go before them."""

_DAMAGED = "it is damaged"
_SQLITE_REASONS = {
    "SQLITE_BUSY": "it is locked",
    "SQLITE_LOCKED": "it is locked",
    "SQLITE_FULL": "its disk is full",
    "SQLITE_CORRUPT": _DAMAGED,
    "SQLITE_NOTADB": f"{_DAMAGED}, or no database",
    "SQLITE_READONLY": "it cannot be written to",
    "SQLITE_CANTOPEN": "it cannot be opened",
    "SQLITE_IOERR": "its disk failed",
}
_POSTGRESQL_REASONS = {
    "53100": "its disk is full",
    "53300": "it has no connection left",
    "55P03": "it is locked",
    "57014": "it does not answer in time",
    "40": "it is locked",
    "25006": "it cannot be written to",
    "XX00": _DAMAGED,
    "28": "it does not let this server in",
    "3D": "there is none of that name",
    "42501": "it does not let this server do what it must",
}


class DatabaseError(RequestError):
    """The database cannot do what was asked of it now."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            Fault.NOT_READY,
            f"The server's database cannot be used now: {reason}. Try again after the seconds in Retry-After.",
            code="database_unavailable",
            retry_after=in_a_while(5),
        )
        self.reason = reason


class Database:
    """One server's connections to it.

    Args:
        url: an SQLAlchemy URL. A file of SQLite is made where it does not exist, and its folder.

    Raises:
        ValueError: it cannot be used. One line, with its URL but no password, the reason and the way out.
    """

    def __init__(self, url: str) -> None:
        self.fault: str | None = None
        self._damaged = False  # a later fault, such as a lock, does not mend it
        parsed = _parse(url)
        self._file = Path(parsed.database or "") if parsed.drivername.startswith("sqlite") else None
        try:
            if self._file is not None:
                _make_private(self._file)
            self._engine = _engine(parsed)
            with self._engine.connect() as connection:
                bring_up_to_date(connection)
            self._engine.dispose()  # that connection may wait for as long as a migration takes
            if self.dialect == "postgresql":
                from server.films.bounded import bound_waits  # needs the driver

                bound_waits(self._engine)
            self._check_pages()
            self._identity = self._identify()
            self._write()
        except (OSError, SQLAlchemyError, SchemaError, DatabaseError) as error:
            raise ValueError(f"the database {_shown(parsed)} cannot be used: {_why(error)} (video_database)") from None
        self._closing = threading.Event()
        self._watch = threading.Thread(target=self._watch_over, name="rmd-database", daemon=True)

    def start(self) -> None:
        """Watch over it from now on."""
        self._watch.start()

    @property
    def dialect(self) -> str:
        """``sqlite`` or ``postgresql``."""
        return self._engine.dialect.name

    def check(self) -> None:
        """Refuse at once what would wait for a database that is known not to work, and hold a thread meanwhile.

        Raises:
            DatabaseError: it failed, and has not been found to work again since.
        """
        fault = self.fault
        if fault is not None:
            raise DatabaseError(fault)

    @contextmanager
    def begin(self) -> Iterator[Session]:
        """Work in one transaction, which is committed at the end.

        Raises:
            DatabaseError: it failed, and nothing was changed.
            SQLAlchemyError: it works, and refused this work: its values, or a statement that is none.
        """
        try:
            if self._identify() != self._identity:
                raise DatabaseError("its file was removed or replaced; restart the server")
            with Session(self._engine, expire_on_commit=False) as session, session.begin():
                yield session
        except (OSError, SQLAlchemyError) as error:
            if not _is_its_own(error):
                raise
            self._note(reason_of(error), error)
            raise DatabaseError(reason_of(error)) from error
        except DatabaseError as fault:
            self._note(fault.reason, fault)
            raise

    def notify(self, session: Session, channel: str) -> None:
        """Wake who listens, once the session's transaction is committed. SQLite has no such thing."""
        if self.dialect == "postgresql":
            session.execute(text(f"NOTIFY {channel}"))

    def listen(self, channel: str, wake: Callable[[], None]) -> None:
        """Call ``wake`` from a thread of its own at each notification, until the database is closed."""
        if self.dialect == "postgresql":
            name = f"rmd-listen-{channel}"
            threading.Thread(target=self._listen, args=(channel, wake), name=name, daemon=True).start()

    def _listen(self, channel: str, wake: Callable[[], None]) -> None:
        while not self._closing.is_set():
            try:
                with self._engine.connect() as connection:
                    driver: Any = connection.connection.driver_connection
                    connection.detach()  # for good: it is never given to another session
                    driver.autocommit = True
                    driver.execute(f"LISTEN {channel}")
                    wake()  # for what came before
                    while not self._closing.is_set():
                        for _ in driver.notifies(timeout=_RETRY_SECONDS, stop_after=1):
                            wake()
            except Exception as error:  # the driver's own, and SQLAlchemy's; polling goes on meanwhile
                log.info("not told of new jobs: %s", _first_line(error))
                self._closing.wait(_PROBE_SECONDS)

    def close(self) -> None:
        """Close the connections."""
        self._closing.set()
        if self._watch.ident is not None:
            self._watch.join(_BUSY_SECONDS + 1)
        self._engine.dispose()

    def probe(self) -> None:
        """Look whether it works; what was away is there again once it takes a write, and what was damaged is whole."""
        try:
            if self.fault is None:
                with self.begin() as session:
                    session.execute(text(f"SELECT version_num FROM {VERSION_TABLE}"))
                return
            self._write()
            if self._damaged:
                self._engine.dispose()  # what its connections remember of the file may be whole
                self._check_pages()
        except DatabaseError:
            return
        except SchemaError as error:
            self._note(_DAMAGED, error)
            return
        except SQLAlchemyError as error:
            self._note(reason_of(error), error)
            return
        log.warning("the database works again")
        self.fault, self._damaged = None, False

    def _watch_over(self) -> None:
        while not self._closing.wait(_PROBE_SECONDS if self.fault is None or self._damaged else _RETRY_SECONDS):
            self.probe()

    def _write(self) -> None:
        with self.begin() as session:
            session.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = version_num"))

    def _note(self, reason: str, error: Exception) -> None:
        if self.fault != reason:
            log.error("the database failed: %s (%s)", reason, _first_line(error))
        self.fault = reason
        self._damaged |= reason.startswith(_DAMAGED)

    def _check_pages(self) -> None:
        if self._file is not None:
            with self._engine.connect() as connection:
                found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
            if found != "ok":
                raise SchemaError(f"{_DAMAGED}; restore it from a copy, or move it away and begin a new one")

    def _identify(self) -> tuple[int, int] | None:
        if self._file is None:
            return None
        try:
            found = self._file.stat()
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino


def _is_its_own(error: Exception) -> bool:
    """Whether the database failed; what it only refused would fail on a healthy one, and others' work goes on."""
    if isinstance(error, (IntegrityError, DataError)):
        return False
    return isinstance(error, (OSError, DBAPIError, PoolTimeout))


def reason_of(error: Exception) -> str:
    """Return what a database's error means, in words that name no host, no table and no value."""
    if isinstance(error, PoolTimeout):
        return "all connections to it are in use"
    cause = getattr(error, "orig", None)
    if cause is None:
        return "it failed"
    told = str(getattr(cause, "sqlite_errorname", None) or getattr(cause, "sqlstate", None) or "")
    for reasons in (_SQLITE_REASONS, _POSTGRESQL_REASONS):
        for prefix, reason in reasons.items():
            if told.startswith(prefix):
                return reason
    if not told or told.startswith(("08", "57P")):
        return "it cannot be reached"
    return f"it failed ({told})"


def _why(error: Exception) -> str:
    if isinstance(error, SQLAlchemyError):
        return f"{reason_of(error)} ({_first_line(error)})"
    if isinstance(error, OSError):
        return str(error.strerror or error)
    return error.reason if isinstance(error, DatabaseError) else str(error)


def _first_line(error: Exception) -> str:
    """Return the driver's own words; statements hold prompts, and are left out."""
    return str(getattr(error, "orig", None) or error).partition("\n")[0]


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ValueError(
            "video_database is no URL of a database, such as postgresql+psycopg://user@host/name"
        ) from None
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise ValueError(f"video_database is of {parsed.get_backend_name()}; SQLite and PostgreSQL are known")
    return parsed


def _shown(url: URL) -> str:
    """Return the URL without what may be a password."""
    return url.set(query={}).render_as_string(hide_password=True)


def _make_private(file: Path) -> None:
    """Make the file, and its folder, for this user alone: prompts are nobody else's on the machine."""
    if file.is_dir():
        raise IsADirectoryError(0, "there is a folder in its place")
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file.touch(mode=0o600)


def _engine(url: URL) -> Engine:
    try:
        if url.get_backend_name() == "sqlite":
            engine = create_engine(url, hide_parameters=True, pool_timeout=5)
            _make_durable(engine)
            return engine
        given = {name: value for name, value in _POSTGRESQL.items() if name not in url.query}
        return create_engine(url, hide_parameters=True, pool_timeout=5, pool_pre_ping=True, connect_args=given)
    except (ImportError, NoSuchModuleError):
        raise SchemaError("its driver is not installed: pip install 'rmd[postgres]'") from None


def _make_durable(engine: Engine) -> None:
    """Let readers and the writer work side by side, and let a committed job outlast a power cut."""

    @event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _record: object) -> None:
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout={1000 * _BUSY_SECONDS}")  # first: the next one may have to wait
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.close()
