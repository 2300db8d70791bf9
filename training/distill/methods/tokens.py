"""What the middle of the fake score network puts out, for discriminators and SwD's patch loss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rmd.size import Size
from training.distill.rollout import Prompts, X0Backbone


class TokenTap:
    """Catches what the middle block of a network puts out."""

    def __init__(self, network: nn.Module) -> None:
        self.block = middle_block(network)
        self.caught: Tensor | None = None

    @contextmanager
    def listening(self) -> Iterator[TokenTap]:
        """While active, every call of the network is caught."""
        handle = self.block.register_forward_hook(self._catch)
        try:
            yield self
        finally:
            handle.remove()

    def _catch(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        # Joint blocks (SD3) return text first and picture last.
        self.caught = output[-1] if isinstance(output, tuple) else output

    def take(self) -> Tensor:
        """The tokens (B, N, D) of the last call; forgotten here."""
        caught = self._take()
        return caught.flatten(2).transpose(1, 2) if caught.ndim == 4 else caught

    def take_map(self, latents: Tensor) -> Tensor:
        """The same as a map (B, D, h, w) with the proportions of the picture's `latents`."""
        caught = self._take()
        if caught.ndim == 4:
            return caught
        height = round(math.sqrt(caught.shape[1] * latents.shape[-2] / latents.shape[-1]))
        return caught.transpose(1, 2).reshape(caught.shape[0], caught.shape[2], height, -1)

    def _take(self) -> Tensor:
        if self.caught is None:
            raise RuntimeError("the network was not called while the tap listened")
        caught, self.caught = self.caught, None
        return caught


def middle_block(network: nn.Module) -> nn.Module:
    """A U-Net's bottleneck, or the middle block of a transformer.

    Raises:
        ValueError: the network has neither.
    """
    for module in network.modules():
        middle = getattr(module, "mid_block", None)
        if isinstance(middle, nn.Module):
            return middle
        for name in ("transformer_blocks", "blocks"):
            blocks = getattr(module, name, None)
            if isinstance(blocks, nn.ModuleList) and len(blocks):
                # Not the last one: a joint transformer's last block drops the text.
                return blocks[(len(blocks) - 1) // 2]
    raise ValueError(f"{type(network).__name__} has no mid_block, transformer_blocks or blocks to take tokens from")


@torch.no_grad()
def middle_map(backbone: X0Backbone, prompts: Prompts, network: nn.Module, size: Size) -> Tensor:
    """The map (1, D, h, w) that a network's middle puts out at a size, for a head that is built on it."""
    latents = torch.zeros(1, *backbone.latent_shape(size), device=backbone.device)
    t = torch.full((1,), 0.5, dtype=torch.float64, device=backbone.device)
    with TokenTap(network).listening() as tap:
        backbone.predict_x0(latents, t, prompts.unconditional(1), size, denoiser=network)
        return tap.take_map(latents)
