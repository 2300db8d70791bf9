"""The loop: resumption to the bit, checkpoints that survive a kill, settings, signals, low precision, LoRA."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from rmd.backbones.registry import get_backbone
from rmd.backbones.tiny import write_tiny_folder
from rmd.machine import device_name
from rmd.size import Size
from tests.training.distil_setup import FULL, make_trainer, prompt_set, settings_for
from training.distill.drift import DriftWatch
from training.distill.figures import latent_figures
from training.distill.methods import METHODS
from training.distill.optimizer import AveragedWeights, MasterAdamW
from training.distill.roles import Networks, merged_network, network_of, with_weights
from training.distill.rollout import Prompts
from training.distill.settings import DistillSettings, changed_settings, parse_assignments
from training.distill.trainer import Hooks, Trainer, TrainingError
from training.runtime import checkpoints as checkpoint_files
from training.runtime.checkpoints import checkpoints, load_checkpoint, save_checkpoint
from training.runtime.randomness import Randomness

CONFIGS_FOLDER = Path(__file__).parents[2] / "training" / "configs"
CONFIGS = sorted(CONFIGS_FOLDER.rglob("*.yaml"))
VARIANTS: list[dict[str, Any]] = [
    {"low_stage_iterations": 1},
    {"rollout": "pipelined", "shared_score_sample": True, "fake_steps": 2, "rate_warmup": 3, "decay_share": 0.5,
     "warm_start_iterations": 2, "warm_start_fake_iterations": 1, "interval": "step"},
    {"rollout": "pipelined", "fake_warmup_iterations": 1, "rate_warmup": 2},
    {"method": "tdm"},
    {"method": "swd"},
    {"method": "dmd2", "gan_weight": 0.1, "fake_steps": 2},
]  # fmt: skip


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {
        **{f"student.{k}": v for k, v in trainer.student_optimizer.master_state().items()},
        **{f"fake.{k}": v for k, v in trainer.fake_optimizer.master_state().items()},
        **{f"ema.{k}": v for k, v in trainer.ema.weights.items()},
    }


@pytest.mark.parametrize("options", VARIANTS, ids=["fresh", "pipelined", "fake-warmup", "tdm", "swd", "dmd2-gan"])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = make_trainer(tmp_path / "whole", **options)
    initial = {name: value.clone() for name, value in weights_of(whole).items()}
    assert whole.train()
    first = make_trainer(tmp_path / "parts", **options)
    first.hooks = Hooks(on_update=lambda _share, _figures: first.stop() if first.progress.iteration == 2 else None)
    assert not first.train()
    second = make_trainer(tmp_path / "parts", **options)
    assert second.resume()
    assert second.progress.iteration == 2
    assert second.train()
    expected = weights_of(whole)
    for name, value in weights_of(second).items():
        assert torch.equal(value, expected[name]), name
    assert any(not torch.equal(initial[name], expected[name]) for name in expected if name.startswith("student."))
    lines = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4]
    assert all(line["generator_grad_norm"] > 0 for line in lines[options.get("fake_warmup_iterations", 0) :])


def test_the_fake_score_warms_up_while_the_student_rests(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", fake_warmup_iterations=2, rate_warmup=4)
    before = {name: value.clone() for name, value in weights_of(trainer).items()}
    for _ in range(2):
        assert "generator_loss" not in trainer.update()
    after = weights_of(trainer)
    assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith("fake."))
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("fake."))
    # The student's own rise begins with its first update.
    assert trainer.rate_factor(trainer.settings.fake_warmup_iterations) == 0.25
    assert trainer.rate_factor() == 0.75
    assert trainer.update()["generator_grad_norm"] > 0
    assert any(not torch.equal(before[name], value) for name, value in weights_of(trainer).items() if "student" in name)


def test_an_interrupted_save_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path / "run", iterations=1)
    trainer.train()
    before = checkpoints(tmp_path / "run" / "checkpoints")
    save = checkpoint_files.save_tensors

    def break_at_fake(tensors: Any, path: Path) -> None:
        if path.name == "fake.safetensors":
            raise OSError("No space left on device")
        save(tensors, path)

    monkeypatch.setattr(checkpoint_files, "save_tensors", break_at_fake)
    trainer.update()
    with pytest.raises(OSError, match="No space"):
        trainer.save()
    assert checkpoints(tmp_path / "run" / "checkpoints") == before
    resumed = make_trainer(tmp_path / "run", iterations=1)
    assert resumed.resume() and resumed.progress.iteration == 1
    monkeypatch.undo()
    trainer.save()
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000001", "step-00000002"]


def test_a_sheet_that_fails_costs_nothing_and_each_state_is_saved_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(_trainer: Trainer) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    saved: list[int] = []
    trainer = make_trainer(tmp_path / "run", Hooks(on_sheet=out_of_memory), save_every=2, sheet_every=2)
    save = trainer.save
    monkeypatch.setattr(trainer, "save", lambda: (saved.append(trainer.progress.iteration), save()))
    with pytest.warns(UserWarning, match=r"no sheet at update [24]: CUDA out of memory"):
        assert trainer.train()
    assert saved == [2, 4]
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000002", "step-00000004"]


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    (tmp_path / ".step-00000003-partial").mkdir()  # of a save that was killed
    for iteration in (5, 10, 15):
        save_checkpoint(tmp_path, iteration, {"ema": {"w": torch.ones(2)}}, {}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000015"]
    (tmp_path / "step-00000015" / "ema.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks ema\.safetensors"):
        load_checkpoint(tmp_path / "step-00000015")


def test_sigterm_saves_and_stops(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", iterations=50)
    trainer.hooks = Hooks(
        on_update=lambda _share, _figures: (
            os.kill(os.getpid(), signal.SIGTERM) if trainer.progress.iteration == 2 else None
        )
    )
    before = signal.getsignal(signal.SIGTERM)
    assert not trainer.train()
    assert signal.getsignal(signal.SIGTERM) == before
    assert checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step-00000002"


def test_resuming_refuses_other_settings_unless_they_may_change(tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", iterations=1).train()
    with pytest.raises(TrainingError, match="batch_size"):
        make_trainer(tmp_path / "run", batch_size=2).resume(change_settings=True)
    changed = make_trainer(tmp_path / "run", fake_rate=5e-4)
    with pytest.raises(TrainingError, match="--change-settings"):
        changed.resume()
    assert changed.resume(change_settings=True)
    assert make_trainer(tmp_path / "run", iterations=9).resume(), "a longer run needs no leave"


def test_resuming_takes_a_setting_that_did_not_exist_yet_at_its_default(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", iterations=1)
    older = {name: value for name, value in trainer.settings.to_record().items() if name != "weight_decay"}
    assert changed_settings(older, trainer.settings.to_record()) == []
    assert changed_settings(older, {**trainer.settings.to_record(), "weight_decay": 0.5}) == ["weight_decay"]


def test_resuming_and_exporting_refuse_other_weights_of_the_teacher(tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", iterations=1).train()
    other = make_trainer(tmp_path / "run", iterations=2)
    with torch.no_grad():
        next(other.networks.teacher.parameters()).flatten()[0] += 1e-1
    for to_export in (False, True):
        with pytest.raises(TrainingError, match="other weights of the teacher"):
            other.resume(to_export=to_export)


def test_resuming_refuses_other_prompts_but_an_export_needs_none(tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", iterations=2).train()
    metrics = tmp_path / "run" / "metrics.jsonl"
    later = json.dumps({"iteration": 3}) + "\n"
    metrics.write_text(metrics.read_text() + later)
    other = make_trainer(tmp_path / "run", iterations=2)
    other.method.prompts = prompt_set(4)
    with pytest.raises(TrainingError, match="other prompts"):
        other.resume()
    assert other.resume(to_export=True)
    assert metrics.read_text().endswith(later), "the run may be going on: its records are not the export's"


class CountingPrompts:
    """Prompts that note how many were drawn."""

    def __init__(self, prompts: Prompts, drawn: list[int]) -> None:
        self.prompts, self.drawn = prompts, drawn
        self.conditioning, self.unconditional = prompts.conditioning, prompts.unconditional

    def draw(self, random: Randomness, count: int) -> torch.Tensor:
        self.drawn.append(count)
        return self.prompts.draw(random, count)


def test_the_fake_score_may_go_first_on_samples_of_its_own_unclipped(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, fake_first=True, clip_fake=False, rollout="mixed")
    order: list[str] = []
    for optimizer, name in ((trainer.fake_optimizer, "fake"), (trainer.student_optimizer, "student")):
        optimizer.adamw.register_step_post_hook(lambda _optimizer, _args, _kwargs, name=name: order.append(name))
    drawn: list[int] = []
    (rollout,) = trainer.updater.rollouts
    rollout.prompts = CountingPrompts(rollout.prompts, drawn)
    trainer.update()
    assert order == ["fake", "student"] and drawn == [4, 4]
    assert math.isinf(trainer.fake_optimizer.clip_norm) and trainer.student_optimizer.clip_norm == 1.0


def test_memory_and_precision_may_change_on_resuming(tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", iterations=1, precision="bf16").train()
    later = make_trainer(tmp_path / "run", iterations=2, precision="fp32", gradient_checkpointing=True)
    assert later.resume() and later.train()


def test_a_run_whose_pictures_fall_apart_is_ended_and_may_go_on_all_the_same(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", iterations=100, batch_size=4)
    good = {"latent_mean_step_3": 0.1, "latent_spread_step_3": 1.0, "latent_roughness_step_3": 0.5}
    for _ in range(60):
        assert trainer.drift.observe(good) is None
    trainer.save()
    resumed = make_trainer(tmp_path / "run", iterations=100, batch_size=4)
    assert resumed.resume() and resumed.drift.state() == trainer.drift.state()
    resumed.drift.present["spread"] = 0.01
    with pytest.raises(TrainingError, match=r"turn to one colour: spread .*stop_on_drift=false"):
        resumed.train()
    going_on = make_trainer(tmp_path / "run", iterations=2, stop_on_drift=False)
    assert going_on.resume()
    going_on.drift.present["spread"] = 0.01
    assert going_on.train()


@pytest.mark.parametrize(
    ("figure", "value", "what"),
    [("roughness", 1.1, "noise"), ("spread", 0.1, "one colour"), ("spread", 5.0, "extremes"), ("mean", 2.5, "cast"),
     ("change", 0.01, "a still")],
)  # fmt: skip
def test_drift_has_names(figure: str, value: float, what: str) -> None:
    watch = DriftWatch(5)
    usual = {"mean": 0.2, "spread": 1.0, "roughness": 0.5, "change": 0.3}

    def observe(**figures: float) -> str | None:
        return watch.observe({f"latent_{name}_step_5": value for name, value in {**usual, **figures}.items()})

    assert watch.observe({"latent_spread_step_0": 100.0}) is None, "another step's"
    assert not any(observe() for _ in range(60))
    assert observe(**{figure: value}) is None, "one update is no drift"
    assert what in [observe(**{figure: value}) for _ in range(60)][-1]  # type: ignore[operator]


def test_an_update_records_latents_and_gradients_by_step(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", rollout="pipelined")
    figures = trainer.update()
    for step in range(4):
        assert figures[f"gradient_step_{step}"] > 0 and figures[f"latent_spread_step_{step}"] > 0
    assert any(name.startswith("direction_tau_") for name in figures)
    noise = torch.randn(2, 4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = {name: float(value) for name, value in latent_figures(noise).items()}
    assert found == pytest.approx({"mean": 0.0, "spread": 1.0, "roughness": 1.128, "change": 1.128}, abs=0.02)


def test_the_last_layer_of_a_noise_predictor_is_float32(tmp_path: Path) -> None:
    """Its output is no longer rounded to bfloat16, which sigma / alpha would multiply in x0."""
    folder = write_tiny_folder("pixart", tmp_path / "pixart")
    backbone = get_backbone("pixart").load(folder, dtype=torch.bfloat16)
    networks = Networks.build(backbone, settings_for())
    size = Size.square(32)
    latents, text = torch.randn(1, *backbone.latent_shape(size)), backbone.random_conditioning(1)
    for denoiser in (networks.teacher, networks.student, networks.fake):
        network = network_of(denoiser)[1]
        assert {p.dtype for p in network.proj_out.parameters()} == {torch.float32}
        assert {p.dtype for p in network.transformer_blocks.parameters()} == {torch.bfloat16}
        output = backbone.predict_output(latents, torch.tensor([0.98]), text, size, denoiser)
        assert not torch.equal(output, output.bfloat16().float())
    flow = get_backbone("sd3").load(write_tiny_folder("sd3", tmp_path / "sd3"), dtype=torch.bfloat16)
    assert network_of(Networks.build(flow, settings_for()).student)[1].proj_out.weight.dtype == torch.bfloat16


def test_a_merged_lora_is_rounded_once(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", lora_rank=2, precision="bf16", generator_rate=0.05, iterations=1)
    assert trainer.train()
    weights = trainer.student_optimizer.master_state()
    base = dict(network_of(trainer.networks.teacher)[1].named_parameters())
    student = with_weights(trainer.networks.student, weights)
    text = {"encoder_hidden_states": torch.randn(1, 24, 16), "pooled_projections": torch.randn(1, 16)}
    drawn = trainer.method.backbone.predict_x0(torch.randn(1, 8, 8, 8), torch.tensor([0.5]), text, FULL, student)
    assert bool(torch.isfinite(drawn).all()), "as for a sheet"
    merged = dict(merged_network(student).named_parameters())
    name = "transformer_blocks.0.attn.to_q.weight"
    (down,) = (value for key, value in weights.items() if "transformer_blocks.0.attn.to_q.lora_A" in key)
    (up,) = (value for key, value in weights.items() if "transformer_blocks.0.attn.to_q.lora_B" in key)
    expected = (base[name].float() + up.float() @ down.float()).bfloat16()
    assert torch.equal(merged[name], expected) and not torch.equal(expected, base[name])
    assert {value.dtype for value in merged.values()} == {torch.bfloat16}


def test_a_run_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="--minutes or --iterations"):
        make_trainer(tmp_path / "run", iterations=None).train()


def test_minutes_end_a_run_and_count_earlier_time(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", iterations=None, minutes=1.0)
    trainer.progress.seconds = 59.999
    assert trainer.train()
    assert trainer.progress.iteration == 1


def test_rates_rise_and_fall(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", iterations=100, rate_warmup=10, decay_share=0.2, final_rate=0.1)
    factors = {}
    for iteration in (0, 9, 50, 80, 90, 100):
        trainer.progress.iteration = iteration
        factors[iteration] = trainer.rate_factor()
    assert factors == pytest.approx({0: 0.1, 9: 1.0, 50: 1.0, 80: 1.0, 90: 0.55, 100: 0.1})


def test_updates_without_finite_gradients_are_skipped_and_then_end_the_run(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", iterations=100)
    with torch.no_grad():
        next(trainer.networks.fake.parameters()).fill_(float("nan"))
    before = {name: value.clone() for name, value in trainer.student_optimizer.master_state().items()}
    with pytest.raises(TrainingError, match="no finite gradient"):
        trainer.train()
    for name, value in trainer.student_optimizer.master_state().items():
        assert torch.equal(value, before[name])


def test_bfloat16_training_keeps_small_updates_in_float32_masters(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = MasterAdamW({"w": weight}, 1e-4)
    for _ in range(30):
        weight.grad = torch.full_like(weight, 0.1)
        optimizer.step(1e-4)
    assert optimizer.master_state()["w"].tolist() == pytest.approx([1 - 30e-4] * 4, rel=1e-4)
    assert weight.tolist() == pytest.approx([0.997] * 4, abs=2**-8)
    trainer = make_trainer(tmp_path / "run", precision="bf16", iterations=2, rollout="pipelined")
    assert trainer.train()
    assert {p.dtype for p in trainer.networks.student.parameters()} == {torch.bfloat16}
    assert {value.dtype for value in trainer.ema.weights.values()} == {torch.float32}


def test_gradients_are_clipped_and_their_norm_is_reported_before() -> None:
    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = MasterAdamW({"w": weight}, 1e-3, clip_norm=1.0)
    weight.grad = torch.full((4,), 10.0)
    assert optimizer.step(1e-3) == pytest.approx(20.0)
    state = optimizer.optimizer_state()
    assert state["w.exp_avg_sq"].tolist() == pytest.approx([0.05 * 0.25] * 4, rel=1e-4)


def test_the_average_follows_the_weights() -> None:
    average = AveragedWeights({"w": torch.zeros(1)}, 0.9)
    for _ in range(200):
        average.update({"w": torch.ones(1)})
    assert float(average.weights["w"]) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_lora_trains_its_adapters_alone_and_merges(tmp_path: Path, checkpointed: bool) -> None:
    options: dict[str, Any] = {
        "lora_rank": 2,
        "iterations": 2,
        "gradient_checkpointing": checkpointed,
        "generator_rate": 0.2,
    }
    trainer = make_trainer(tmp_path / "run", **options)
    assert all("lora_" in name for name in trainer.student_optimizer.names)
    networks = trainer.networks
    frozen = {w.data_ptr() for m in (networks.student, networks.fake) for w in m.parameters() if not w.requires_grad}
    assert frozen == {weight.data_ptr() for weight in networks.teacher.parameters()}, "three roles, one base"
    base = {name: value.clone() for name, value in networks.teacher.state_dict().items()}
    assert trainer.train()
    resumed = make_trainer(tmp_path / "run", **options)
    assert resumed.resume()
    student = with_weights(resumed.networks.student, resumed.student_optimizer.master_state())
    inputs = {
        "latents": torch.randn(1, 8, 8, 8), "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 24, 16), "pooled_projections": torch.randn(1, 16),
    }  # fmt: skip
    with torch.no_grad():
        adapted = student(**inputs)
        plain = trainer.networks.teacher(**inputs)
        name, _ = network_of(student)
        setattr(student, name, merged_network(student))
        merged = student(**inputs)
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(merged, plain)
    assert all(torch.equal(value, base[name]) for name, value in networks.teacher.state_dict().items())
    assert not any("lora" in key for key in network_of(student)[1].state_dict())


def test_settings_come_from_file_flags_and_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("method: tdm\nbatch_size: 8\nguidance_scale: 2\n")
    monkeypatch.setenv("RMD_DISTILL_SEED", "7")
    settings = DistillSettings.read(file, {"guidance_scale": 5.0, "iterations": None})
    assert (settings.method, settings.batch_size, settings.guidance_scale, settings.seed) == ("tdm", 8, 5.0, 7)
    assert settings.loss == "elementwise_huber" and settings.interval == "step"
    assert DistillSettings.read(None, {"method": "tdm", "loss": "squared"}).loss == "squared"
    assert DistillSettings(**settings.to_record()) == settings
    with pytest.raises(ValueError, match="'learning_rate'"):
        DistillSettings.read(None, {"learning_rate": 1})
    with pytest.raises(ValueError, match="warm_start_fake_iterations"):
        DistillSettings.read(None, {"warm_start_iterations": 10})
    with pytest.raises(ValueError, match="exclude each other"):
        DistillSettings.read(None, {"warm_start_iterations": 60, "fake_warmup_iterations": 10})
    for unheeded in (
        {"gan_weight": 0.1},
        {"method": "tdm", "mmd_weight": 1.0},
        {"method": "swd", "rollout": "pipelined"},
    ):
        with pytest.raises(ValueError, match="|".join(unheeded)):
            DistillSettings.read(None, unheeded)
    for contrary in (
        {"interval_offsets": [0.1]},
        {"score_noise": "trajectory"},
        {"fake_first": True, "rollout": "pipelined"},
    ):
        with pytest.raises(ValueError, match="|".join(contrary)):
            DistillSettings.read(None, contrary)
    broken = tmp_path / "broken.yaml"
    broken.write_text("betas: [0, 0.95")
    with pytest.raises(ValueError, match=r"broken\.yaml is not valid YAML"):
        DistillSettings.read(broken)
    broken.write_bytes("method: rmd # gr\xfc\xdfe".encode("latin-1"))
    with pytest.raises(ValueError, match=r"broken\.yaml is not valid YAML"):
        DistillSettings.read(broken)


def test_a_file_of_another_methods_is_refused_and_departures_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"embedded\.yaml was written for method rmd, and its .*fake_weighting.*of tdm"
    ):
        DistillSettings.read(CONFIGS_FOLDER / "embedded.yaml", {"method": "tdm"})
    own = tmp_path / "tdm.yaml"
    own.write_text("method: tdm\ninterval: stage\n")
    assert DistillSettings.read(own).departures() == ["interval=stage (tdm: step)"]
    assert DistillSettings.read(None, {"method": "tdm"}).departures() == []


def test_a_backbones_own_defaults_yield_to_whatever_was_said() -> None:
    wan = DistillSettings.read(None, {"low_stage_iterations": 7}).for_backbone("wan")
    assert (wan.batch_size, wan.low_stage_iterations) == (4, 7) and "walking backwards" in str(wan.negative_prompt)
    assert DistillSettings.read(None, {"method": "tdm"}).for_backbone("wan").low_stage_iterations == 0
    assert DistillSettings.read().for_backbone("pixart").max_tau == 0.9
    assert DistillSettings.read().for_backbone("sdxl") == DistillSettings.read()


def test_assignments_are_read_as_values() -> None:
    with pytest.raises(ValueError, match="not a YAML value"):
        parse_assignments(["betas=[0, 0.95"])
    with pytest.raises(ValueError, match="not a YAML value"):
        parse_assignments(["betas=[1e-3"])
    assert parse_assignments(["generator_rate=1e-4", "betas=[0, 0.95]", "normalise=true", "loss=squared"]) == {
        "generator_rate": 1e-4,
        "betas": [0, 0.95],
        "normalise": True,
        "loss": "squared",
    }
    with pytest.raises(ValueError, match="not name=value"):
        parse_assignments(["guidance_scale"])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_shipped_configurations_are_settings(config: Path) -> None:
    assert DistillSettings.read(config).method == (config.stem if config.stem in METHODS else "rmd")


def test_noise_is_restored_or_new_where_the_device_is_another() -> None:
    source = Randomness(7)
    source.normal((3,))
    state = source.state()
    following = source.normal((3,))
    again = Randomness(7)
    again.load_state({**state, "noise_cuda": torch.zeros(16, dtype=torch.uint8)}, iteration=5)
    assert torch.equal(again.normal((3,)), following)

    class OtherDevice(Randomness):
        """Noise from a generator of its own, as on a GPU."""

        def __init__(self, seed: int) -> None:
            super().__init__(seed)
            self.noise = torch.Generator().manual_seed(seed)
            self.device = torch.device("cpu")

    moved = OtherDevice(7)
    first = moved.normal((3,))
    moved.load_state(state, iteration=5)
    assert not torch.equal(moved.normal((3,)), first), "not the run's first noise again"
    kept = {**moved.state()}
    assert kept.keys() == {"generator", "noise_cpu"}
    expected = moved.normal((3,))
    fresh = OtherDevice(7)
    fresh.load_state(kept, iteration=9)
    assert torch.equal(fresh.normal((3,)), expected)


def test_the_devices_of_a_run_are_remembered(tmp_path: Path) -> None:
    first = make_trainer(tmp_path, iterations=1)
    first.progress.devices.append("NVIDIA X")
    first.train()
    second = make_trainer(tmp_path, iterations=1)
    assert second.resume()
    assert second.progress.devices == ["NVIDIA X", device_name()]


def test_packed_files_are_whole_again_and_never_mixed(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "scripts" / "gpu_train.sh"
    files = [tmp_path / "a" / "model.safetensors", tmp_path / "b" / "model.safetensors"]
    for size, file in zip((16 * 2**20, 5), files, strict=True):
        file.parent.mkdir()
        file.write_bytes(os.urandom(size))
    command = ["bash", str(script), "pack", *map(str, files), str(tmp_path / "out")]
    subprocess.run(command, check=True)
    for file in files:
        name = str(file).lstrip("/").replace("/", "-")
        parts = sorted((tmp_path / "out").glob(f"{name}.part-*"))
        assert b"".join(part.read_bytes() for part in parts) == file.read_bytes()
    assert max(part.stat().st_size for part in (tmp_path / "out").iterdir()) <= 15 * 2**20
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1
    assert "choose another folder" in again.stderr
