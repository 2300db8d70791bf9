"""The public reference implementation's numbers, from independent float64 arithmetic over its published rules."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from cli.main import app
from rmd.backbones.tiny import write_tiny_folder
from rmd.cascade import Cascade
from rmd.checkpoint import CheckpointFolder
from rmd.noise_schedule import RectifiedFlow
from rmd.presets import preset
from rmd.sampler import advance
from rmd.size import Size
from tests.training.distil_setup import FULL, LOW, prompt_set, settings_for, tiny_backbone
from training.distill import losses
from training.distill.intervals import draw_times, faded_intensity, step_ends, tau_intervals, trajectory_entries
from training.distill.methods import RMD
from training.distill.methods.base import Matched
from training.distill.settings import DistillSettings
from training.runtime.randomness import Randomness

RECIPES = ("paper", "reference", "ours")
CONFIGS = Path(__file__).parents[2] / "training" / "configs"
FLOW = RectifiedFlow()
LOW_SHAPE, HIGH_SHAPE = (2, 2, 4, 6), (2, 2, 6, 9)


def numbers() -> Iterator[np.ndarray]:
    """The oracle's random numbers in its order: six noises, three loss tensors, what is noised on and the noise."""
    generator = np.random.default_rng(7)
    for shape in [LOW_SHAPE] * 3 + [HIGH_SHAPE] * 3 + [(2, 2, 2, 3, 4)] * 3 + [(5,)] * 2:
        yield generator.standard_normal(shape)


def velocity(x: Tensor, t: float) -> Tensor:
    return 0.3 * x + 0.1 * np.sin(10 * t) + 0.05 * x.mean()


@pytest.mark.parametrize(
    ("name", "times"),
    [
        ("rmd-wan", [1000, 937.7811, 857.8767, 751.4970, 602.8708, 380.5970]),
        ("rmd-wan-shift5", [1000, 937.7811, 857.8767, 834.4415, 716.7235, 505.9524]),
    ],
)
def test_the_time_tables(name: str, times: list[float]) -> None:
    cascade = preset(name)
    assert [step.timestep for step in cascade.steps] == pytest.approx(times, abs=1e-4)
    assert [step.size.height for step in cascade.steps] == [480] * 3 + [720] * 3
    # The low side's times are below the paper's 974 and 937: the map's other direction.
    assert all(a.timestep < b.timestep for a, b in zip(cascade.steps[1:3], preset("wan").steps[1:3], strict=True))


@pytest.mark.parametrize(
    ("name", "intensity", "final", "mean"),
    [
        ("rmd-wan", 0.9, [-0.2134491, -0.3137241, -1.4471176], -0.08758241),
        ("rmd-wan", 0.5, [-0.0443060, -0.3253873, -1.4958751], -0.05467530),
        ("rmd-wan-shift5", 0.9, [-0.2142309, -0.3416200, -1.6074185], -0.07097595),
        ("rmd-wan-shift5", 0.5, [-0.0634499, -0.3466422, -1.6393265], -0.04159564),
    ],
)
def test_trajectories_of_a_toy_velocity(name: str, intensity: float, final: list[float], mean: float) -> None:
    """Mixed noise within stages and fresh noise where the size changes: in sampling at .9, in roll-outs at .5."""
    cascade = preset(name)
    training = intensity == 0.5
    if training:
        cascade = replace(cascade, training_noise_intensity=0.0, training_step_noise_intensity=intensity)
    noises = [torch.from_numpy(value)[None] for value, _ in zip(numbers(), range(6), strict=False)]
    x = noises[0]
    for index, step in enumerate(cascade.steps):
        x0 = FLOW.x0_from_v(x, velocity(x, step.t), step.t)
        noise = noises[min(index + 1, 5)]
        shapes = {480: LOW_SHAPE, 720: HIGH_SHAPE}
        x = advance(cascade, index, x, x0, FLOW, lambda s: shapes[s.height], noise, training=training)  # noqa: B023
    assert x.flatten()[:3].tolist() == pytest.approx(final, abs=1e-6)
    assert float(x.mean()) == pytest.approx(mean, abs=1e-7)


