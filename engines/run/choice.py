"""With which backend a checkpoint's engines are loaded: what was built decides, and what can be built here."""

from __future__ import annotations

from collections.abc import Sequence

from engines.compilers import get_compiler
from engines.errors import BackendUnavailable
from engines.plan.checkpoint import CheckpointPlan, missing_engines
from engines.plan.options import EngineOptions, default_buckets
from engines.store import EngineStore
from engines.target import parse_device
from rmd.checkpoint import CheckpointFolder


def loadable_options(
    checkpoint: CheckpointFolder,
    store: EngineStore,
    backend: str = "auto",
    device: str = "cpu",
    dtype: str = "auto",
    buckets: Sequence[int] | None = None,
) -> tuple[EngineOptions, str]:
    """What to load engines with, and one sentence when it is not the first choice.

    A machine that cannot build (no C++ compiler) still runs AOTInductor engines that are all in its store already.
    "auto" takes the first backend that can build here; where that one's engines are not all there and another's are,
    since it was stepped down to, the other.

    Raises:
        BackendUnavailable: the named backend cannot build here, and its engines are not there either.
        EngineError: a wrong bucket or dtype.
    """
    ladder, note = loadable_ladder(checkpoint, store, backend, device, dtype, buckets)
    backends = {manifest.spec.backend for manifest in store.list()} if len(ladder) > 1 else set()
    for options in ladder:
        if options.backend in backends and _is_built(checkpoint, store, options):
            other = f"{ladder[0].backend} engines are not built, {options.backend}'s are"
            return options, note if options is ladder[0] else other
    return ladder[0], note


def loadable_ladder(
    checkpoint: CheckpointFolder,
    store: EngineStore,
    backend: str = "auto",
    device: str = "cpu",
    dtype: str = "auto",
    buckets: Sequence[int] | None = None,
) -> tuple[tuple[EngineOptions, ...], str]:
    """All that engines may be loaded with, the best first: one where a backend is named. Else as
    :func:`loadable_options`."""
    built = EngineOptions("inductor", device, dtype, default_buckets(device) if buckets is None else tuple(buckets))
    can = get_compiler("inductor").capabilities(parse_device(device).type)
    if can.available or backend not in ("auto", "inductor"):
        return EngineOptions.ladder(backend, device, dtype, buckets)
    try:
        ladder, note = EngineOptions.ladder(backend, device, dtype, buckets)
    except BackendUnavailable:
        if not _is_built(checkpoint, store, built):
            raise
        return (built,), ""
    if ladder[0].backend == "eager" and _is_built(checkpoint, store, built):
        return (built, *ladder), ""
    return ladder, note


def _is_built(checkpoint: CheckpointFolder, store: EngineStore, options: EngineOptions) -> bool:
    return not missing_engines(CheckpointPlan(checkpoint, options), store)
