"""The warm start, ours and no method's: before distribution matching the student regresses the guided teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rmd.upsampling import upsample
from training.distill.methods.base import DistributionMatching
from training.distill.rollout import Prediction
from training.runtime.attention import scoring_attention
from training.runtime.randomness import Randomness


def warm_start_loss(
    method: DistributionMatching, predictions: Sequence[Prediction], teacher: nn.Module | None, random: Randomness
) -> Tensor:
    """Regression of the guided teacher on the student's own states.

    At a step of the matched side the teacher sees the student's very state, which is guidance distillation. Below
    it, the teacher sees the student's prediction lifted by U and noised to the step's time on the teacher's axis,
    so that the target is what the teacher makes of this sample at its own side. A first step has no signal to
    lift (the noise's share is all), so its target is the teacher's mean picture.
    """
    total: Tensor | None = None
    count = sum(len(p.steps) for p in predictions)
    for p in predictions:
        size = method.matched_size(p.size)
        conditioning = method.prompts.conditioning(p.rows)
        uncond = method.prompts.unconditional(len(p.rows)) if method.guidance_scale != 1.0 else None
        y = upsample(p.x0, method.backbone.latent_shape(size), method.cascade.x0_upsampling)
        if size == p.size:
            x, t = p.x_t, p.t
        else:
            teacher_times = [method.cascade.steps[int(i)].teacher_timestep / 1000 for i in p.steps]
            t = torch.tensor(teacher_times, dtype=torch.float64, device=y.device)
            x = method.backbone.schedule.add_noise(y.detach(), random.normal(y.shape), t)
        with torch.no_grad(), scoring_attention():
            target = method.backbone.guided_x0(
                x, t, conditioning, uncond, method.guidance_scale, size, denoiser=teacher
            )
        loss = (y - target).square().flatten(1).mean(1).sum() / count
        total = loss if total is None else total + loss
    if total is None:
        raise ValueError("no predictions to regress")
    return total
