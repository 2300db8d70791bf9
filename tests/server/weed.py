"""A real S3 server (SeaweedFS), which checks signatures; it can be killed, held and started again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

KEY, SECRET = "rmd", "a-secret"
READER, READER_SECRET = "reader", "another-secret"


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in taken]
    for one in taken:
        one.close()
    return ports


class S3Server:
    """One server over a folder of its own.

    Args:
        folder: keeps objects, configuration and log.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "data").mkdir(parents=True)
        identities = [
            _identity(KEY, SECRET, "Admin", "Read", "Write", "List"),
            _identity(READER, READER_SECRET, "Read", "List"),
        ]
        (folder / "s3.json").write_text(json.dumps({"identities": identities}))
        self._ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
        self.endpoint = f"http://127.0.0.1:{self._ports['s3.port']}"
        self.start()

    @property
    def environment(self) -> dict[str, str]:
        """The credentials, as obstore reads them."""
        return {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1"}

    def url(self, prefix: str = "rmd", **options: str) -> str:
        """The setting ``objects`` for a part of its one bucket."""
        told = "".join(f"&{name}={value}" for name, value in options.items())
        return f"s3://films/{prefix}?endpoint={self.endpoint}{told}"

    def start(self) -> None:
        """Start it over what it kept, and wait until it answers."""
        weed = Path(sys.executable).parent / "weed"
        ports = [f"-{name}={port}" for name, port in self._ports.items()]
        command = [weed, "server", f"-dir={self._folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer"]
        command += [
            "-s3",
            f"-s3.config={self._folder / 's3.json'}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-volume.max=8",
            *ports,
        ]
        with (self._folder / "weed.log").open("ab") as log:
            self._process = subprocess.Popen([*command, "-master.volumeSizeLimitMB=64"], stdout=log, stderr=log)
        end = time.monotonic() + 60
        while not self._answers():
            assert time.monotonic() < end and self._process.poll() is None, (self._folder / "weed.log").read_text()
            time.sleep(0.05)

    def _answers(self) -> bool:
        """Whether it takes objects: the gateway is there before the volumes are."""
        given = {"access_key_id": KEY, "secret_access_key": SECRET, "region": "us-east-1"}
        client: Any = {"allow_http": True, "timeout": "5s"}
        once: Any = {"max_retries": 0}
        store = S3Store("films", endpoint=self.endpoint, client_options=client, retry_config=once, **given)
        try:
            obstore.put(store, "ready", b"yes")
        except BaseError:
            return False
        return True

    def kill(self) -> None:
        """End it as a power cut would."""
        self._process.kill()
        self._process.wait()

    def hold(self, on: bool) -> None:
        """Let it answer nothing, or go on."""
        os.kill(self._process.pid, signal.SIGSTOP if on else signal.SIGCONT)


_PORTS = (
    "master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc", "s3.port",
    "s3.port.grpc",
)  # fmt: skip


def _identity(name: str, secret: str, *actions: str) -> dict[str, object]:
    return {"name": name, "credentials": [{"accessKey": name, "secretKey": secret}], "actions": list(actions)}
