"""What batches cost here, timed once as each station opens; the scheduler learns the rest from real batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch

from engines.run.live import LiveExecutor
from rmd.backbones.base import Backbone
from server.core.costs import MIN_GAIN
from server.core.stations import STUDENT, TEACHER, StationKey
from server.device.baseline import denoiser_work, timed

log = logging.getLogger("rmd.server")

COMPONENTS = {"encode": "text_encoder", "denoise": "denoiser", "decode": "decoder"}
_REPEATS = 5
_PATIENCE_SECONDS = 0.25


def measure_station(lanes: Mapping[str, Backbone], key: StationKey, max_batch: int) -> dict[int, float]:
    """Time a station's batches: rows -> seconds, the least of a few; the first run of each is warm-up.

    With engines: every bucket, all of which have to be warm, and on from there; eager: doubling while that pays. Either
    way up to ``max_batch``, and no wider than memory allows. Of the teacher's denoiser always two rows, which are one
    guided picture's.

    Raises:
        torch.OutOfMemoryError: not even the narrowest batch fits.
    """
    backbone = lanes[key.lane]
    buckets = compiled_buckets(backbone, key)
    for bucket in buckets:
        # Root costs make the executor run any batch in the next bucket that holds it, as the scheduler's table has it:
        # what a batch costs is for the scheduler alone to know; what the build recorded may be a busy hour's.
        _live(backbone).learn(COMPONENTS[key.kind], key.size, bucket, bucket**0.5)
    doubling = tuple(2**k for k in range(max_batch.bit_length()) if 2**k <= max_batch)
    # More than the widest engine holds is several runs of it. Where they are short these still save turns, and all but
    # the first find their weights in cache.
    batches = buckets + tuple(batch for batch in doubling if batch > max(buckets, default=0))
    if key.kind == "denoise" and key.lane == TEACHER:
        batches = tuple(sorted({*batches, 2}))
    works = {batch: _work(lanes, key, batch) for batch in batches}
    measured: dict[int, float] = {}
    best_rate = 0.0
    for batch, work in works.items():
        if batch > max(buckets, default=batch) and 2 * max(measured.values()) > _PATIENCE_SECONDS:
            break
        try:
            timed(work, backbone.device)
            measured[batch] = timed(work, backbone.device)
        except torch.OutOfMemoryError:
            if not measured:
                raise
        if batch not in measured:
            torch.cuda.empty_cache()  # out here, where no traceback keeps the failed batch's tensors
            log.warning("%s: no memory for a batch of %d; at most %d share one", key.label, batch, max(measured))
            break
        rate = batch / measured[batch]
        if not buckets and rate < best_rate * MIN_GAIN:
            break
        best_rate = max(best_rate, rate)
    _time_again({batch: works[batch] for batch in measured}, measured, backbone.device)
    return measured


def _time_again(works: Mapping[int, Callable[[], object]], measured: dict[int, float], device: torch.device) -> None:
    """Lower each width's seconds to the least of a few timings: noise on a shared machine only ever adds.

    The widths take turns, so that a busy second is not held against one of them.
    """
    spent = sum(measured.values())
    for _ in range(_REPEATS - 1):
        if spent > _PATIENCE_SECONDS * len(works):
            return
        for batch, work in works.items():
            seconds = timed(work, device)
            measured[batch] = min(measured[batch], seconds)
            spent += seconds


def compiled_buckets(backbone: Backbone, key: StationKey) -> tuple[int, ...]:
    """Return the batch sizes that have an engine at a station; none where it runs eager."""
    if not isinstance(backbone.executor, LiveExecutor):
        return ()
    return backbone.executor.buckets(COMPONENTS[key.kind], key.size)


def _live(backbone: Backbone) -> LiveExecutor:
    assert isinstance(backbone.executor, LiveExecutor)
    return backbone.executor


def _work(lanes: Mapping[str, Backbone], key: StationKey, batch: int) -> Callable[[], object]:
    backbone, size = lanes[key.lane], key.size
    if key.kind == "encode":
        prompts = [f"a red rocket, number {i}" for i in range(batch)]
        return lambda: lanes[STUDENT].encode_prompts(prompts)
    assert size is not None
    if key.kind == "decode":
        latents = torch.zeros(batch, *backbone.latent_shape(size), device=backbone.device)
        return lambda: backbone.decode(latents, size)
    return denoiser_work(backbone, size, batch)
