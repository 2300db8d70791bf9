"""What cutting a student down to a LoRA does to its pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rmd.checkpoint import CheckpointFolder
from rmd.pipeline import CascadeOutput, CascadePipeline
from rmd.published.exporting import Denoiser, ExportedLora
from rmd.published.files import WeightFiles


@torch.no_grad()
def picture_error(
    checkpoint: CheckpointFolder, lora: ExportedLora, prompts: Sequence[str], device: torch.device | str = "cpu"
) -> float:
    """How far pictures by base and LoRA are from the checkpoint's own: the root of mean squares, of pixels in [0, 1].

    Both in float32, by the default schedule, from seeds 0, 1, ...
    """
    assert lora.base is not None
    pipe = CascadePipeline.from_pretrained(checkpoint.path, torch_dtype=torch.float32, device=str(device))
    own = _draw(pipe, prompts)
    component = Denoiser.of(checkpoint.backbone_name, checkpoint.path).component
    base = WeightFiles.open(lora.base.folder.path / component)
    network = getattr(pipe.backbone.component_modules()["denoiser"], component)
    for name, parameter in network.named_parameters():
        factors = lora.modules.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        parameter.copy_(base[name] if factors is None else base[name].float() + factors.change())
    return float((own - _draw(pipe, prompts)).square().mean().sqrt())


def _draw(pipe: CascadePipeline, prompts: Sequence[str]) -> Tensor:
    output = pipe(prompts, seed=0, output_type="pt")
    assert isinstance(output, CascadeOutput)
    pixels: Tensor = output.images if output.frames is None else output.frames
    return pixels
