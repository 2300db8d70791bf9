"""Video jobs without a network: a runner over a maker that only does what a test tells it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from rmd.backbones.tiny import tiny_cascades
from server.core.admission import Admission
from server.core.faults import Fault, RequestError
from server.core.work import PictureRecord, Work
from server.films.database import Database
from server.films.maker import FilmMaker, JobLimits
from server.films.runner import JobRunner
from server.films.shelf import FilmShelf
from server.films.store import JobStore
from server.films.tables import VideoJob
from server.front.generation import Event, FinishedPicture, Generation, GenerationSpec
from server.objects.store import Objects

NOW = 1000.0
LATER = NOW + 60


def job(model: str = "m", account: str = "", created_at: float = NOW) -> VideoJob:
    request = {"prompt": "a red rocket"}
    return VideoJob(account=account, model=model, request=request, seconds="1", size="32x32", created_at=created_at)


class Maker:
    """Takes specs and finishes them when the test says so."""

    def __init__(self) -> None:
        self.taken: dict[str, tuple[Generation, Callable[[Event], None]]] = {}
        self.cancelled: list[str] = []
        self.refusal: RequestError | None = None
        self.admission = Admission(64, 10**9)

    def prepare(self, request: Mapping[str, Any]) -> GenerationSpec:
        cascade = tiny_cascades("wan-1.3b")["3+3"]
        return GenerationSpec(request["prompt"], "3+3", cascade, "student", (1,), frames_per_second=16)

    def submit(self, spec: GenerationSpec, sink: Callable[[Event], None], job_id: str) -> Generation:
        if self.refusal is not None:
            raise self.refusal
        work = Work(id=job_id, prompt=spec.prompt, schedule=spec.schedule, seeds=spec.seeds, frames_per_second=16)
        generation = Generation(spec, work, self.admission.acquire(1, 1), sink, (1.0,))
        self.taken[job_id] = (generation, sink)
        return generation

    def cancel(self, generation: Generation, error: RequestError) -> None:
        self.cancelled.append(generation.id)

    def tell(self, job_id: str, event: Event) -> None:
        self.taken[job_id][1](event)


FILM = FinishedPicture(0, b"film", PictureRecord(), thumbnail=b"thumbnail", spritesheet=b"sheet")


class Desk:
    """A runner over a maker that only does what it is told."""

    def __init__(self, folder: Path, store: type[JobStore] = JobStore, **limits: Any) -> None:
        self.maker = Maker()
        self.database = Database(f"sqlite:///{folder / 'jobs.sqlite3'}")
        self.store = store(self.database)
        self.films = folder / "films"
        self.shelf = FilmShelf(Objects(self.films))
        maker = FilmMaker(
            self.maker.prepare, self.maker.submit, self.maker.cancel, lambda generation, film: {"schedule": "3+3"}
        )
        bounds = JobLimits(**{"queue": 8, "together": 2, "seconds": 3600.0, "bytes": 10**6, **limits})
        self.runner = JobRunner(self.store, self.shelf, maker, ["m"], bounds)
        self.runner.start()

    def film(self, job: VideoJob) -> Path:
        return self.films / job.id / "video.mp4"

    def status(self, job: VideoJob) -> str:
        found = self.store.get("", job.id)
        return f"{found.status} {found.progress} {found.error_code or ''}".strip() if found else "gone"

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.005)

    def until_status(self, job: VideoJob, status: str) -> None:
        self.until(lambda: self.status(job) == status)

    def accept(self, account: str = "") -> VideoJob:
        return self.runner.accept(job(account=account, created_at=time.time()))

    def refused(self, account: str = "") -> RequestError:
        with pytest.raises(RequestError) as full:
            self.accept(account)
        assert full.value.fault is Fault.QUEUE_FULL
        return full.value
