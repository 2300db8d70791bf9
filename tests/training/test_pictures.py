"""Pictures by HPS v2.1, aesthetic score and CLIP score: tiny random weights of the very classes."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from typer.testing import CliRunner, Result

from rmd.backbones.tiny import write_tiny_folder
from tests.training.metric_setup import SIDE, OpenClip, write_aesthetic, write_clip, write_hps
from training.evaluate.pictures.metrics import AestheticScore, ClipScore, HumanPreference, pad_to_square
from training.evaluate.pictures.report import markdown
from training.evaluate.pictures.run import evaluate_pictures
from training.evaluate.shared.intervals import binomial, bootstrap_mean
from training.evaluate.shared.sources import noise_seed, read_source

PROMPTS = ["a red fox", "an old lighthouse", "a ship"]
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("metrics")
    return {
        "folder": folder,
        "hps": write_hps(folder / "hps"),
        "clip": write_clip(folder / "clip"),
        "aesthetic": write_aesthetic(folder / "aesthetic"),
    }


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def pixels(one: Image.Image) -> torch.Tensor:
    values = torch.from_numpy(np.array(one)).float().movedim(-1, 0) / 255
    return ((values - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None])[None]


def tokens(metric: Any, text: str) -> torch.Tensor:
    found: torch.Tensor = metric.tokenizer([text], return_tensors="pt").input_ids
    return found


def test_hps_is_the_cosine_by_openclips_network_of_the_whole_picture_on_black(networks: dict[str, Any]) -> None:
    metric = HumanPreference(networks["folder"] / "hps", "cpu")
    network: OpenClip = networks["hps"]
    wide = picture(SIDE, SIDE // 2)
    square = Image.new("RGB", (SIDE, SIDE))
    square.paste(wide, (0, SIDE // 4))
    with torch.no_grad():
        text = network.encode_text(tokens(metric, "a red fox"))
        expected = 100 * F.cosine_similarity(network.visual(pixels(square)), text)
    torch.testing.assert_close(metric.score([wide], ["a red fox"]), expected, rtol=1e-4, atol=1e-4)
    # Together with a longer text: what follows a text's end changes nothing.
    both = metric.score([wide, wide], ["a red fox", "a much longer text than that"])
    torch.testing.assert_close(both[:1], expected, rtol=1e-4, atol=1e-4)


def test_a_large_picture_is_scaled_to_its_longer_side() -> None:
    padded = pad_to_square(Image.new("RGB", (100, 50), "white"), 32)
    white = np.argwhere(np.array(padded).min(-1) == 255)
    assert padded.size == (32, 32) and white.min(0).tolist() == [8, 0] and white.max(0).tolist() == [23, 31]


def test_clip_score_is_a_hundred_times_the_cosine_and_never_negative(networks: dict[str, Any]) -> None:
    metric = ClipScore(networks["folder"] / "clip", "cpu")
    pictures, texts = [picture(SIDE, SIDE, seed) for seed in range(4)], [*PROMPTS, "a tree"]
    with torch.no_grad():
        image = networks["clip"].get_image_features(torch.cat([pixels(one) for one in pictures])).pooler_output
        text = torch.cat([networks["clip"].get_text_features(tokens(metric, one)).pooler_output for one in texts])
        expected = 100 * F.cosine_similarity(image, text)
    assert expected.min() < 0 < expected.max()
    torch.testing.assert_close(metric.score(pictures, texts), expected.clamp(min=0), rtol=1e-4, atol=1e-4)
    assert metric.score(pictures[:1], ["fox " * 200]).isfinite().all(), "a long prompt is cut"


def test_the_aesthetic_score_is_a_linear_map_of_the_unit_embedding(networks: dict[str, Any]) -> None:
    metric = AestheticScore(networks["folder"] / "aesthetic", "cpu")
    model, (first, second, last) = networks["aesthetic"]
    one = picture(SIDE, SIDE)
    with torch.no_grad():
        unit = F.normalize(model(pixels(one)).image_embeds, dim=-1)
        weight = last.weight @ second.weight @ first.weight
        bias = last.weight @ (second.weight @ first.bias + second.bias) + last.bias
    torch.testing.assert_close(metric.score([one], ["unread"]), (unit @ weight.T + bias)[:, 0], rtol=1e-4, atol=1e-4)


def _sources(folder: Path, name: str, shift: int, seeds: int = 2) -> Any:
    for seed in range(seeds):
        (folder / name / str(seed)).mkdir(parents=True)
        for row in range(len(PROMPTS)):
            picture(48, 32, 100 * shift + 10 * seed + row).save(folder / name / str(seed) / f"{row:05d}.png")
    return read_source(folder / name, PROMPTS)


def test_the_report_has_intervals_and_paired_differences_and_says_what_it_is_worth(
    networks: dict[str, Any], tmp_path: Path
) -> None:
    weights = tmp_path / "weights"
    shutil.copytree(networks["folder"], weights)
    shutil.rmtree(weights / "aesthetic")
    one, other = _sources(tmp_path, "one", 0), _sources(tmp_path, "other", 1)
    shutil.copytree(tmp_path / "one", tmp_path / "same")
    content = evaluate_pictures(
        [one, other, read_source(tmp_path / "same", PROMPTS)], PROMPTS, weights, tmp_path / "out", batch=2
    )
    assert json.loads((tmp_path / "out" / "pictures.json").read_text())["rows"] == content["rows"]
    scores = np.array([row["scores"]["hps"] for row in content["rows"]])
    assert scores.shape == (3, 2, 3)
    for row, values in zip(content["rows"], scores, strict=True):
        found = row["metrics"]["hps"]
        assert found["low"] <= found["value"] <= found["high"] and found["value"] == pytest.approx(values.mean())
        assert found["by_seed"] == pytest.approx(values.mean(1))
    apart, same = (row["metrics"]["hps"] for row in content["differences"])
    assert apart["value"] == pytest.approx((scores[1] - scores[0]).mean(), abs=1e-4)
    assert apart["better"] == pytest.approx((scores[1] > scores[0]).mean())
    assert (same["value"], same["low"], same["high"], same["better"]) == (0, 0, 0, 0.5)
    text = markdown(content)
    assert text.count("its figure means nothing") == 2, "once a network that is none of the published ones"
    assert "shunk031/aesthetics-predictor" in text and "aesthetic score" not in text.split("- ")[0]


def test_a_known_mean_lies_in_its_bootstrap_interval_and_a_pair_keeps_its_difference() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = bootstrap_mean(values)
    assert found.low < 3 < found.high and found == bootstrap_mean(values)
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05)
    with pytest.raises(ValueError, match="at least 2 prompts"):
        bootstrap_mean(values[:1])


def test_the_binomial_interval_leaves_out_one_half_where_the_test_does() -> None:
    share, p_value = binomial(8, 10)
    assert p_value == pytest.approx(2 * (45 + 10 + 1) / 1024)
    assert (share.value, share.low, share.high) == pytest.approx((0.8, 0.44390, 0.97479), abs=1e-5)
    for successes in range(21):
        share, p_value = binomial(successes, 20)
        assert (share.low <= 0.5 <= share.high) == (p_value >= 0.05)


def test_noise_depends_on_prompt_and_sampling_seed_alone() -> None:
    seeds = {noise_seed(prompt, seed) for prompt in PROMPTS for seed in range(3)}
    assert len(seeds) == 9 and noise_seed("a red fox", 1) == 1574834280


def _run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(importlib.import_module("cli.evaluate").app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder("sd3", tmp_path_factory.mktemp("tiny") / "sd3")


def test_a_checkpoints_pictures_are_drawn_once_and_a_stopped_run_goes_on(
    networks: dict[str, Any], checkpoint: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    options = ["--prompts", prompts, "--weights", networks["folder"], "--out", tmp_path / "out", "--seeds", "0,1"]
    options += [
        "--cache",
        tmp_path / "drawn",
        "--schedule",
        "2+2",
        "--schedule",
        "0+4",
        "--batch",
        "2",
        "--dtype",
        "float32",
    ]
    first = _run("pictures", checkpoint, *options)
    assert first.exit_code == 0, first.output
    content = json.loads((tmp_path / "out" / "pictures.json").read_text())
    assert [row["row"] for row in content["rows"]] == [f"{checkpoint} 2+2", f"{checkpoint} 0+4"]
    drawn = {path: path.read_bytes() for path in sorted((tmp_path / "drawn").rglob("*.png"))}
    assert len(drawn) == 12 and len(set(drawn.values())) == 12
    lost = list(drawn)[4:6]  # a whole batch: another one would round otherwise
    for path in lost:
        path.unlink()
    ages = {path: path.stat().st_mtime_ns for path in drawn if path not in lost}
    assert _run("pictures", checkpoint, *options).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in ages} == ages
    assert [path.read_bytes() for path in lost] == [drawn[path] for path in lost]
    assert json.loads((tmp_path / "out" / "pictures.json").read_text())["rows"][1] == content["rows"][1]
    # What a checkpoint drew is a folder like any other.
    folder = lost[0].parent.parent
    again = _run("pictures", folder, *options)
    assert again.exit_code == 0, again.output
    rows = json.loads((tmp_path / "out" / "pictures.json").read_text())["rows"]
    assert rows[0]["scores"] in [row["scores"] for row in content["rows"]]


def test_without_a_commands_name_the_embedded_models_are_measured() -> None:
    result = _run("--checkpoint", "/nowhere")
    assert isinstance(result.exception, FileNotFoundError) and "/nowhere" in str(result.exception)
    shown = _run("--help").output
    assert all(name in shown for name in ("embedded", "pictures", "films"))


def test_what_cannot_be_read_safely_is_refused_by_name(networks: dict[str, Any], tmp_path: Path) -> None:
    def refused(metric: Any, name: str, change: Any) -> str:
        folder = tmp_path / f"{name}-{change.__name__}" / name
        shutil.copytree(networks["folder"] / name, folder)
        change(folder)
        with pytest.raises(ValueError) as raised:
            metric(folder, "cpu")
        return str(raised.value)

    def pickled(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "HPS_v2.1_compressed.pt")

    def no_tokenizer(folder: Path) -> None:
        for path in (*folder.glob("vocab*"), *folder.glob("tokenizer*")):
            path.unlink()

    def no_config(folder: Path) -> None:
        (folder / "config.json").unlink()

    def cut(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors.pop(next(name for name in tensors if name.endswith("ln_final.bias") or "layers.7" in name))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def other_shape(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["vision_config"]["patch_size"] = 16
        (folder / "config.json").write_text(json.dumps(config))

    def with_relu(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "architectures": ["AestheticsPredictorV2ReLU"]}))

    message = refused(HumanPreference, "hps", pickled)
    assert "HPS_v2.1_compressed.pt is a pickled file" in message and "RE-N-Y/hpsv21" in message
    assert "holds no tokenizer" in refused(HumanPreference, "hps", no_tokenizer)
    assert "config.json is missing" in refused(ClipScore, "clip", no_config)
    assert "text_model.final_layer_norm.bias" in refused(HumanPreference, "hps", cut)
    assert "other shapes than config.json says" in refused(HumanPreference, "hps", other_shape)
    assert "layers.7" in refused(AestheticScore, "aesthetic", cut)
    assert "has a ReLU" in refused(AestheticScore, "aesthetic", with_relu)
    with pytest.raises(FileNotFoundError, match="openai/clip-vit-large-patch14"):
        ClipScore(tmp_path / "none", "cpu")


def test_sources_that_do_not_fit_their_prompts_are_named(networks: dict[str, Any], tmp_path: Path) -> None:
    one = _sources(tmp_path, "one", 0)
    with pytest.raises(FileNotFoundError, match=r"hps: model.safetensors of RE-N-Y/hpsv21"):
        evaluate_pictures([one], PROMPTS, tmp_path / "none", tmp_path)
    other = _sources(tmp_path, "other", 1, seeds=1)
    with pytest.raises(ValueError, match=r"other has sampling seeds \[0\]"):
        evaluate_pictures([one, other], PROMPTS, networks["folder"], tmp_path)
    with pytest.raises(ValueError, match=r"00002.png is of no prompt: there are 2"):
        read_source(tmp_path / "other", PROMPTS[:2])
    with pytest.raises(ValueError, match="3 files for 4 prompts: number 3 is missing"):
        read_source(tmp_path / "other", [*PROMPTS, "more"])
    (tmp_path / "other" / "0" / "00001.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"00001.png is no picture"):
        evaluate_pictures([read_source(tmp_path / "other", PROMPTS)], PROMPTS, networks["folder"], tmp_path)
    (tmp_path / "other" / "0" / "fox.png").write_bytes(b"")
    with pytest.raises(ValueError, match="does not begin with the prompt's number"):
        read_source(tmp_path / "other", PROMPTS)
    (tmp_path / "flat").mkdir()
    for number in (1, 2, 3):  # counted from one, beside each other
        picture(8, 8).save(tmp_path / "flat" / f"{number:04d}-slug.png")
    assert [path.name[:4] for path in read_source(tmp_path / "flat", PROMPTS).files[0]] == ["0001", "0002", "0003"]
