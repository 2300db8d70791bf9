"""Tells a poisoned request from a broken device: after failures of several requests, work that is known to be good."""

from __future__ import annotations

import logging

import torch

from server.core.stages import stations_in
from server.device.baseline import denoiser_work
from server.device.model import DeviceModel

log = logging.getLogger("rmd.server")

_FAILURES = 3


class DeviceBroken(Exception):  # noqa: N818  -- it says what happened
    """The device can compute nothing any more; only a new process may help."""


class Breaker:
    """Counts requests that failed with no success between them; then probes.

    Args:
        model: what the probe runs: one prompt, one step at each size, one decoding.
    """

    def __init__(self, model: DeviceModel) -> None:
        self._model = model
        self._failures = 0

    def succeeded(self) -> None:
        """A batch ran."""
        self._failures = 0

    def failed(self, error: Exception) -> None:
        """A request failed.

        Raises:
            DeviceBroken: so did the probe.
        """
        self._failures += 1
        if self._failures < _FAILURES:
            return
        self._failures = 0
        log.warning("%d requests in a row failed, the last with %s; probing the device", _FAILURES, error)
        try:
            self._probe()
        except Exception as broken:
            raise DeviceBroken(f"the probe failed too: {type(broken).__name__}: {broken}") from broken

    def _probe(self) -> None:
        model = self._model
        for key in stations_in(model.card, model.stages):
            if key.kind == "encode":
                model.backbone.encode_prompts(["a red rocket"])
            elif key.kind == "denoise" and key.size is not None:
                denoiser_work(model.lanes[key.lane], key.size, 1)()
            elif key.kind == "decode" and key.size is not None:
                latents = torch.zeros(1, *model.backbone.latent_shape(key.size), device=model.backbone.device)
                model.backbone.decode(latents, key.size)
        if model.backbone.device.type == "cuda":
            torch.cuda.synchronize(model.backbone.device)
