"""Every engine of a checkpoint; where a backend fails, "auto" steps down to the next."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from engines.build.measure import measure_untimed
from engines.build.missing import BuildReport, build_missing
from engines.build.progress import BuildProgress, Report
from engines.errors import EngineError, NotEnoughDisk
from engines.plan.checkpoint import CheckpointPlan, missing_engines
from engines.plan.options import EngineOptions
from engines.run.buckets import Place, place_of
from engines.stopwatch import Stopwatch
from engines.store import EngineStore
from rmd.checkpoint import CheckpointFolder

log = logging.getLogger(__name__)


def build_checkpoint(
    checkpoint: Path | str,
    store: EngineStore | Path | str,
    backend: str = "auto",
    progress: Report | None = None,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    buckets: Sequence[int] | None = None,
    workers: int | None = None,
    announce: Callable[[str], None] | None = None,
    while_serving: bool = False,
    decoder: Path | str | None = None,
) -> BuildReport:
    """Build what is missing, then measure it with nothing else running.

    Where a backend fails, "auto" goes on with the next (TensorRT, AOTInductor, eager) and logs why: with all engines,
    or beside a server with those that failed. A backend that was named fails with the error.

    Args:
        checkpoint: folder.
        store: where engines go.
        backend: a backend's name or "auto".
        progress: told after each engine.
        device, dtype, buckets: see :class:`~engines.plan.options.EngineOptions`.
        workers: processes that compile at once; None: as many as cores and memory allow.
        announce: given the memory plan and the choice of backend as text, before anything is built.
        while_serving: for a server that runs meanwhile: those engines first that save it most, none measured (its own
            batches tell what they cost), and one that fails does not stop the others.
        decoder: a small decoder's folder or "full"; what the checkpoint names when None.

    Raises:
        NotEnoughMemory: the engines would not fit the device; nothing was built.
        NotEnoughDisk: the disk filled up; engines that were complete stay.
        EngineAccuracyError: an engine's output is not eager's; it was not published.
        EngineError: anything else that the user can mend; the message says how.
    """
    watch = Stopwatch()
    store = store if isinstance(store, EngineStore) else EngineStore(store)
    ladder, note = EngineOptions.ladder(backend, device, dtype, buckets)
    folder = CheckpointFolder.read(checkpoint).with_decoder(decoder)
    if while_serving:  # what runs eager needs no engine for it
        ladder = tuple(options for options in ladder if options.backend != "eager") or ladder
    reports: list[BuildReport] = []
    places: set[Place] | None = None
    onward = _Onward(progress or (lambda _: None))
    for options, lower in zip(ladder, (*ladder[1:], None), strict=True):
        plan = CheckpointPlan(folder, options)
        try:
            report = build_missing(plan, store, places, note, onward, workers, announce, while_serving)
        except NotEnoughDisk:
            raise
        except EngineError as error:
            if lower is None:
                raise
            reason = str(error)
            if while_serving:  # what it did build is in service by now
                lacking = {place_of(engine.component, engine.size) for engine in missing_engines(plan, store)}
                places = lacking if places is None else places & lacking
        else:
            reports.append(report)
            if not report.failed or lower is None:
                break
            reason = f"{report.failed[0].title}: {report.failed[0].error}"
            places = {failure.place for failure in report.failed}
        assert lower is not None
        note = f"{options.backend} is given up for {lower.backend}: {reason}"
        log.warning("%s", note)
        onward.step_down()
    if not while_serving:
        measure_untimed(plan, store)
    built = tuple(store.get(manifest.key) or manifest for report in reports for manifest in report.built)
    whole = replace(reports[-1], built=built, reused=reports[0].reused, seconds=watch.seconds)
    if whole.unpacked:
        first = whole.unpacked[0]
        log.warning("%d of %d engines: %s (%s)", len(whole.unpacked), len(built), first.note, first.spec.title)
    return whole


class _Onward:
    """Progress that goes on where another backend was given up."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._before = self._now = 0

    def __call__(self, told: BuildProgress) -> None:
        self._now = told.done
        self._report(replace(told, done=self._before + told.done, total=self._before + told.total))

    def step_down(self) -> None:
        self._before += self._now
        self._now = 0
