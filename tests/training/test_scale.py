"""Micro-batches, the optimiser, prompts on the disk, prompt files, trackers: what a large run stands on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from typer.testing import CliRunner

from cli.main import app
from rmd.backbones.registry import get_backbone
from rmd.backbones.tiny import write_tiny_folder
from tests.training.distil_setup import make_trainer
from training.distill import prompt_cache
from training.distill.optimizer import AveragedWeights, MasterAdamW
from training.distill.prompt_cache import PromptCache
from training.distill.prompt_files import read_prompt_file
from training.distill.prompts import encode_prompts, release_text_encoders
from training.distill.settings import DistillSettings
from training.distill.trainer import Trainer
from training.distill.update import averaged_student
from training.runtime.processes import processes, start_tracker


def stepped_by(trainer: Trainer, role: str) -> dict[str, torch.Tensor]:
    """The gradient of one update's (first) step of a role."""
    optimizer = trainer.student_optimizer if role == "student" else trainer.fake_optimizer
    found: dict[str, torch.Tensor] = {}
    step = optimizer.step

    def watched(rate: float, reduce: Any = None) -> float:
        grads = {n: m.grad for n, m in zip(optimizer.names, optimizer.masters, strict=True) if m.grad is not None}
        if not found:
            found.update({name: grad.clone() for name, grad in grads.items()})
        return step(rate, reduce)

    optimizer.step = watched  # type: ignore[method-assign]
    trainer.update()
    return found


@pytest.mark.parametrize("options", [{}, {"method": "dmd2", "gan_weight": 0.5}, {"shared_score_sample": True}])
def test_micro_batches_add_up_to_the_mean_of_their_gradients(tmp_path: Path, options: dict[str, Any]) -> None:
    """Each micro-batch alone, as one of a larger run's processes draws it; the critic's start from nothing."""
    for role in ("student", "fake"):
        total = stepped_by(make_trainer(tmp_path, batch_size=4, micro_batch=2, **options), role)
        parts = []
        for number in (0, 1):
            alone = make_trainer(tmp_path, batch_size=2, **options)
            begin = alone.updater.random.at
            alone.updater.random.at = lambda u, p, m, n=number, b=begin: b(u, p, m + n)  # type: ignore[method-assign, assignment]
            parts.append(stepped_by(alone, role))
        for name, value in total.items():
            torch.testing.assert_close(value, (parts[0][name] + parts[1][name]) / 2, rtol=1e-4, atol=1e-6)


def test_bfloat16_gradients_add_up_in_float32() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    optimizer = MasterAdamW({"w": weight}, 1e-3)
    for value in (1.0, 2.0**-9):  # their sum is no bfloat16
        (weight * value).sum().backward()
        assert weight.grad is None
    (grad,) = [master.grad for master in optimizer.masters]
    assert grad is not None and grad.tolist() == [1 + 2.0**-9] * 2


def test_adamw_without_momentum_is_adamw_at_beta1_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 5, generator=generator)
    own, reference = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizer = MasterAdamW({"w": own}, 1e-2, (0.0, 0.95), weight_decay=0.1, clip_norm=1e9)
    adamw = torch.optim.AdamW([reference], lr=1e-2, betas=(0.0, 0.95), weight_decay=0.1)
    for _ in range(5):
        grad = torch.randn(3, 5, generator=generator)
        own.grad, reference.grad = grad.clone(), grad.clone()
        optimizer.step(1e-2)
        adamw.step()
    torch.testing.assert_close(own, reference, rtol=1e-6, atol=1e-7)
    assert set(optimizer.optimizer_state()) == {"w.step", "w.exp_avg_sq"}


def test_an_8_bit_second_moment_without_torchao_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim.subclass_8bit", None)
    with pytest.raises(ValueError, match="second_moment=8bit needs torchao"):
        MasterAdamW({"w": torch.nn.Parameter(torch.zeros(2))}, 1e-3, second_moment="8bit")
    with pytest.raises(ValueError, match=r"second_moment=8bit is for betas\[0\] = 0"):
        DistillSettings(second_moment="8bit", betas=(0.9, 0.95))