def test_the_bounds_of_tau() -> None:
    cascade = preset("rmd-wan")
    expected = [(834, 870, 980), (667, 745, 980), (500, 620, 980), (334, 367, 665), (167, 216, 665), (0, 66, 665)]
    assert trajectory_entries(cascade, (0.25, 0.1)) == expected
    wider = [(834, 907, 980), (667, 823, 980), (500, 740, 980), (334, 449, 665), (167, 341, 665), (0, 232, 665)]
    assert trajectory_entries(cascade, (0.5, 0.35)) == wider
    intervals = tau_intervals(cascade, "trajectory", (0.25, 0.1))
    assert intervals[0].tolist() == pytest.approx([3 * 0.871 / 2.742, 3 * 0.981 / 2.962])
    # Drawn evenly over the table's entries, not over time.
    low, high = intervals[:1].unbind(1)
    middle = draw_times(low, high, torch.tensor([0.5], dtype=torch.float64), 3.0)
    assert float(middle) == pytest.approx(3 * 0.926 / (1 + 2 * 0.926))
    assert step_ends(cascade)[[0, 5]].tolist() == pytest.approx([3 * 0.835 / 2.67, 0.00299401198])
    with pytest.raises(ValueError, match="uniform before the flow shift; the one at 947"):
        shifted = Cascade.from_steps("odd", [1000, 947, 750, 500], [LOW, LOW, FULL, FULL], flow_shift=3.0)
        trajectory_entries(shifted)
    with pytest.raises(ValueError, match="interval_offsets has 3 values"):
        trajectory_entries(cascade, (0.1, 0.1, 0.1))


def test_noise_added_on_the_way_up() -> None:
    """From entry 500 to entry 800 under shift 3."""
    *_, x, z = (torch.from_numpy(value)[None] for value in numbers())
    mid, tau = (torch.tensor([3 * u / (1 + 2 * u)], dtype=torch.float64) for u in (0.501, 0.801))
    a = faded_intensity(FLOW, torch.ones(1, dtype=torch.float64), mid, tau)
    # x is alpha y + sigma eps for any y and eps that give it: here y = x / alpha and eps = 0.
    result = FLOW.add_noise(x / (1 - mid), (1 - a.square()).sqrt() * z, tau)
    expected = [0.4550911962, 0.9590750913, 0.9468678866, 0.8769349884, 0.9566210127]
    assert result[0].tolist() == pytest.approx(expected, abs=1e-9)


def test_the_scored_samples_noise_goes_through_the_steps_end_and_fades() -> None:
    """Against the two moves one after the other, with everything random but the predicted noise taken out."""
    settings = settings_for(
        interval="trajectory", score_noise="trajectory", score_noise_everywhere=True, score_noise_intensity=0.5
    )
    cascade = Cascade.from_steps("t", [1000, 750, 500, 250], [LOW, LOW, FULL, FULL], resolution_map="none")
    method = RMD(tiny_backbone(), cascade, settings, prompt_set(), 1.0)
    steps = torch.arange(4)
    y, eps = torch.zeros(4, 8, 8, 8), torch.ones(4, 8, 8, 8)

    class NoNoise(Randomness):
        def normal(self, shape: object) -> Tensor:
            return super().normal(shape) * 0  # type: ignore[arg-type]

    sample = method.score_sample(Matched(FULL, y, eps, steps, steps), NoNoise(1))
    ends = step_ends(cascade)
    expected = 0.5 * ends * (1 - sample.tau) / (1 - ends)  # a sigma_end, carried up by alpha_tau / alpha_end
    torch.testing.assert_close(sample.x[:, 0, 0, 0].double(), expected, atol=1e-6, rtol=1e-5)
    assert bool((sample.tau >= ends).all()) and float(sample.tau.max()) <= 0.981


