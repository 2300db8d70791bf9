"""The public full-size configurations on the meta device: parameter counts and sequence lengths."""

from __future__ import annotations

import pytest
import torch

from rmd.backbones.configs import CONFIGURED, published_config
from rmd.backbones.registry import get_backbone

# Parameters of the denoiser, exactly; published as 2.57 B, 0.61 B, 2.2 B (without the position table), 1.3 B, 14 B.
EXPECTED = {
    "embedded": (18_624_032, (64, 256)),
    "embedded-video": (18_628_384, (324, 729)),
    "sdxl": (2_567_463_684, (1024, 4096)),
    "pixart": (611_349_152, (1024, 4096)),
    "sd3": (2_243_171_520, (1024, 4096)),
    "wan-1.3b": (1_418_996_800, (14_700, 32_760)),
    "wan-14b": (14_288_491_584, (32_760, 75_600)),
}
DECODER = {
    "embedded": 3_737_560,
    "embedded-video": 3_737_560,
    "sdxl": 83_653_863,
    "pixart": 83_653_863,
    "sd3": 83_819_683,
    "wan-1.3b": 126_892_531,
    "wan-14b": 126_892_531,
}


@pytest.mark.parametrize("name", CONFIGURED)
def test_parameters_and_tokens(name: str) -> None:
    backbone = get_backbone(name).from_config(published_config(name, text=False), torch.bfloat16, "meta")
    parameters, tokens = EXPECTED[name]
    assert backbone.denoiser_parameters() == parameters
    assert sum(p.numel() for p in backbone.component_modules()["decoder"].parameters()) == DECODER[name]
    assert backbone.tokens_per_stage(backbone.default_cascade()) == tokens
    assert {p.device.type for m in backbone.component_modules().values() for p in m.parameters()} == {"meta"}


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_text_encoders_fit_the_denoiser(name: str) -> None:
    """The encoders' widths are what the denoiser's configuration expects."""
    config = published_config(name)
    widths = get_backbone(name).from_config(published_config(name, text=False), torch.bfloat16, "meta").text_widths()
    clips = [config[part]["hidden_size"] for part in ("text_encoder", "text_encoder_2")]
    if name == "sdxl":
        assert widths == {"encoder_hidden_states": (77, sum(clips)), "text_embeds": (clips[1],)}
    else:
        assert widths == {
            "encoder_hidden_states": (333, config["text_encoder_3"]["d_model"]),
            "pooled_projections": (2048,),
        }
        assert sum(clips) == 2048


def test_unknown_configuration() -> None:
    with pytest.raises(ValueError, match="no published configuration for 'flux'; there are embedded, embedded-video"):
        published_config("flux")