def test_an_8_bit_second_moment_follows_the_float32_one() -> None:
    pytest.importorskip("torchao")
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.zeros(64, 128)) for _ in range(2)]
    kinds: list[Any] = ["float32", "8bit"]
    optimizers = [MasterAdamW({"w": w}, 1e-2, second_moment=k) for w, k in zip(weights, kinds, strict=True)]
    for _ in range(4):
        grad = torch.randn(64, 128, generator=generator)
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = grad.clone()
            optimizer.step(1e-2)
    assert float((weights[0] - weights[1]).norm() / weights[0].norm()) < 0.1
    state = optimizers[1].optimizer_state()
    assert state["w.exp_avg_sq.codes"].dtype == torch.uint8
    again = MasterAdamW({"w": torch.nn.Parameter(torch.zeros(64, 128))}, 1e-2, second_moment="8bit")
    again.load_optimizer_state(state)
    assert all(torch.equal(value, state[name]) for name, value in again.optimizer_state().items())


def test_the_average_may_lie_elsewhere_and_the_student_carries_it_for_a_while(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, iterations=2, ema_on_cpu=True)
    trainer.train()
    own = {name: value.clone() for name, value in trainer.student_optimizer.master_state().items()}
    with averaged_student(trainer.updater) as student:
        for name, value in student.named_parameters():
            assert torch.equal(value, trainer.ema.weights[name])
    assert all(torch.equal(value, own[name]) for name, value in trainer.student_optimizer.master_state().items())
    meta = AveragedWeights({"w": torch.ones(2)}, 0.9, "meta")
    assert meta.weights["w"].is_meta


def test_offloaded_activations_change_no_gradient(tmp_path: Path) -> None:
    plain, offloaded = (
        stepped_by(make_trainer(tmp_path, offload_activations=asked), "student") for asked in (False, True)
    )
    assert all(torch.equal(value, offloaded[name]) for name, value in plain.items())


# ---- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wan-1.3b", "pixart", "sdxl"])
def test_prompts_come_back_from_shards_as_they_were_encoded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_cache, "SHARD_ROWS", 2)
    backbone = get_backbone(name).load(write_tiny_folder(name, tmp_path / "folder"), dtype=torch.float32)
    texts = ["a dog", "a much longer prompt about a dog", "x", "a cat", "the last"]
    for rank in (1, 0):
        PromptCache(tmp_path / "cache", backbone).encode(texts, rank=rank, processes=2)
    files = sorted((tmp_path / "cache").glob("*/*.safetensors"))
    assert len(files) == 4  # three shards, and the empty prompt
    prompts = encode_prompts(backbone, texts, tmp_path / "cache")
    assert sorted((tmp_path / "cache").glob("*/*.safetensors")) == files
    rows = torch.tensor([4, 1, 0])
    expected = backbone.encode_prompts([texts[int(row)] for row in rows])
    found = prompts.conditioning(rows)
    assert found.keys() == expected.keys()
    mask = expected.get("encoder_attention_mask")
    for key, value in expected.items():
        if value.ndim == 3 and mask is not None:  # behind the mask nothing is seen, and nothing is stored
            value = value * mask[..., None]
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
    if name != "sdxl":
        stored = sum(file.stat().st_size for file in files)
        whole = sum(value.numel() * value.element_size() for value in expected.values()) / 3 * 6
        assert stored < 0.5 * whole
    release_text_encoders(backbone)
    held = [m for key, m in backbone.component_modules().items() if key.startswith("text_encoder")]
    assert all(parameter.is_meta for module in held for parameter in module.parameters())


def test_another_text_length_is_another_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = get_backbone("wan-1.3b").load(write_tiny_folder("wan-1.3b", tmp_path / "folder"), dtype=torch.float32)
    before = prompt_cache.text_key(backbone)
    assert prompt_cache.text_key(backbone) == before
    monkeypatch.setattr(type(backbone), "tokenizers", {"tokenizer": 256})
    assert prompt_cache.text_key(backbone) != before


