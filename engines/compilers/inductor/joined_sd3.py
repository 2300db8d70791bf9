"""``SD3Denoiser`` and ``FilmDenoiser`` in fewer, larger matrix products, computing the same.

At batch 1 and 16 tokens a step costs what its calls cost, not what its arithmetic does. The SD3 transformer asks for
q, k and v apart, and for the modulation of picture and text apart although both read the same vector; here each is
one product.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.compilers.inductor.attention import Attention
from engines.compilers.inductor.joined import Joined
from engines.weights.recipes import Recipe

_EPSILON = 1e-6


def is_plain_sd3(transformer: Any) -> bool:
    """Of pictures or films, without query-key norms and without the second attention of SD3.5-medium."""
    return type(transformer).__name__ in ("SD3Transformer2DModel", "FilmTransformer") and all(
        block.attn2 is None and block.attn.norm_q is None and block.attn.norm_added_q is None
        for block in transformer.transformer_blocks
    )


class JoinedSD3(Joined):
    """``SD3Denoiser`` or ``FilmDenoiser`` with joined matrices at one size; same arguments, same result up to rounding.

    Args:
        transformer: an ``SD3Transformer2DModel`` or ``FilmTransformer`` without query-key norms and dual attention.
        prefix: of its parameters' names in the component.
        latents: of any batch and the size, (B, C, H, W) or (B, C, T, H, W).
        attend: attention of query, key and value, each (B, H, N, D).
    """

    frequencies: Tensor
    positions: Tensor
    moments: Tensor

    def __init__(self, transformer: Any, prefix: str, latents: Tensor, attend: Attention) -> None:
        super().__init__(transformer, prefix)
        self._attend = attend
        config = transformer.config
        self.heads = int(config.num_attention_heads)
        self.patch = int(config.patch_size)
        self.width = int(transformer.inner_dim)
        height, width = latents.shape[-2:]
        self.grid = height // self.patch, width // self.patch
        self.frames = latents.shape[2] if latents.ndim == 5 else 1

        # A convolution whose kernel is its stride is a product over patches.
        self.patches = self.join("patches", [transformer.pos_embed.proj])
        crop = Recipe((f"{prefix}pos_embed.pos_embed",), crop=self.grid)
        self.sources["positions"] = crop
        table = crop.make({crop.sources[0]: transformer.pos_embed.pos_embed})
        self.register_buffer("positions", table.clone())
        if self.frames > 1:  # a film of one frame is a picture
            rows = Recipe((f"{prefix}temporal_embed",), rows=self.frames)
            self.sources["moments"] = rows
            self.register_buffer("moments", rows.make({rows.sources[0]: transformer.temporal_embed.detach()}))
        self.sources["frequencies"] = Recipe(())
        self.register_buffer("frequencies", _frequencies(transformer.time_text_embed.time_proj.num_channels))
        embed = transformer.time_text_embed
        self.time_up = self.join("time_up", [embed.timestep_embedder.linear_1])
        self.time_down = self.join("time_down", [embed.timestep_embedder.linear_2])
        self.pooled_up = self.join("pooled_up", [embed.text_embedder.linear_1])
        self.pooled_down = self.join("pooled_down", [embed.text_embedder.linear_2])
        self.text = self.join("text", [transformer.context_embedder])
        self.out = self.join("out", [transformer.proj_out])
        # One product a block, not one for all: then the blocks' kernels read alike, and each is compiled once.
        self.last_modulation = self.join("last_modulation", [transformer.norm_out.linear])
        self.blocks = nn.ModuleList(
            self._join_block(f"blocks.{index}.", block) for index, block in enumerate(transformer.transformer_blocks)
        )

    def _join_block(self, path: str, block: Any) -> nn.ModuleDict:
        attention = block.attn
        parts = {
            "modulation": [block.norm1.linear, block.norm1_context.linear],
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
        return nn.ModuleDict({name: self.join(path + name, linears) for name, linears in parts.items()})

    def forward(
        self, latents: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor
    ) -> Tensor:
        """Velocity, of the latents' shape; arguments as ``SD3Denoiser``."""
        image = self._tokens(latents)
        text = self.text(encoder_hidden_states)
        angles = timestep[:, None] * self.frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(image.dtype)
        condition = self.time_down(F.silu(self.time_up(waves))) + self.pooled_down(
            F.silu(self.pooled_up(pooled_projections))
        )
        condition = F.silu(condition)
        for block in self.blocks:
            image, text = self._block(block, image, text, condition)  # type: ignore[arg-type]
        scale, shift = self.last_modulation(condition).unsqueeze(1).chunk(2, dim=-1)
        return self._velocity(self.out(self._modulate(image, scale, shift)), latents)

    # Pictures are cut without a dimension of frames: with one of a single frame, a 256 px step at batch 1 took 16 ms
    # instead of 10.

    def _tokens(self, latents: Tensor) -> Tensor:
        """(B, [T] N, D), frame by frame."""
        batch, (height, width), size = latents.shape[0], self.grid, self.patch
        if latents.ndim == 4:
            cut = latents.reshape(batch, -1, height, size, width, size).permute(0, 2, 4, 1, 3, 5)
            pictures: Tensor = self.patches(cut.reshape(batch, height * width, -1)) + self.positions
            return pictures
        frames = self.frames
        cut = latents.reshape(batch, -1, frames, height, size, width, size).permute(0, 2, 3, 5, 1, 4, 6)
        image: Tensor = self.patches(cut.reshape(batch * frames, height * width, -1)) + self.positions
        if frames > 1:
            # Patch by patch: what is done to a constant alone would be folded, and could not be traced.
            image = (image.reshape(batch, frames, height * width, -1).transpose(1, 2) + self.moments).transpose(1, 2)
        return image.reshape(batch, frames * height * width, -1)

    def _velocity(self, patches: Tensor, latents: Tensor) -> Tensor:
        """Of the shape of ``latents``."""
        batch, (height, width), size = patches.shape[0], self.grid, self.patch
        if latents.ndim == 4:
            cut = patches.reshape(batch, height, width, size, size, -1).permute(0, 5, 1, 3, 2, 4)
        else:
            cut = patches.reshape(batch, self.frames, height, width, size, size, -1).permute(0, 6, 1, 2, 4, 3, 5)
        return cut.reshape(latents.shape)

    def _block(self, block: nn.ModuleDict, image: Tensor, text: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        batch, tokens = image.shape[:2]
        last = "text_out" not in block
        row = block["modulation"](condition).unsqueeze(1)
        image_row, text_row = row.split([6 * self.width, row.shape[-1] - 6 * self.width], dim=-1)
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
        mixed = self._attend(query, key, value).transpose(1, 2).reshape(batch, -1, self.width)
        image = image + gate * _by_row(block["out"], mixed[:, :tokens])
        image = image + gate_up * block["down"](gelu_tanh(block["up"](self._modulate(image, scale_up, shift_up))))
        if not last:
            text = text + text_gate * _by_row(block["text_out"], mixed[:, tokens:])
            hidden = gelu_tanh(block["text_up"](self._modulate(text, text_scale_up, text_shift_up)))
            text = text + text_gate_up * block["text_down"](hidden)
        return image, text

    def _modulate(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return F.layer_norm(x, (self.width,), eps=_EPSILON) * (1 + scale) + shift


def _by_row(linear: nn.Module, x: Tensor) -> Tensor:
    """``linear`` of a slice (B, N, D). As it lies, the slice of a batch would become B products with B copies of the
    weight, which cannot be packed once."""
    rows: Tensor = linear(x.reshape(-1, x.shape[-1]))
    return rows.reshape(*x.shape[:2], -1)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU's tanh form as 0.5 x (1 + tanh u) = x sigmoid(2 u): one exponential; a vectorised tanh costs several.

    In float32 and rounded once, as eager's single operation is: engines round bfloat16 after every one of theirs.
    """
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    return (y * torch.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))).to(x.dtype)


def _frequencies(channels: int) -> Tensor:
    """Of the sinusoidal time embedding, as diffusers' ``Timesteps`` has them without a frequency shift."""
    half = channels // 2
    return torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32) / half)
