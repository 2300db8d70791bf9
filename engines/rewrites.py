"""Networks rewritten into fewer, larger matrix products, computing the same.

At batch 1 and 16 tokens a step costs what its calls cost, not what its arithmetic does. The SD3 transformer asks for
q, k and v apart, and for each block's modulation apart although all of them read the same vector; here each is one
product. Parameters are joined, never changed, and :class:`Rewritten` tells from which the joined ones come.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EPSILON = 1e-6


@dataclass(frozen=True)
class Rewritten:
    """A module to compile in place of the original.

    Attributes:
        module: takes and returns what the original does.
        sources: for parameters of ``module`` that were joined (or renamed): names in the original, in order.
        name: of the rewriting, part of the engine's key; "" when the module is the original.
    """

    module: nn.Module
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)
    name: str = ""


def rewrite(module: nn.Module) -> Rewritten:
    """The fastest known form of ``module`` for the CPU; the module itself when none applies."""
    transformer = getattr(module, "transformer", None)
    if type(transformer).__name__ == "SD3Transformer2DModel" and _is_plain_sd3(transformer):
        joined = JoinedSD3(transformer, "transformer.")
        return Rewritten(joined, joined.sources, "joined-sd3-1")
    return Rewritten(module)


def rewriting(module: nn.Module) -> str:
    """The name that :func:`rewrite` would give, without doing it (works on the meta device)."""
    transformer = getattr(module, "transformer", None)
    return (
        "joined-sd3-1" if type(transformer).__name__ == "SD3Transformer2DModel" and _is_plain_sd3(transformer) else ""
    )


def _is_plain_sd3(transformer: Any) -> bool:
    """Without query-key norms and without the second attention of SD3.5-medium."""
    return all(
        block.attn2 is None and block.attn.norm_q is None and block.attn.norm_added_q is None
        for block in transformer.transformer_blocks
    )


class JoinedSD3(nn.Module):
    """``SD3Denoiser`` with joined matrices; same arguments, same result up to rounding.

    Args:
        transformer: an ``SD3Transformer2DModel`` without query-key norms and dual attention.
        prefix: of its parameters' names in the component.
    """

    pos_embed: nn.Module
    time_text_embed: nn.Module
    context_embedder: nn.Module
    proj_out: nn.Module

    def __init__(self, transformer: Any, prefix: str) -> None:
        super().__init__()
        config = transformer.config
        self.heads = int(config.num_attention_heads)
        self.patch = int(config.patch_size)
        self.width = int(transformer.inner_dim)
        self.sources: dict[str, tuple[str, ...]] = {}
        names = {id(child): f"{prefix}{name}" for name, child in transformer.named_modules()}

        def keep(attribute: str, child: nn.Module) -> None:
            setattr(self, attribute, child)
            for name, _ in [*child.named_parameters(), *child.named_buffers()]:
                self.sources[f"{attribute}.{name}"] = (f"{names[id(child)]}.{name}",)

        keep("pos_embed", transformer.pos_embed)
        keep("time_text_embed", transformer.time_text_embed)
        keep("context_embedder", transformer.context_embedder)
        keep("proj_out", transformer.proj_out)
        modulations: list[Any] = []
        for block in transformer.transformer_blocks:
            modulations += [block.norm1.linear, block.norm1_context.linear]
        modulations.append(transformer.norm_out.linear)
        self.widths = [linear.out_features for linear in modulations]

        def join(path: str, linears: list[Any]) -> nn.Linear:
            for parameter in ("weight", "bias"):
                self.sources[f"{path}.{parameter}"] = tuple(f"{names[id(linear)]}.{parameter}" for linear in linears)
            return _join(linears)

        self.modulation = join("modulation", modulations)
        blocks = []
        for index, block in enumerate(transformer.transformer_blocks):
            attention, at = block.attn, f"blocks.{index}."
            parts = {
                "qkv": [attention.to_q, attention.to_k, attention.to_v],
                "out": [attention.to_out[0]],
                "up": [block.ff.net[0].proj],
                "down": [block.ff.net[2]],
                "text_qkv": [attention.add_q_proj, attention.add_k_proj, attention.add_v_proj],
            }
            if not block.context_pre_only:
                parts["text_out"] = [attention.to_add_out]
                parts["text_up"] = [block.ff_context.net[0].proj]
                parts["text_down"] = [block.ff_context.net[2]]
            blocks.append(nn.ModuleDict({name: join(at + name, linears) for name, linears in parts.items()}))
        self.blocks = nn.ModuleList(blocks)

    def forward(
        self, latents: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor
    ) -> Tensor:
        """Velocity (B, C, H, W); arguments as ``SD3Denoiser``."""
        batch, height, width = latents.shape[0], latents.shape[-2] // self.patch, latents.shape[-1] // self.patch
        image = self.pos_embed(latents)
        text = self.context_embedder(encoder_hidden_states)
        condition = self.time_text_embed(timestep, pooled_projections)
        rows = self.modulation(F.silu(condition)).unsqueeze(1).split(self.widths, dim=-1)
        for index, block in enumerate(self.blocks):
            image, text = self._block(block, image, text, rows[2 * index], rows[2 * index + 1])  # type: ignore[arg-type]
        scale, shift = rows[-1].chunk(2, dim=-1)
        patches = self.proj_out(self._modulate(image, scale, shift))
        patches = patches.reshape(batch, height, width, self.patch, self.patch, -1)
        velocity: Tensor = patches.permute(0, 5, 1, 3, 2, 4)
        return velocity.reshape(batch, -1, height * self.patch, width * self.patch)

    def _block(
        self, block: nn.ModuleDict, image: Tensor, text: Tensor, image_row: Tensor, text_row: Tensor
    ) -> tuple[Tensor, Tensor]:
        batch, tokens = image.shape[:2]
        last = "text_out" not in block
        shift, scale, gate, shift_up, scale_up, gate_up = image_row.chunk(6, dim=-1)
        if last:
            text_scale, text_shift = text_row.chunk(2, dim=-1)
        else:
            text_shift, text_scale, text_gate, text_shift_up, text_scale_up, text_gate_up = text_row.chunk(6, dim=-1)
        joint = torch.cat(
            [
                block["qkv"](self._modulate(image, scale, shift)),
                block["text_qkv"](self._modulate(text, text_scale, text_shift)),
            ],
            dim=1,
        )
        query, key, value = joint.view(batch, joint.shape[1], 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, -1, self.width)
        image = image + gate * block["out"](mixed[:, :tokens])
        image = image + gate_up * block["down"](gelu_tanh(block["up"](self._modulate(image, scale_up, shift_up))))
        if not last:
            text = text + text_gate * block["text_out"](mixed[:, tokens:])
            hidden = gelu_tanh(block["text_up"](self._modulate(text, text_scale_up, text_shift_up)))
            text = text + text_gate_up * block["text_down"](hidden)
        return image, text

    def _modulate(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return F.layer_norm(x, (self.width,), eps=_EPSILON) * (1 + scale) + shift


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU's tanh form as 0.5 x (1 + tanh u) = x sigmoid(2 u): one exponential; a vectorised tanh costs several."""
    return x * torch.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


def _join(linears: list[Any]) -> nn.Linear:
    weight = linears[0].weight if len(linears) == 1 else torch.cat([linear.weight for linear in linears])
    bias = linears[0].bias if len(linears) == 1 else torch.cat([linear.bias for linear in linears])
    with torch.device("meta"):
        joined = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    joined.weight = nn.Parameter(weight.detach(), requires_grad=False)
    joined.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return joined
