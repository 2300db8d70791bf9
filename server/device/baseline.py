"""The teacher's own latency: timed when the server starts, and again in moments when nothing else runs."""

from __future__ import annotations

import copy
import statistics
import time
from collections import deque
from collections.abc import Callable

import torch

from rmd.backbones.base import Backbone
from rmd.backbones.executor import EagerExecutor
from rmd.size import Size
from server.core.card import COMPILED_TEACHER, EAGER_TEACHER, TeacherBaseline
from server.core.costs import CostTable
from server.core.stations import TEACHER, StationKey

_REMEMBERED = 9
_LEAST_TIMINGS = 3
_PATIENCE_SECONDS = 2.0
RETIME_SECONDS = 30.0


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Run once; return its seconds, the device's own work included."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def denoiser_work(backbone: Backbone, size: Size, rows: int) -> Callable[[], object]:
    """Return a step of ``rows`` rows with random input, to be timed."""
    latents = torch.randn(rows, *backbone.latent_shape(size), device=backbone.device)
    times = torch.full((rows,), 0.5, dtype=torch.float64, device=backbone.device)
    conditioning = backbone.random_conditioning(rows)
    return lambda: backbone.predict_x0(latents, times, conditioning, size)


class EagerTeacher:
    """The eager teacher at batch 1: one guided step (two rows) of its steps, one prompt, one decoding.

    Args:
        backbone: its network, or the student's, which has its shape. Its modules as they are now are kept.
        size: of a finished picture.
        steps: of its schedule.
    """

    def __init__(self, backbone: Backbone, size: Size, steps: int) -> None:
        eager = copy.copy(backbone)
        eager.executor = EagerExecutor(backbone.component_modules())
        self._device, self._steps = backbone.device, steps
        self._step = denoiser_work(eager, size, 2)
        latents = torch.zeros(1, *backbone.latent_shape(size), device=backbone.device)
        self._encode = _least(lambda: eager.encode_prompts(["a red rocket"]), self._device)
        self._decode = _least(lambda: eager.decode(latents, size), self._device)
        self.frozen = False  # its weights have moved into engines: it cannot be timed again
        self._timings: deque[float] = deque(maxlen=_REMEMBERED)
        timed(self._step, self._device)  # the first run of its shape is no measure
        end = time.monotonic() + _PATIENCE_SECONDS
        while len(self._timings) < _REMEMBERED and (time.monotonic() < end or len(self._timings) < _LEAST_TIMINGS):
            self.time_again()

    @property
    def due(self) -> bool:
        """Whether the latest timing is old enough for another."""
        return not self.frozen and time.monotonic() - self._measured > RETIME_SECONDS

    def time_again(self) -> None:
        """Time one more guided step."""
        self._timings.append(timed(self._step, self._device))
        self._measured = time.monotonic()

    def baseline(self) -> TeacherBaseline:
        """Return the present estimate: the median of the latest timings, and how far they spread."""
        quarters = statistics.quantiles(self._timings, n=4)
        return TeacherBaseline(
            kind=EAGER_TEACHER,
            steps=self._steps,
            guided_step_seconds=statistics.median(self._timings),
            encode_seconds=self._encode,
            decode_seconds=self._decode,
            measured=self._measured,
            spread=quarters[2] / max(quarters[0], 1e-9),
        )


def compiled_baseline(costs: CostTable, size: Size, steps: int, spread: float, model: str = "") -> TeacherBaseline:
    """Read the compiled teacher's latency off the costs of a model's stations."""
    return TeacherBaseline(
        kind=COMPILED_TEACHER,
        steps=steps,
        guided_step_seconds=costs.seconds(StationKey("denoise", TEACHER, size, model), 2),
        encode_seconds=costs.seconds(StationKey("encode", model=model), 1),
        decode_seconds=costs.seconds(StationKey("decode", size=size, model=model), 1),
        measured=time.monotonic(),
        spread=spread,
    )


def _least(work: Callable[[], object], device: torch.device) -> float:
    timed(work, device)
    return min(timed(work, device) for _ in range(3))
