"""The embedded film model's network: the embedded picture model's transformer over the tokens of all frames at once."""

from __future__ import annotations

from typing import Any, Self

import torch
from diffusers import SD3Transformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_1d_sincos_pos_embed_from_grid
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

TEMPORAL_SCALE = 0.2
"""Size of the first temporal embedding beside the positions in a frame, whose values lie in [-1, 1]."""


class FilmTransformer(SD3Transformer2DModel):  # type: ignore[misc]
    """``SD3Transformer2DModel`` on films: every patch of every frame attends to all others and to the text.

    A frame's patches get the position embedding of a picture of that size, and all of one frame the same learned
    temporal embedding besides. So the weights of a picture model carry over whole (:meth:`from_pictures`). A film of
    one frame is a picture: it has no temporal embedding, and the network is then the picture model itself.

    Args:
        max_frames: the longest film, in latent frames.
        others: as for ``SD3Transformer2DModel``.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        sample_size: int = 16,
        patch_size: int = 2,
        in_channels: int = 8,
        num_layers: int = 8,
        attention_head_dim: int = 64,
        num_attention_heads: int = 4,
        joint_attention_dim: int = 384,
        caption_projection_dim: int = 256,
        pooled_projection_dim: int = 384,
        out_channels: int = 8,
        pos_embed_max_size: int = 16,
        dual_attention_layers: tuple[int, ...] = (),
        qk_norm: str | None = None,
        max_frames: int = 17,
    ) -> None:
        super().__init__(
            sample_size=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            num_layers=num_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            caption_projection_dim=caption_projection_dim,
            pooled_projection_dim=pooled_projection_dim,
            out_channels=out_channels,
            pos_embed_max_size=pos_embed_max_size,
            dual_attention_layers=dual_attention_layers,
            qk_norm=qk_norm,
        )
        width = num_attention_heads * attention_head_dim
        waves = get_1d_sincos_pos_embed_from_grid(width, torch.arange(max_frames), output_type="pt")
        self.temporal_embed = nn.Parameter(TEMPORAL_SCALE * waves.float())

    @classmethod
    def from_pictures(cls, model: SD3Transformer2DModel, max_frames: int = 17) -> Self:
        """A film network that starts as the picture network ``model``, float32."""
        known = {name: value for name, value in dict(model.config).items() if not name.startswith("_")}
        film: Self = cls(**known, max_frames=max_frames)
        missing, unexpected = film.load_state_dict(model.state_dict(), strict=False)
        if unexpected or set(missing) != {"temporal_embed"}:
            raise ValueError(f"the picture network does not fit: {[*unexpected, *missing]}")
        return film

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        return_dict: bool = True,
        frame_numbers: Tensor | None = None,
    ) -> Any:
        """Velocity of shape (B, C, T, H, W).

        Args:
            hidden_states: (B, C, T, H, W) latents.
            timestep: (B,) float32, 1000 t.
            encoder_hidden_states: (B, L, D) text.
            pooled_projections: (B, P) pooled text.
            return_dict: whether to wrap the result as diffusers does.
            frame_numbers: (T,) or (B, T) which frames of a film these are, int64; the first T when None. Training
                shows some of them only.

        Raises:
            ValueError: more frames than ``max_frames``.
        """
        batch, channels, frames, height, width = hidden_states.shape
        if frames > self.config.max_frames:
            raise ValueError(f"{frames} frames are more than the {self.config.max_frames} this network knows")
        pictures = hidden_states.transpose(1, 2).reshape(batch * frames, channels, height, width)
        tokens = self.pos_embed(pictures)
        tokens = tokens.reshape(batch, frames, tokens.shape[1], tokens.shape[2])
        if frames > 1:
            rows = self.temporal_embed[:frames] if frame_numbers is None else self.temporal_embed[frame_numbers]
            tokens = tokens + rows.unsqueeze(-2).to(tokens.dtype)
        tokens = tokens.flatten(1, 2)
        condition = self.time_text_embed(timestep, pooled_projections)
        text = self.context_embedder(encoder_hidden_states)
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                text, tokens = self._gradient_checkpointing_func(block, tokens, text, condition)
            else:
                text, tokens = block(hidden_states=tokens, encoder_hidden_states=text, temb=condition)
        patches = self.proj_out(self.norm_out(tokens, condition))
        p = self.config.patch_size
        patches = patches.reshape(batch, frames, height // p, width // p, p, p, self.out_channels)
        output = patches.permute(0, 6, 1, 2, 4, 3, 5).reshape(batch, self.out_channels, frames, height, width)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)
