"""Two servers behind HAProxy that share one PostgreSQL and one S3 server: what clients get while one of them is killed.

    python -m tests_slow.replicas --checkpoint models/embedded --checkpoint models/embedded-video

Everything is real and on this machine: `rmd serve`, PostgreSQL, SeaweedFS, HAProxy with the configuration that is
shipped, the official client. Batches are of width one, so that a picture's bytes do not hang on its company.
"""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import httpx
import openai
import typer

from tests.server import postgresql
from tests.server.weed import S3Server, free_ports

ROOT = Path(__file__).parent.parent
TRIES = 5  # of a client, the first included


class Program:
    """A program that answers over HTTP, its log in a file."""

    def __init__(self, command: Sequence[str | Path], environment: dict[str, str], log: Path, ready: str) -> None:
        self._command, self._environment = command, {**os.environ, **environment}
        self._log, self._ready = log, ready

    def start(self) -> None:
        """Start it, and wait until it is ready."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, env=self._environment, cwd=ROOT, stdout=log, stderr=log)
        end = time.monotonic() + 300
        while True:
            assert time.monotonic() < end and self._process.poll() is None, self._log.read_text()[-3000:]
            try:
                if httpx.get(self._ready, timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)

    def kill(self) -> None:
        """End it as a power cut would."""
        self._process.kill()
        self._process.wait()


@dataclass(frozen=True)
class House:
    """Two servers, and the address of the balancer in front of them."""

    servers: tuple[Program, Program]
    url: str


@contextmanager
def two_servers(checkpoints: Sequence[Path], folder: Path) -> Iterator[House]:
    """Run the whole house in a folder until the block ends."""
    install_haproxy()
    with ExitStack() as stack:
        database = stack.enter_context(postgresql.started())
        store = S3Server(folder / "s3")
        stack.callback(store.kill)
        balancer, *ports = free_ports(3)
        shared = {
            **store.environment,
            "PYTHONPATH": str(ROOT),
            "RMD_VIDEO_DATABASE": database.new_database(),
            "RMD_OBJECTS": store.url(),
            "RMD_BACKEND": "eager",
            "RMD_MAX_BATCH": "1",
            "RMD_THREADS": "1",
            "RMD_SERVE_TEACHER": "false",
        }
        command = [sys.executable, "-c", "from cli.main import main; main()", "serve"]
        for checkpoint in checkpoints:
            command += ["--checkpoint", str(checkpoint.resolve())]
        servers = []
        for port in ports:
            own = {**shared, "RMD_PORT": str(port), "RMD_VIDEOS": str(folder / f"videos-{port}")}
            servers.append(Program(command, own, folder / f"server-{port}.log", _ready(port)))
            stack.callback(servers[-1].kill)
            servers[-1].start()
        addresses = {"RMD_BALANCER": _at(balancer), "RMD_ONE": _at(ports[0]), "RMD_TWO": _at(ports[1])}
        haproxy = ["haproxy", "-db", "-f", ROOT / "deploy" / "haproxy" / "haproxy.cfg"]
        front = Program(haproxy, addresses, folder / "haproxy.log", _ready(balancer))
        stack.callback(front.kill)
        front.start()
        yield House((servers[0], servers[1]), f"http://{_at(balancer)}")


@dataclass
class Seen:
    """What clients got, by number: the bytes of pictures and films, and how often they had to ask again."""

    pictures: dict[int, bytes] = field(default_factory=dict)
    films: dict[int, bytes] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    repeated: int = 0  # requests with an Idempotency-Key, each answered twice alike: the whole reply, or the same job
    asked_again: int = 0
    seconds: float = 0.0


class Clients:
    """The official client, as often as there are threads.

    Args:
        url: the balancer's.
    """

    def __init__(self, url: str) -> None:
        self._client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=TRIES - 1)
        self._http = httpx.Client(timeout=60)
        self._lock = threading.Lock()
        self.seen = Seen()

    def work(self, pictures: int, films: int) -> Seen:
        """Ask for all at once: eight clients draw, as many as there are films make one each."""
        begun = time.monotonic()
        with ThreadPoolExecutor(8) as drawing, ThreadPoolExecutor(films) as filming:
            asked = [drawing.submit(self._draw, number) for number in range(pictures)]
            asked += [filming.submit(self._film, number) for number in range(films)]
            for one in asked:
                try:
                    one.result()
                except (openai.OpenAIError, httpx.HTTPError, LookupError) as error:
                    self.seen.lost.append(f"{type(error).__name__}: {error}")
        self.seen.seconds = round(time.monotonic() - begun, 1)
        return self.seen

    def _draw(self, number: int) -> None:
        linked, repeated = number % 2 == 1, number % 8 < 2
        ask = partial(
            self._client.images.generate,
            prompt="a red rocket",
            response_format="url" if linked else "b64_json",
            extra_body={"seed": number},
            extra_headers={"Idempotency-Key": f"{id(self)} picture {number}"} if repeated else {},
        )
        reply = ask()
        if repeated:
            self._count_repeated(number, ask() == reply)
        picture = (reply.data or [])[0]
        if linked:
            self.seen.pictures[number] = self._fetch(str(picture.url))
        else:
            self.seen.pictures[number] = base64.b64decode(str(picture.b64_json))

    def _film(self, number: int) -> None:
        headers = {"Idempotency-Key": f"{id(self)} {number}"}  # whoever asks again means the same film
        ask = partial(
            self._client.videos.create,
            prompt="a red rocket takes off",
            extra_body={"seed": number},
            extra_headers=headers,
        )
        job = ask()
        self._count_repeated(number, ask().id == job.id)
        while job.status in ("queued", "in_progress"):
            time.sleep(0.25)
            job = self._client.videos.retrieve(job.id)
        if job.status != "completed":
            raise LookupError(f"film {number} {job.status}: {job.error}")
        self.seen.films[number] = self._again(lambda: self._client.videos.download_content(job.id).read())

    def _count_repeated(self, number: int, alike: bool) -> None:
        """A request with an `Idempotency-Key`, sent again to whichever server, was answered alike."""
        if not alike:
            raise LookupError(f"what was asked for again under the key of {number} is another one")
        with self._lock:
            self.seen.repeated += 1

    def _fetch(self, url: str) -> bytes:
        return self._again(lambda: self._http.get(url).raise_for_status().content)

    def _again(self, fetch: Callable[[], bytes]) -> bytes:
        """Ask again where a connection broke in the midst of a body: no balancer can hide that."""
        for _ in range(TRIES - 1):
            try:
                return fetch()
            except (httpx.TransportError, openai.APIConnectionError):
                with self._lock:
                    self.seen.asked_again += 1
        return fetch()


@dataclass(frozen=True)
class Outcome:
    """One run in which a server was killed, beside an undisturbed one."""

    killed: int
    killed_after_seconds: float
    ready_again_after_seconds: float
    seconds: float
    undisturbed_seconds: float
    pictures: int
    films: int
    repeated: int
    wrong: int
    lost: list[str]
    bodies_asked_for_again: int


def with_one_killed(house: House, calm: Seen, seed: int) -> Outcome:
    """Ask for what ``calm`` has while one server is killed, at a random time, and started again two seconds later."""
    chance = random.Random(seed)
    which, after = chance.randrange(2), chance.uniform(0.1, 0.7) * calm.seconds
    clients, times = Clients(house.url), list[float]()

    def disturb() -> None:
        time.sleep(after)
        house.servers[which].kill()
        time.sleep(2)
        house.servers[which].start()
        times.append(time.monotonic())

    begun, disturbance = time.monotonic(), threading.Thread(target=disturb)
    disturbance.start()
    seen = clients.work(len(calm.pictures), len(calm.films))
    disturbance.join()
    pairs = ((seen.pictures, calm.pictures), (seen.films, calm.films))
    return Outcome(
        killed=which,
        killed_after_seconds=round(after, 1),
        ready_again_after_seconds=round(times[0] - begun, 1),
        seconds=seen.seconds,
        undisturbed_seconds=calm.seconds,
        pictures=len(seen.pictures),
        films=len(seen.films),
        repeated=seen.repeated,
        wrong=sum(content != right[number] for found, right in pairs for number, content in found.items()),
        lost=seen.lost,
        bodies_asked_for_again=seen.asked_again,
    )


def install_haproxy() -> None:
    """Install Debian's, where there is none, without starting its service."""
    if shutil.which("haproxy") is None:
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
        subprocess.run(["apt-get", "install", "-y", "-q", "haproxy"], env=quiet, check=True)


def main(
    checkpoint: Annotated[list[Path], typer.Option(help="Folders of a picture model and a film model.")],
    pictures: int = 200,
    films: int = 20,
    seed: Annotated[list[int], typer.Option(help="Of the time at which a server is killed; one run each.")] = [1],  # noqa: B006
) -> None:
    """Draw and film through a balancer, undisturbed and then with a server killed, and print what was seen."""
    with tempfile.TemporaryDirectory(prefix="rmd-") as name, two_servers(checkpoint, Path(name)) as house:
        calm = Clients(house.url).work(pictures, films)
        assert not calm.lost, calm.lost
        for one in seed:
            print(json.dumps(asdict(with_one_killed(house, calm, one))), flush=True)


def _at(port: int) -> str:
    return f"127.0.0.1:{port}"


def _ready(port: int) -> str:
    return f"http://{_at(port)}/health/ready"


if __name__ == "__main__":
    typer.run(main)
