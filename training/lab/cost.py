"""What training and sampling cost, counted in forward passes of one picture at the teacher's side.

Counted rather than timed, so that runs on different or busy machines share one scale. A pass costs as its tokens, the
text's included; a backward pass twice a forward one.
"""

from __future__ import annotations

from itertools import accumulate

from rmd.backbones.embedded import EmbeddedBackbone
from rmd.cascade import Cascade
from rmd.size import Size
from training.distill.settings import DistillSettings
from training.lab.grid import Grid, Row

PIXELS_A_TOKEN = 16
TEXT_TOKENS = EmbeddedBackbone.tokenizers["tokenizer"]
PASSES_A_SECOND = 200
"""Two AMX cores with nothing beside them, batch 32: 64 to 128 px took 1.17 s an update of 7.3 such passes a sample. Two
cores with AVX-512's bfloat16 alone, an EPYC: 1.45 s an update of 9 with compiled blocks, 1.82 s without."""


def pass_cost(size: Size, full: Size) -> float:
    """One forward pass at ``size`` over one at ``full``."""
    tokens, most = (s.pixels // PIXELS_A_TOKEN**2 + TEXT_TOKENS for s in (size, full))
    return tokens / most


def sampling_cost(cascade: Cascade, full: Size) -> float:
    """One picture; guidance doubles it."""
    passes = 1 if cascade.guidance_scale == 1 else 2
    return passes * sum(pass_cost(step.size, full) for step in cascade.steps)


def update_cost(cascade: Cascade, settings: DistillSettings, full: Size) -> float:
    """One sample of one generator update with its fake-score updates.

    Roll-out, the student's step with gradient, guided teacher, fake score without gradient, then the fake score's own
    passes with gradient; further fake-score updates draw their own samples. DMD2's GAN and SwD's patch loss add theirs.
    """
    steps = [pass_cost(step.size, full) for step in cascade.steps]
    own_side = settings.method in ("swd", "naive")
    matched = [cost if own_side else 1.0 for cost in steps]
    if settings.method == "rmd" and settings.match_at is None:
        matched = [pass_cost(cascade.full_size, full)] * len(steps)
    rolled = settings.rollout != "pipelined" and settings.method != "swd"
    before = [0.0, *accumulate(steps)][: len(steps)] if rolled else [0.0] * len(steps)
    gan = 1.0 if settings.gan_weight else 0.0
    patch = 1.0 if settings.mmd_weight else 0.0
    stages = [step.stage for step in cascade.steps]
    total = 0.0
    for stage, prefix, own, side in zip(stages, before, steps, matched, strict=True):
        scores = (2 if settings.shared_score_sample else 3) + 3 * gan + 4 * patch
        critic = 3 + 6 * gan
        further = (settings.fake_steps - 1) * (prefix + own + critic * side)
        share = 1 / len(steps) if settings.draw == "step" else 1 / (len(set(stages)) * stages.count(stage))
        total += share * (prefix + 3 * own + (scores + critic) * side + further)
    return total


def row_cost(grid: Grid, row: Row) -> float:
    """One sample of one update of a row.

    Raises:
        ValueError: this version does not know one of its settings.
    """
    return update_cost(grid.cascade(row), grid.settings(row, 0), teacher_size(grid))


def teacher_size(grid: Grid) -> Size:
    """The teacher's side: the largest of the grid."""
    return max(Size.square(side) for schedule in grid.schedules.values() for side in schedule.sides)


def snapshots(grid: Grid, row: Row) -> dict[str, int]:
    """After how many generator updates a row is measured, by column: "updates" and "compute".

    At "compute" it has cost as many passes as the reference row at "updates".
    """
    share = row_cost(grid, grid.row(grid.reference)) / row_cost(grid, row)
    return {"updates": grid.updates, "compute": max(1, round(grid.updates * share))}


def training_passes(grid: Grid, row: Row) -> float:
    """All of a row's training with one seed, its common start left out."""
    if row.weights != "student":
        return 0.0
    batch = grid.settings(row, 0).batch_size
    return batch * max(snapshots(grid, row).values()) * row_cost(grid, row)
