"""Tokens of the fake score network, for DMD2's discriminator and SwD's patch loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rmd.size import Size
from training.distill.rollout import Prompts, X0Backbone


class TokenTap:
    """Catches the tokens that one block of a network puts out."""

    def __init__(self, network: nn.Module) -> None:
        self.block = middle_block(network)
        self.tokens: Tensor | None = None

    @contextmanager
    def listening(self) -> Iterator[TokenTap]:
        """While active, `tokens` is (B, N, D) of the last call."""
        handle = self.block.register_forward_hook(self._catch)
        try:
            yield self
        finally:
            handle.remove()

    def _catch(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        # Joint blocks (SD3) return text first and picture last.
        value = output[-1] if isinstance(output, tuple) else output
        self.tokens = value.flatten(2).transpose(1, 2) if value.ndim == 4 else value

    def take(self) -> Tensor:
        """The tokens of the last call; forgotten here."""
        if self.tokens is None:
            raise RuntimeError("the network was not called while the tap listened")
        tokens, self.tokens = self.tokens, None
        return tokens


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
def token_width(backbone: X0Backbone, prompts: Prompts, fake: nn.Module, size: Size) -> int:
    """Channels of the tokens that the fake network's middle block puts out."""
    latents = torch.zeros(1, *backbone.latent_shape(size), device=backbone.device)
    with TokenTap(fake).listening() as tap:
        backbone.predict_x0(latents, torch.full((1,), 0.5), prompts.unconditional(1), size, denoiser=fake)
        return int(tap.take().shape[-1])


class DiscriminatorHead(nn.Module):
    """One logit a picture from the mean of its tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, width)
        self.logit = nn.Linear(width, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B,) logits from tokens (B, N, D)."""
        pooled = self.norm(tokens.to(self.logit.weight.dtype).mean(1))
        logits: Tensor = self.logit(torch.nn.functional.silu(self.hidden(pooled)))
        return logits.squeeze(-1)
