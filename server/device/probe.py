"""Tells a poisoned request from a broken device: work that is known to be good, at the start and after failures."""

from __future__ import annotations

import logging
from collections import Counter

import torch

from rmd.sampler import initial_noise
from server.core.stages import stations_in
from server.core.stations import StationKey
from server.device.model import DeviceModel
from server.device.steps import check_finite

log = logging.getLogger("rmd.server")

_FAILURES = 3
_PROMPT = "a red rocket"


class DeviceBroken(Exception):  # noqa: N818  -- it says what happened
    """The device can compute nothing any more; only a new process may help."""


@torch.inference_mode()
def prove(model: DeviceModel) -> None:
    """Encode one prompt, take one step from noise at each size, decode once at each.

    Raises:
        NonFiniteError: a network returns NaN or infinity.
        RuntimeError: whatever else a network raises.
    """
    backbone = model.backbone
    conditioning = backbone.encode_prompts([_PROMPT]) if model.stages & {"low", "high"} else {}
    check_finite(conditioning.values(), "the text encoder's output for a plain prompt")
    time = torch.full((1,), 0.5, dtype=torch.float64, device=backbone.device)
    for key in stations_in(model.card, model.stages):
        if key.size is None:
            continue
        if key.kind == "denoise":
            noise = initial_noise(backbone.latent_shape(key.size), [0], backbone.device, torch.float32)
            x0 = model.lanes[key.lane].predict_x0(noise, time, conditioning, key.size)
            check_finite([x0], f"the denoiser's output at {key.size} for noise and a plain prompt")
        else:
            latents = torch.zeros(1, *backbone.latent_shape(key.size), device=backbone.device)
            check_finite([backbone.decode(latents, key.size)], f"the decoder's output at {key.size} for zeros")
    if backbone.device.type == "cuda":
        torch.cuda.synchronize(backbone.device)


class Breaker:
    """Counts requests that failed with no success between them, at each station; then probes.

    At each station: a decoder that fails every picture comes after text and steps that went well, and so do the steps
    of one size, which may have an engine of their own.

    Args:
        model: what is probed, see :func:`prove`.
    """

    def __init__(self, model: DeviceModel) -> None:
        self._model = model
        self._failures: Counter[StationKey] = Counter()

    def succeeded(self, key: StationKey) -> None:
        """A batch ran at a station."""
        self._failures[key] = 0

    def failed(self, key: StationKey, error: Exception) -> None:
        """A request failed at a station.

        Raises:
            DeviceBroken: so did the probe.
        """
        self._failures[key] += 1
        if self._failures[key] < _FAILURES:
            return
        self._failures[key] = 0
        log.warning("%d requests in a row failed, the last with %s; probing the device", _FAILURES, error)
        try:
            prove(self._model)
        except Exception as broken:
            raise DeviceBroken(f"the probe failed too: {type(broken).__name__}: {broken}") from broken
