"""A real PostgreSQL for tests: Debian's, in a folder of its own, on this machine alone."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import psycopg
import pytest

from tests.server.standstill import standing_still

_USER = "postgres"  # PostgreSQL refuses to run as root; its package makes this user


@dataclass
class PostgreSQL:
    """One that runs, and can be stopped and started again."""

    programs: Path
    folder: Path
    port: int
    _numbers: Iterator[int] = field(default_factory=count)

    def new_database(self) -> str:
        """Return the URL of a new, empty database."""
        name = f"films_{next(self._numbers)}"
        with psycopg.connect(
            f"host=127.0.0.1 port={self.port} user=rmd dbname=postgres", autocommit=True
        ) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql://rmd:secret@127.0.0.1:{self.port}/{name}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = f"-c listen_addresses=127.0.0.1 -p {self.port} -k {self.folder} -c fsync=off"
        self._run("pg_ctl", "-D", "data", "-o", options, "-l", "log", "-w", "start")

    def stop(self) -> None:
        """End it at once, as a crash would."""
        self._run("pg_ctl", "-D", "data", "-m", "immediate", "-w", "stop")

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """Stop all its processes; connections are taken for it, by the kernel, and nothing is answered."""
        main = (self.folder / "data" / "postmaster.pid").read_text().split()[0]
        found = subprocess.run(["ps", "-o", "pid=", "--ppid", main], check=True, capture_output=True, text=True)
        with standing_still(int(each) for each in [main, *found.stdout.split()]):
            yield

    def _run(self, program: str, *arguments: str) -> None:
        user = _USER if os.geteuid() == 0 else None
        subprocess.run(
            [self.programs / program, *arguments],
            cwd=self.folder,
            check=True,
            user=user,
            group=user,
            stdout=subprocess.DEVNULL,
        )


@contextmanager
def started() -> Iterator[PostgreSQL]:
    """Make one and run it until the block ends; skips the test where there is none."""
    on_path = shutil.which("initdb")
    found = [Path(on_path).parent] if on_path else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not found:
        pytest.skip("no PostgreSQL here (initdb on the path, or Debian's postgresql)")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # Not below pytest's own folder, which every other run of pytest closes to PostgreSQL's user again.
    folder = Path(tempfile.mkdtemp(prefix="rmd-postgresql-"))
    if os.geteuid() == 0:
        shutil.chown(folder, _USER, _USER)
    server = PostgreSQL(found[-1], folder, port)
    server._run("initdb", "-D", "data", "-A", "trust", "-U", "rmd", "--no-sync")
    server.start()
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)