def test_prompts_are_read_from_text_json_lines_and_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "p.txt").write_text("# a comment\na dog\n\n a cat \n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a dog", "id": 1}\n"a cat"\n\n')
    parquet.write_table(pyarrow.table({"prompt": ["a dog", None, "a cat"], "id": [1, 2, 3]}), tmp_path / "p.parquet")
    for suffix in ("txt", "jsonl", "parquet"):
        assert read_prompt_file(tmp_path / f"p.{suffix}") == ["a dog", "a cat"], suffix
    with pytest.raises(ValueError, match=r"no column 'text', but prompt, id; .* --prompt-column"):
        read_prompt_file(tmp_path / "p.parquet", "text")
    with pytest.raises(ValueError, match="column 'id' holds int64, no text"):
        read_prompt_file(tmp_path / "p.parquet", "id")
    (tmp_path / "broken.parquet").write_text("a dog")
    with pytest.raises(ValueError, match=r"broken\.parquet is no parquet file"):
        read_prompt_file(tmp_path / "broken.parquet")


def test_a_byte_order_mark_and_other_line_ends_are_no_part_of_the_prompts(tmp_path: Path) -> None:
    """As spreadsheets write files, and captions from the web hold them: U+2028 is plain text in JSON."""
    (tmp_path / "p.txt").write_bytes("\ufeff# a comment\r\na dog\r\na\u2028cat\r\n".encode())
    assert read_prompt_file(tmp_path / "p.txt") == ["a dog", "a\u2028cat"]
    (tmp_path / "p.jsonl").write_bytes('\ufeff{"prompt": "a\u2028dog"}\r\n"a\x85cat"\r\n'.encode())
    assert read_prompt_file(tmp_path / "p.jsonl") == ["a\u2028dog", "a\x85cat"]


def test_prompt_files_that_cannot_be_read_name_the_line_and_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a dog"}\n{"caption": "a cat"}\n')
    with pytest.raises(ValueError, match=r"p\.jsonl, line 2: no text under 'prompt'; .* --prompt-column"):
        read_prompt_file(file)
    file.write_text("a dog\n")
    with pytest.raises(ValueError, match="line 1: no JSON"):
        read_prompt_file(file)
    latin = tmp_path / "p.txt"
    latin.write_bytes("ein Gr\xfc\xdf".encode("latin-1"))
    with pytest.raises(ValueError, match="is not a UTF-8 text file"):
        read_prompt_file(latin)
    with pytest.raises(FileNotFoundError, match="is no file; --prompts takes"):
        read_prompt_file(tmp_path)
    (tmp_path / "p.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="parquet needs pyarrow"):
        read_prompt_file(tmp_path / "p.parquet")


# ---- trackers, validation --------------------------------------------------------------------------------------------


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ValueError, match="tracker=wandb needs the package wandb"):
        processes("cpu", "wandb")


def test_tensorboard_gets_settings_and_metrics(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    start_tracker(accelerator, tmp_path / "run", DistillSettings().to_record())
    accelerator.log({"generator_loss": 0.5}, step=3)
    accelerator.end_training()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*") if path.parent.name == "run"}
    events = EventAccumulator(str(folder)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("generator_loss")] == [(3, 0.5)]


def test_the_command_takes_json_lines_and_draws_sheets_of_validation_prompts(tmp_path: Path) -> None:
    teacher = write_tiny_folder("sd3", tmp_path / "teacher")
    (tmp_path / "p.jsonl").write_text('{"text": "a dog"}\n{"text": "a cat"}\n')
    (tmp_path / "v.txt").write_text("a fox\na bird\n")
    options = ["--teacher", str(teacher), "--out", str(tmp_path / "out"), "--run", str(tmp_path / "runs" / "one")]
    flags = ["--prompts", str(tmp_path / "p.jsonl"), "--prompt-column", "text", "--iterations", "1", "--device", "cpu"]
    values = {"batch_size": 2, "micro_batch": 1, "sheet_every": 1, "validation_prompts": tmp_path / "v.txt"}
    settings = [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
    result = CliRunner().invoke(app, ["distill", *options, *flags, *settings])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "runs" / "one" / "sheets" / "000001.png").is_file()
    assert (tmp_path / "out" / "cascade.json").is_file()
    assert list((tmp_path / "runs" / ".prompts").glob("*/*.safetensors")), "the cache is the runs', not the run's"
