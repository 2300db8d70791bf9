"""Compiled engines for the server: choose the backend, build what is missing, put them under a backbone."""

from __future__ import annotations

import logging
from collections.abc import Callable

from engines.build import BuildProgress, build_checkpoint, loadable_options
from engines.errors import EngineAccuracyError
from engines.planning import CheckpointPlan, EngineOptions
from engines.runner import EngineExecutor
from engines.store import EngineStore
from rmd.backbones.base import Backbone
from rmd.checkpoint import CheckpointFolder
from server.start.settings import ServerSettings

log = logging.getLogger("rmd.server")

_EAGER = "eager"


def choose_engines(settings: ServerSettings, checkpoint: CheckpointFolder) -> EngineOptions | None:
    """Return what to build and load engines with, or None where the networks run eager.

    Raises:
        BackendUnavailable: a backend was named that cannot be used here.
    """
    if settings.backend == _EAGER:
        return None
    common = (settings.device, settings.dtype, settings.buckets)
    options, note = loadable_options(checkpoint, EngineStore(settings.engines), settings.backend, *common)
    if note:
        log.warning("%s", note)
    return None if options.backend == _EAGER else options


def build_missing(
    settings: ServerSettings, options: EngineOptions, report: Callable[[int, int, str], None]
) -> EngineOptions | None:
    """Build the engines that the store lacks, reporting (done, total, what).

    Returns:
        The options, or None where the backend was ours to choose and its engines are too far from eager: then the
        networks run eager.

    Raises:
        EngineError: they cannot be built; the message says why and what to do.
    """

    def progress(now: BuildProgress) -> None:
        left = "" if now.remaining is None else f", about {now.remaining:.0f} s left"
        report(now.done, now.total, f"building engines ({now.current}{left})")

    try:
        build_checkpoint(
            checkpoint=settings.checkpoint,
            store=settings.engines,
            backend=options.backend,
            progress=progress,
            device=options.device,
            dtype=options.dtype,
            buckets=options.buckets,
            announce=lambda text: log.info("%s", text),
        )
    except EngineAccuracyError as error:
        if settings.backend != "auto":
            raise
        log.warning("running eager: %s", error)
        return None
    return options


def attach_engines(
    settings: ServerSettings,
    options: EngineOptions,
    checkpoint: CheckpointFolder,
    backbone: Backbone,
    foreign: bool = False,
) -> EngineExecutor:
    """Let a loaded backbone run through the built engines; its weights move into them, no second copy is held.

    Args:
        foreign: the backbone's weights are not the checkpoint's own, such as the teacher's.

    Raises:
        EngineMissing: some are not built; the message holds the command that builds them.
        EngineError: they do not fit this machine or these weights.
    """
    plan = CheckpointPlan(checkpoint, options, backbone)
    executor = EngineExecutor.from_plan(plan, EngineStore(settings.engines), foreign=foreign)
    backbone.executor = executor
    return executor