def test_the_losses() -> None:
    generator, real, fake = (torch.from_numpy(v) for v, i in zip(numbers(), range(9), strict=False) if i >= 6)
    sigmas = torch.tensor([0.35, 0.9], dtype=torch.float64)
    score = losses.fake_score_loss(fake, generator, losses.uncapped_snr(FLOW, sigmas))
    assert float(score) == pytest.approx(3.2445765674712, rel=1e-6)  # theirs adds 1e-8 to tau
    d = losses.dmd_direction(generator, real, fake)
    student = losses.sized_huber(d) / losses.normaliser(generator, real, 0.2)
    # One factor a sample; theirs leaves the width out of the mean, and gives 1.0650258.
    assert float(student.mean()) == pytest.approx(1.0548978164881528, rel=1e-12)
    near = torch.full((1, 4), 0.01)
    assert float(losses.normaliser(near, torch.zeros(1, 4), 0.2)) == pytest.approx(0.2)


def test_the_recipe_is_what_its_file_says() -> None:
    settings = DistillSettings.read(CONFIGS / "wan" / "reference.yaml").for_backbone("wan")
    assert (settings.low_stage_iterations, settings.rollout, settings.draw) == (15, "stage", "stage")
    assert settings.negative_prompt is not None and settings.negative_prompt.startswith("Bright tones, overexposed")
    assert settings.export_weights == "student" and not settings.clip_fake


def test_the_recipe_from_the_command_to_a_checkpoint(tmp_path: Path) -> None:
    """On a tiny Wan, at its own sizes."""
    recipe = tmp_path / "reference.yaml"
    lines = (CONFIGS / "wan" / "reference.yaml").read_text().splitlines()
    recipe.write_text("\n".join(line for line in lines if not line.startswith("preset:")))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\na cat\n")
    teacher = write_tiny_folder("wan-1.3b", tmp_path / "teacher")
    command = ["distill", "--teacher", str(teacher), "--out", str(tmp_path / "out"), "--run", str(tmp_path / "run"),
               "--config", str(recipe), "--prompts", str(prompts), "--iterations", "1", "--batch-size", "2",
               "--device", "cpu", "--set", "sheet_every=0", "--set", "log_every=1"]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "wan-1.3b's own defaults: negative_prompt=Bright tones" in result.output
    checkpoint = CheckpointFolder.read(tmp_path / "out")
    assert checkpoint.distillation["settings"]["negative_prompt"].startswith("Bright tones")
    cascade = checkpoint.default_cascade
    assert (cascade.training_step_noise_intensity, cascade.training_noise_intensity) == (0.5, 0.0)
    (line,) = (json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    # The warm-up: the low stage alone.
    assert any(f"latent_change_step_{step}" in line for step in range(3)) and "gradient_step_3" not in line


@pytest.mark.parametrize("folder", ["sdxl", "pixart", "sd3", "wan", "embedded"])
def test_every_recipe_fits_its_backbones_cascade(folder: str) -> None:
    for file in (CONFIGS / folder / f"{recipe}.yaml" for recipe in RECIPES if (folder, recipe) != ("embedded", "ours")):
        settings = DistillSettings.read(file).for_backbone(folder)
        cascade = preset(settings.preset or folder, schedule=settings.schedule, resolution_map=settings.resolution_map)
        method = RMD(tiny_backbone(), small(cascade), settings, prompt_set(), 1.0)
        assert float(method.intervals[:, 1].max()) <= (0.9 if folder == "pixart" else 0.995), file


def small(cascade: Cascade) -> Cascade:
    """The cascade at sides that the tiny backbone has."""
    sides: dict[Size, Size] = dict(zip(cascade.sizes, (LOW, FULL), strict=True))
    steps = tuple(replace(step, size=sides[step.size]) for step in cascade.steps)
    return replace(cascade, steps=steps, full_size=FULL)
