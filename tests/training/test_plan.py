"""The memory plan: against what runs hold, and what it refuses; full sizes are in tests_slow/test_plans.py."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cli.main import app
from rmd.backbones.configs import published_config
from rmd.backbones.embedded import EmbeddedBackbone
from rmd.backbones.pixart import PixArtBackbone
from rmd.backbones.tiny import write_tiny_folder
from rmd.cascade import Cascade
from rmd.size import Size
from tests.training.distil_setup import TRANSFORMER, make_trainer
from training.distill import planning
from training.distill.batches import Batches
from training.distill.memory import LiveBytes
from training.distill.methods import METHODS
from training.distill.plan import GB, make_plan
from training.distill.planning import refuse_what_cannot_fit
from training.distill.prompts import PromptSet
from training.distill.roles import Networks
from training.distill.settings import DistillSettings
from training.distill.teacher import Teacher, training_cascade
from training.distill.trainer import Trainer
from training.runtime.attention import training_attention

CONFIGS = Path(__file__).parents[2] / "training" / "configs"


@lru_cache
def pixart() -> Teacher:
    """PixArt-alpha at full size on the meta device, without its text encoder, which takes longest to build."""
    backbone = PixArtBackbone.from_config(published_config("pixart", text=False), torch.bfloat16, "meta")
    return Teacher(Path("pixart"), backbone, backbone.teacher_steps, backbone.teacher_guidance, {}, None)


def measured(trainer: Trainer) -> int:
    """Bytes of tensors that an update holds at most, when the optimisers have their moments."""
    trainer.update()
    networks, updater = trainer.networks, trainer.updater
    kept: list[torch.Tensor] = [*updater.ema.weights.values()]
    for module in (networks.teacher, networks.student, networks.fake):
        kept += [*module.parameters(), *module.buffers()]
    for optimizer in (updater.student_optimizer, updater.fake_optimizer):
        kept += [*optimizer.masters, *optimizer.optimizer_state().values()]
    with LiveBytes(kept) as live:
        trainer.update()
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(storages.values()) + live.peak


def pixart_block() -> PixArtBackbone:
    """One block of PixArt-alpha at its real width."""
    config = published_config("pixart", text=False)
    config["transformer"]["num_layers"] = 1
    return PixArtBackbone.from_config({k: v for k, v in config.items() if k != "vae"}, torch.float32)


def real_shape_trainer(run: Path, settings: DistillSettings) -> tuple[Trainer, Cascade]:
    backbone = pixart_block()
    sizes = Size.square(128), Size.square(256)
    cascade = Cascade.from_thresholds("block", backbone.schedule, sizes, [1000, 750, 500, 250], (-2.5,))
    prompts = PromptSet(["a", "b"], backbone.random_conditioning(2), backbone.random_conditioning(1))
    method = METHODS["rmd"](backbone, cascade, settings, prompts, 3.5)
    return Trainer(method, Networks.build(backbone, settings), settings, run), cascade


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_tiny_run_holds_what_was_planned(tmp_path: Path, checkpointed: bool) -> None:
    options: dict[str, Any] = {
        "batch_size": 8, "micro_batch": 4, "rollout": "pipelined", "gradient_checkpointing": checkpointed,
    }  # fmt: skip
    trainer = make_trainer(tmp_path, **options)
    settings = trainer.settings
    backbone = EmbeddedBackbone.from_config({"transformer": TRANSFORMER, "scheduler": {}}, torch.float32, "meta")
    plan = make_plan(backbone, trainer.method.cascade, settings, guidance_scale=2.0, device="cpu")
    with training_attention("cpu", 16):
        found = measured(trainer)
    assert sum(plan.training.values()) == pytest.approx(found, rel=0.1)


def test_a_block_of_real_width_holds_what_was_planned(tmp_path: Path) -> None:
    settings = DistillSettings(
        batch_size=4,
        micro_batch=2,
        rollout="fresh",
        iterations=2,
        precision="fp32",
        low_stage_iterations=0,
        interval="step",
    )
    trainer, cascade = real_shape_trainer(tmp_path, settings)
    trainer.method.active_steps = lambda _iteration: [3]  # type: ignore[method-assign]
    config = published_config("pixart", text=False)
    config["transformer"]["num_layers"] = 1
    planned = PixArtBackbone.from_config({k: v for k, v in config.items() if k != "vae"}, torch.float32, "meta")
    plan = make_plan(planned, cascade, settings, guidance_scale=3.5, device="cpu")
    assert sum(plan.training.values()) == pytest.approx(measured(trainer), rel=0.1)


def test_what_cannot_fit_is_refused_with_the_flags_that_would(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = pixart()
    peaks = {True: 4 * GB, False: 20 * GB}

    def planned(settings: DistillSettings) -> int:
        size = Batches.of(settings, 1).size
        return int(peaks[settings.gradient_checkpointing] * size)

    monkeypatch.setattr("training.distill.plan.passes_peak", lambda *_args, **_options: planned(current[0]))
    monkeypatch.setattr("training.distill.plan.forward_flop", lambda *_args: 1)
    current: list[DistillSettings] = []
    plans: list[DistillSettings] = []
    make = planning.make_plan

    def made(backbone: Any, cascade: Any, settings: DistillSettings, **options: Any) -> Any:
        current[:] = [settings]
        plans.append(settings)
        return make(backbone, cascade, settings, **options)

    monkeypatch.setattr(planning, "make_plan", made)
    settings = DistillSettings(batch_size=4)
    _, refusal = refuse_what_cannot_fit(teacher, settings, 40 * GB)
    assert "it fits with --set gradient_checkpointing=true" in refusal and "micro_batch" not in refusal
    _, refusal = refuse_what_cannot_fit(teacher, settings, 24 * GB)
    assert "--set gradient_checkpointing=true --set micro_batch=1" in refusal
    plans.clear()
    _, refusal = refuse_what_cannot_fit(teacher, settings, 8 * GB)
    assert len(plans) <= 3, "its own, one of all cures, one as a LoRA: a plan of a large network takes long"
    assert "no setting brings it under" in refusal or "as a LoRA" in refusal
    assert refuse_what_cannot_fit(teacher, settings, 200 * GB)[1] == ""


def test_a_configuration_of_another_backbone_is_refused(tmp_path: Path) -> None:
    settings = DistillSettings.read(CONFIGS / "sdxl" / "rmd.yaml")
    with pytest.raises(ValueError, match="made for the backbone sdxl, and pixart is pixart: give another --config"):
        training_cascade(pixart(), settings)


def test_the_dry_run_plans_a_folder(tmp_path: Path) -> None:
    folder = write_tiny_folder("sd3", tmp_path / "teacher")
    base = ["distill", "--dry-run", "--teacher", str(folder), "--gpu-memory", "80"]
    result = CliRunner().invoke(app, base)
    assert result.exit_code == 0, result.output
    for part in ("schedule 2+2", "parameters: denoiser", "training: ", "activations", "updates an hour", "estimate"):
        assert part in result.output
    small = CliRunner().invoke(app, [*base[:-1], "0.001"])
    assert isinstance(small.exception, ValueError) and "GB of each GPU" in str(small.exception)
    neither = CliRunner().invoke(app, ["distill", "--dry-run"])
    assert isinstance(neither.exception, ValueError) and "--backbone" in str(neither.exception)
