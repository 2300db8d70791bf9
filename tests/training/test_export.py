"""From a teacher folder through the command to a checkpoint folder that reloads."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from cli.main import app
from rmd.backbones.registry import load_checkpoint
from rmd.backbones.tiny import write_tiny_folder
from rmd.checkpoint import CheckpointFolder
from rmd.presets import preset
from rmd.published.gathering import ImportRequest
from rmd.published.importing import import_model
from training.distill import export as export_module
from training.distill.export import ExportError, check_out, export_checkpoint, verify
from training.distill.prompt_files import read_prompt_file
from training.distill.prompts import encode_prompts
from training.distill.roles import merged_network
from training.distill.run import Distillation
from training.distill.settings import DistillSettings
from training.distill.teacher import Teacher, backbone_of, exported_cascades, training_cascade
from training.runtime.checkpoints import save_checkpoint
from training.runtime.files import load_tensors


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder("sd3", tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture(scope="module")
def distillation(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Distillation:
    settings = DistillSettings(
        iterations=1, batch_size=2, precision="fp32", low_stage_iterations=0, generator_rate=1e-2
    )
    teacher = replace(Teacher.open(teacher_folder, None, torch.float32), steps=2)
    run = tmp_path_factory.mktemp("runs")
    prompts = encode_prompts(teacher.backbone, ["a dog", "a cat", "a dog"], run / "prompts")
    built = Distillation.build(teacher, prompts, settings, run)
    assert built.trainer.train()
    return built


def test_an_index_that_does_not_tell_the_backbone_is_named(tmp_path: Path) -> None:
    index = tmp_path / "model_index.json"
    for content, why in (("{", "not valid JSON"), ("[]", "must hold an object"), ("{}", "does not tell the backbone")):
        index.write_text(content)
        with pytest.raises(ValueError, match=rf"model_index\.json.*{why}"):
            backbone_of(tmp_path)


def test_an_export_replaces_nothing_but_a_former_export(
    distillation: Distillation, teacher_folder: Path, tmp_path: Path
) -> None:
    teacher = Path(shutil.copytree(teacher_folder, tmp_path / "teacher"))
    (teacher / "cascade.json").write_text("{}")  # a public student, say
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    for out, why in (
        (teacher, "the teacher's own"),
        (tmp_path / "thesis", "would be lost"),
        (tmp_path / "file", "lost"),
    ):
        with pytest.raises(ValueError, match=why):
            check_out(out, teacher)
    with pytest.raises(ValueError, match="would be lost"):
        distillation.export(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    for _ in range(2):
        assert (distillation.export(tmp_path / "empty") / "cascade.json").is_file()


def test_an_export_is_a_checkpoint_folder_with_the_averaged_student(
    distillation: Distillation, teacher_folder: Path, tmp_path: Path
) -> None:
    out = distillation.export(tmp_path / "student")
    backbone, checkpoint = load_checkpoint(out, dtype=torch.bfloat16)
    assert checkpoint.default == "2+2" and set(checkpoint.cascades) == {"2+2", "1+3", "3+1", "0+4"}
    assert checkpoint.teacher is not None and checkpoint.teacher.steps == 2
    assert checkpoint.teacher_path is not None and checkpoint.teacher_path.resolve() == teacher_folder.resolve()
    assert checkpoint.distillation["settings"]["method"] == "rmd"
    own = dict(backbone.component_modules()["denoiser"].named_parameters())
    assert not checkpoint.cascades["2+2"].note and all(
        "not distilled" in checkpoint.cascades[name].note for name in ("1+3", "3+1", "0+4")
    )
    for name, value in distillation.trainer.ema.weights.items():
        assert torch.equal(own[name], value.to(torch.bfloat16)), name
    assert (out / "README.md").read_text().startswith("# student") and (out / "NOTICE").read_text()
    assert not list(tmp_path.glob(".student-*"))


def test_linked_components_stay_valid_and_an_older_folder_is_replaced(
    distillation: Distillation, teacher_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "student"
    old = out / "transformer" / "old.safetensors"
    old.parent.mkdir(parents=True)
    (out / "cascade.json").write_text("{}")
    old.write_text("old")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt too"):
        distillation.export(out, share="link")
    (out / "notes.txt").unlink()
    distillation.export(out, share="link")
    assert not old.exists()
    assert (out / "vae").is_symlink() and not (out / "vae").readlink().is_absolute()
    assert (out / "vae").resolve() == (teacher_folder / "vae").resolve()
    assert CheckpointFolder.read(out).default == "2+2"


def test_a_linked_export_over_its_teachers_components_copies_them_however_the_folder_is_named(
    distillation: Distillation, teacher_folder: Path, tmp_path: Path
) -> None:
    real = tmp_path / "disk"
    shutil.copytree(teacher_folder, real / "student")
    teacher = real / "teacher"
    teacher.mkdir()
    for part in (real / "student").iterdir():
        (teacher / part.name).symlink_to(Path("..") / "student" / part.name)
    (tmp_path / "models").symlink_to(real)
    linked = replace(distillation, teacher=replace(distillation.teacher, folder=teacher))
    for out in (tmp_path / "models" / "student", tmp_path / "models" / "teacher" / ".." / "student"):
        linked.export(out, share="link")
        assert not (real / "student" / "vae").is_symlink()
        checkpoint = CheckpointFolder.read(real / "student")
        assert checkpoint.teacher_path is not None and checkpoint.teacher_path.resolve() == teacher


def test_an_export_alone_draws_no_samples(teacher_folder: Path, tmp_path: Path) -> None:
    teacher = replace(Teacher.open(teacher_folder, None, torch.float32), steps=2)
    prompts = encode_prompts(teacher.backbone, ["a dog"], tmp_path / "prompts")
    for extra in ({"method": "swd"}, {"method": "dmd2", "gan_weight": 0.1}):
        settings = DistillSettings(iterations=1, batch_size=2, precision="fp32", real_samples=2, **extra)  # type: ignore[arg-type]
        run = tmp_path / str(extra["method"])
        assert Distillation.build(teacher, prompts, settings, run).trainer.train()
        drawn = sorted(run.glob("real-*"))
        assert len(drawn) == 1
        nothing = encode_prompts(teacher.backbone, [""], tmp_path / "prompts")
        alone = Distillation.build(teacher, nothing, settings, run, to_export=True)
        assert alone.trainer.resume(to_export=True)
        assert sorted(run.glob("real-*")) == drawn


def test_a_failed_check_leaves_the_older_folder(
    distillation: Distillation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = distillation.export(tmp_path / "student")
    before = (out / "cascade.json").read_bytes()

    def damage(path: Path) -> dict[str, torch.Tensor]:
        tensors = load_tensors(path)
        name = sorted(tensors)[0]
        return {**tensors, name: tensors[name] + 1}

    monkeypatch.setattr(export_module, "load_tensors", damage)
    with pytest.raises(ExportError, match="differs from the trained one"):
        distillation.export(out)
    assert (out / "cascade.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student"]


def test_the_mean_of_checkpoints_and_the_teacher_can_be_exported(distillation: Distillation, tmp_path: Path) -> None:
    average = distillation.trainer.ema.weights
    for iteration, factor in ((1, 0.5), (2, 1.5), (3, 2.5)):
        scaled = {name: factor * value for name, value in average.items()}
        save_checkpoint(tmp_path / "checkpoints", iteration, {"ema": scaled}, {}, keep=3)
    asked = distillation.settings.model_copy(update={"export_checkpoints": 2, "export_teacher_share": 0.25})
    student = dict(replace(distillation, settings=asked, run=tmp_path).exported_student().named_parameters())
    teacher = dict(distillation.teacher.backbone.component_modules()["denoiser"].named_parameters())
    for name, value in average.items():
        expected = 0.75 * 2 * value + 0.25 * teacher[name].float()
        torch.testing.assert_close(student[name].float(), expected, atol=1e-5, rtol=1e-4)
    more = distillation.settings.model_copy(update={"export_checkpoints": 4})
    with pytest.raises(ValueError, match=r"export_checkpoints=4: .* keeps 3"):
        replace(distillation, settings=more, run=tmp_path).exported_student()


def test_verification_sees_a_missing_weight(distillation: Distillation, tmp_path: Path) -> None:
    out = distillation.export(tmp_path / "student")
    expected = {
        name: value.to(torch.bfloat16) for name, value in merged_network(distillation.student()).state_dict().items()
    }
    spec = export_module.Export("sd3", "transformer", distillation.teacher.folder, {}, "2+2", 2, 4.5)
    verify(out, spec, expected, torch.bfloat16)
    with pytest.raises(ExportError, match="other weights"):
        verify(out, spec, {**expected, "further": torch.zeros(1)}, torch.bfloat16)


def test_a_teacher_that_links_into_the_replaced_folder_gives_real_copies(
    distillation: Distillation, tmp_path: Path
) -> None:
    student = distillation.export(tmp_path / "student")
    teacher = tmp_path / "student-teacher"
    teacher.mkdir()
    for path in student.iterdir():
        (teacher / path.name).symlink_to(os.path.relpath(path, teacher), target_is_directory=path.is_dir())
    spec = export_module.Export(
        "sd3", "transformer", teacher, {"2+2": distillation.method.cascade}, "2+2", 2, 4.5, share="link"
    )
    export_checkpoint(merged_network(distillation.student()), student, spec)
    assert not (student / "vae").is_symlink() and (student / "vae" / "config.json").is_file()
    assert CheckpointFolder.read(student).teacher_path == student / "../student-teacher"


def test_the_sheet_has_a_row_for_teacher_and_student(distillation: Distillation) -> None:
    prompts = encode_prompts(distillation.teacher.backbone, ["a dog", "a cat"], distillation.run / "prompts")
    path = distillation.draw_sheet(prompts)
    with Image.open(path) as image:
        assert image.width > 2 * 64 and image.height > 2 * 64
    assert path.parent.name == "sheets"


def test_a_student_may_start_from_another_checkpoint_while_the_fake_score_starts_from_the_teacher(
    distillation: Distillation, teacher_folder: Path, tmp_path: Path
) -> None:
    trained = distillation.export(tmp_path / "student")
    settings = DistillSettings(precision="fp32", initial_student=str(trained), fake_warmup_iterations=1)
    teacher = Teacher.open(teacher_folder, None, torch.float32)
    prompts = encode_prompts(teacher.backbone, ["a dog"], tmp_path / "prompts")
    built = Distillation.build(teacher, prompts, settings, tmp_path / "run")
    networks = built.networks
    expected = dict(load_checkpoint(trained)[0].component_modules()["denoiser"].named_parameters())
    own = dict(networks.teacher.named_parameters())
    assert any(not torch.equal(expected[name].float(), value) for name, value in own.items())
    for name, value in networks.student.named_parameters():
        assert torch.equal(value, expected[name].float()), name
    for name, value in networks.fake.named_parameters():
        assert torch.equal(value, own[name]), name
    before = CheckpointFolder.read(trained).distillation
    for _ in range(2):  # the second export has overwritten the folder that the run started from
        out = built.export(trained)
        assert CheckpointFolder.read(out).distillation["initial"] == before
        assert "before that: 1 iterations of batch size 2" in (out / "README.md").read_text()
    other = write_tiny_folder("pixart", tmp_path / "other")
    wrong = settings.model_copy(update={"initial_student": str(other)})
    with pytest.raises((ValueError, FileNotFoundError), match="other"):
        Distillation.build(teacher, prompts, wrong, tmp_path / "wrong")


def test_each_method_gets_a_cascade_that_fits_it(distillation: Distillation) -> None:
    teacher = distillation.teacher
    sizes = {}
    for method in ("rmd", "tdm", "dmd2", "swd"):
        cascade = training_cascade(teacher, DistillSettings(method=method))
        sizes[method] = [step.size.width for step in cascade.steps]
        assert cascade.x0_upsampling == ("bicubic" if method == "swd" else "bilinear")
    assert sizes == {"rmd": [32, 32, 64, 64], "tdm": [64] * 4, "dmd2": [64] * 4, "swd": [32, 48, 48, 64]}
    untrained = training_cascade(teacher, DistillSettings(preset="bottleneck"))
    assert untrained.note == "" and replace(preset("bottleneck"), note="") == untrained
    listed = replace(teacher.cascades["2+2"], step_noise_intensity=(0.5, 0.0, 0.25), x0_upsampling="bicubic")
    for name, cascade in exported_cascades(teacher, listed).items():
        assert cascade.step_noise_intensity == (0.5, 0.0, 0.25) and cascade.x0_upsampling == "bicubic", name


def test_prompts_are_cached_and_drawn_as_often_as_they_are_given(distillation: Distillation, tmp_path: Path) -> None:
    backbone = distillation.teacher.backbone
    first = encode_prompts(backbone, ["a dog", "a longer prompt", "a dog"], tmp_path)
    assert first.texts == ["a dog", "a longer prompt"] and first.order.tolist() == [0, 1, 0]
    files = sorted(tmp_path.glob("*/*.safetensors"))
    stamps = [file.stat().st_mtime_ns for file in files]
    second = encode_prompts(backbone, ["a dog", "a longer prompt", "a dog"], tmp_path)
    assert [file.stat().st_mtime_ns for file in sorted(tmp_path.glob("*/*.safetensors"))] == stamps
    alone = backbone.encode_prompts(["a longer prompt"])
    for name, value in second.conditioning(torch.tensor([1])).items():
        torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-4)
        assert torch.equal(value, first.conditioning(torch.tensor([1]))[name])


def test_a_negative_prompt_takes_the_empty_ones_place(distillation: Distillation, tmp_path: Path) -> None:
    backbone = distillation.teacher.backbone
    for negative in (None, "blurred", "blurred"):
        found = encode_prompts(backbone, ["a dog"], tmp_path, negative=negative).unconditional(1)
        for name, value in backbone.encode_prompts([negative or ""]).items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)
    (cache,) = tmp_path.iterdir()
    assert len(list(cache.glob("negative-*"))) == len(list(cache.glob("unconditional*"))) == 1


def test_another_teachers_text_encoder_encodes_anew(distillation: Distillation, tmp_path: Path) -> None:
    """As when a run is begun again with the right --teacher."""
    first = encode_prompts(distillation.teacher.backbone, ["a dog"], tmp_path / "prompts")
    other = Teacher.open(write_tiny_folder("sd3", tmp_path / "other", seed=1), None, torch.float32)
    second = encode_prompts(other.backbone, ["a dog"], tmp_path / "prompts")
    rows = torch.tensor([0])
    assert not any(torch.equal(a, second.conditioning(rows)[name]) for name, a in first.conditioning(rows).items())


def test_a_prompt_file_without_prompts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("# nothing\n\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompt_file(tmp_path / "p.txt")
    with pytest.raises(FileNotFoundError, match="one prompt a line"):
        read_prompt_file(tmp_path / "absent.txt")


def test_the_command_distils_resumes_and_exports(teacher_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\na cat\n")
    base = ["distill", "--teacher", str(teacher_folder), "--out", str(tmp_path / "out"), "--run", str(tmp_path / "run")]
    flags = ["--prompts", str(prompts), "--batch-size", "2", "--device", "cpu", "--set", "sheet_every=0"]
    runner = CliRunner()
    result = runner.invoke(app, [*base, *flags, "--iterations", "1", "--set", "low_stage_iterations=0"])
    assert result.exit_code == 0, result.output
    assert CheckpointFolder.read(tmp_path / "out").distillation["iterations"] == 1
    again = runner.invoke(app, [*base, *flags, "--iterations", "2"])
    assert isinstance(again.exception, ValueError) and "--resume" in str(again.exception)
    result = runner.invoke(app, [*base, *flags, "--iterations", "2", "--resume"])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["batch_size"] == 2
    result = runner.invoke(app, [*base, "--export-only", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert CheckpointFolder.read(tmp_path / "out").distillation["iterations"] == 2


def test_adapters_of_a_public_student_are_trained_exported_and_given_back(teacher_folder: Path, tmp_path: Path) -> None:
    before = load_tensors(teacher_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    layer = "transformer.proj_out"
    down, up = torch.randn(2, 32) / 10, torch.randn(len(before["proj_out.weight"]), 2) / 10
    factors = {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    save_file(factors, tmp_path / "public.safetensors", metadata={"modelspec.license": "CC BY-NC"})
    start = tmp_path / "public"
    public = ImportRequest(str(teacher_folder), "sd3", start, loras=((tmp_path / "public.safetensors", 1.0),))
    import_model(public)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\na cat\n")
    groups = "[attention, mlp, convolutions, projections]"
    options = [
        "--prompts", prompts, "--batch-size", "2", "--device", "cpu", "--iterations", "1", "--run", tmp_path / "run",
        "--set", "sheet_every=0", "--set", "low_stage_iterations=0", "--set", "precision=fp32", "--set", "lora_rank=2",
        "--set", "generator_rate=0.01", "--set", f"lora_targets={groups}", "--set", f"initial_student={start}",
    ]  # fmt: skip
    out = tmp_path / "student"
    runner = CliRunner()
    result = runner.invoke(app, list(map(str, ["distill", "--teacher", teacher_folder, "--out", out, *options])))
    assert result.exit_code == 0, result.output
    assert [path for path in (out, *out.rglob("*")) if ~path.stat().st_mode & 0o044] == []  # a service's own user reads
    file = tmp_path / "lora.safetensors"
    result = runner.invoke(app, ["export", "--checkpoint", str(out), "--lora", str(file)])
    assert result.exit_code == 0 and "as they were trained" in result.output, result.output
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    assert (header["rmd.base"], header["modelspec.license"]) == ("public", "CC BY-NC")
    adapters = load_tensors(file)
    kinds = ("attn.to_q", "ff.net.0.proj", "pos_embed.proj", "norm1.linear", "proj_out")
    assert all(any(f"{kind}.lora_B" in key and bool(value.any()) for key, value in adapters.items()) for kind in kinds)
    again = ImportRequest(str(public.out), "sd3", tmp_path / "again", loras=((file, 1.0),), dtype=torch.bfloat16)
    import_model(again)
    weight = "transformer/diffusion_pytorch_model.safetensors"
    trained, given = load_tensors(out / weight), load_tensors(again.out / weight)
    different = sum(int((trained[name] != given[name]).sum()) for name in trained)
    assert trained.keys() == given.keys() and different <= 5  # float32 sums in another order may tip a tie
    moved = sum(int((trained[name] != load_tensors(public.out / weight)[name].bfloat16()).sum()) for name in trained)
    assert moved > 1000
    result = runner.invoke(app, ["export", "--checkpoint", str(out), "--lora", str(file), "--rank", "8"])
    assert result.exit_code == 0, result.output
    said = result.output.splitlines()
    assert f"{file}: rank 8, " in said[-2] and said[-1].startswith("pictures differ by 0.0")
    for wrong, message in ((["--device", "gpu"], "unknown device 'gpu'"), (["--prompt", " "], "--prompt is empty")):
        refused = runner.invoke(app, ["export", "--checkpoint", str(out), "--lora", str(file), "--rank", "8", *wrong])
        assert refused.exit_code and message in f"{refused.output} {refused.exception}"
