"""Metrics against closed forms, and the whole evaluation on small networks of the real classes."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from rmd.backbones.tiny import write_tiny_decoder, write_tiny_folder
from rmd.backbones.tiny_decoder import TinyDecoder
from rmd.dtypes import dtype_name, native_dtype
from rmd.presets import preset
from training.embedded.data.dataset import PictureSet, Record
from training.embedded.data.split import twin_of, unit_hash
from training.evaluate.embedded.alignment import _fit, fit_projection
from training.evaluate.embedded.models import EvaluationSettings, Models
from training.evaluate.embedded.report import markdown
from training.evaluate.embedded.rows import PictureCache, generate
from training.evaluate.embedded.run import evaluate
from training.evaluate.embedded.sets import SETS, held_out_set, measured_indices, other_style_pictures, same_style_mix
from training.evaluate.embedded.sheets import chosen, contact_sheet, draw_sheets
from training.evaluate.shared.features import (
    FEATURE_WIDTH,
    SameConv2d,
    default_weights,
    extract_features,
    load_efficientnet_lite0,
    prepare,
)
from training.evaluate.shared.metrics import (
    Estimate,
    frechet_distance,
    kernel_distance,
    kid,
    log_rank,
    over_seeds,
    ranks_of_target,
    recall,
    recall_at,
    recall_ratio,
)


def test_kernel_distance_of_two_constant_sets_is_the_kernels_closed_form() -> None:
    a, b = torch.tensor([[1.0, 2.0]]).expand(3, -1), torch.tensor([[0.5, -1.0]]).expand(5, -1)
    k = lambda x, y: (float(x[0] @ y[0]) / 2 + 1) ** 3  # noqa: E731
    assert kernel_distance(a, b) == pytest.approx(k(a, a) + k(b, b) - 2 * k(a, b))


def test_kernel_distance_is_unbiased() -> None:
    generator = torch.Generator().manual_seed(1)
    same = [
        kernel_distance(torch.randn(20, 4, generator=generator), torch.randn(30, 4, generator=generator))
        for _ in range(400)
    ]
    mean, error = np.mean(same), np.std(same) / 20
    assert abs(mean) < 3 * error, "its mean over draws of one distribution is zero"
    assert min(same) < 0, "an unbiased estimate falls below zero too"
    assert kernel_distance(torch.randn(50, 4), torch.randn(50, 4) + 1) > 10 * error


def test_kid_is_a_thousand_times_the_distance_and_repeats() -> None:
    x, y = torch.randn(40, 6), torch.randn(60, 6) + 0.5
    found = kid(x, y, subsets=20, subset_size=15)
    assert found.value == pytest.approx(1000 * kernel_distance(x, y))
    assert found == kid(x, y, subsets=20, subset_size=15)
    assert found.deviation > 0 and found.over == "20 subsets of 15"


def test_distances_refuse_single_pictures_and_other_widths() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        kernel_distance(torch.zeros(1, 4), torch.zeros(5, 4))
    with pytest.raises(ValueError, match="cannot be compared"):
        frechet_distance(torch.zeros(5, 3), torch.zeros(5, 4))


@pytest.mark.parametrize("rows", [8, 200])
def test_frechet_distance_of_shifted_and_scaled_sets(rows: int) -> None:
    x = torch.randn(rows, 16, dtype=torch.float64)
    centred = x - x.mean(0)
    shift = torch.linspace(-1, 1, 16, dtype=torch.float64)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + shift) == pytest.approx(float(shift.square().sum()))
    # tr(C + 4 C - 2 (4 C^2)^(1/2)) = tr C
    assert frechet_distance(centred, 2 * centred) == pytest.approx(float(centred.T.cov().trace()))


def test_frechet_distance_equals_the_matrix_square_root() -> None:
    x, y = torch.randn(90, 12) @ torch.randn(12, 12), torch.randn(70, 12) @ torch.randn(12, 12) + 0.3
    c_x, c_y = x.double().T.cov().numpy(), y.double().T.cov().numpy()
    root = np.real(scipy.linalg.sqrtm(c_x @ c_y))
    expected = float((x.double().mean(0) - y.double().mean(0)).square().sum()) + np.trace(c_x + c_y - 2 * root)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)


def test_random_scores_retrieve_at_chance_and_equal_scores_stand_in_the_middle() -> None:
    generator = torch.Generator().manual_seed(0)
    ranks = ranks_of_target(torch.rand(4000, 50, generator=generator), torch.arange(4000) % 50)
    assert recall_at(5, ranks) == pytest.approx(5 / 50, abs=3 * math.sqrt(0.1 * 0.9 / 4000))
    constant = ranks_of_target(torch.zeros(2, 9), [0, 5])
    assert constant.tolist() == [4, 4], "a model that says nothing does not hit"


def test_ranks_count_what_stands_above() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.2, -math.inf]])
    assert ranks_of_target(scores, [2, 0]).tolist() == [1, 0]


def test_recall_over_seeds_has_the_standard_error_over_concepts() -> None:
    ranks = [torch.tensor([0.0, 9, 0, 9]), torch.tensor([0.0, 9, 0, 9])]
    found = recall(ranks, 1, torch.arange(4))
    assert found.value == 0.5
    assert found.deviation == pytest.approx(0.25), "seeds that agree do not make up for few prompts"
    twice = recall(ranks, 1, torch.tensor([7, 3, 7, 3]))
    assert twice.deviation == pytest.approx(math.sqrt(0.125)), "two styles of a concept that hit together are one draw"
    apart = recall([torch.zeros(100), torch.full((100,), 9.0)], 1, torch.arange(100))
    assert apart.deviation == pytest.approx(math.sqrt(0.5)) and apart.over == "2 seeds"


def test_log_rank_is_zero_at_the_first_place_and_grows_by_one_with_each_doubling() -> None:
    found = log_rank([torch.tensor([0.0, 0, 1, 3]), torch.tensor([0.0, 0, 3, 7])], torch.arange(4))
    assert found.value == pytest.approx((0 + 0 + 1 + 2 + 0 + 0 + 2 + 3) / 8)


def test_ratio_of_a_row_to_itself_is_one_without_doubt() -> None:
    ranks = [torch.tensor([0.0, 7, 2, 9, 1])]
    found = recall_ratio(ranks, ranks, 5, torch.arange(5))
    assert found is not None and found.value == 1 and found.deviation == 0
    assert recall_ratio(ranks, [torch.full((5,), 9.0)], 5, torch.arange(5)) is None
    half = recall_ratio([torch.tensor([0.0, 9] * 50)], [torch.zeros(100)], 5, torch.arange(100))
    assert half is not None and half.value == 0.5
    assert half.deviation == pytest.approx(0.05, abs=0.01), "the binomial error of 100 prompts"
    pairs = recall_ratio([torch.tensor([0.0, 0, 9, 9] * 25)], [torch.zeros(100)], 5, torch.arange(100) // 2)
    assert pairs is not None and pairs.deviation == pytest.approx(0.0707, abs=0.012), "of 50 concepts"


def test_over_seeds_takes_the_larger_deviation() -> None:
    close = over_seeds([Estimate(1.0, 0.5, "subsets"), Estimate(1.1, 0.5, "subsets")])
    assert close.deviation == 0.5 and close.over == "subsets"
    assert over_seeds([Estimate(1.0, 0.1, "subsets"), Estimate(3.0, 0.1, "subsets")]).over == "2 seeds"


def test_same_padding_puts_the_odd_pixel_at_the_end() -> None:
    convolution = SameConv2d(1, 1, 3, 2, bias=False)
    with torch.no_grad():
        convolution.weight.fill_(1.0)
    corners = convolution(torch.arange(16.0).view(1, 1, 4, 4))[0, 0]
    # Windows begin at 0 and 2; what lies beyond the fourth row or column is zero.
    assert corners.tolist() == [[45.0, 39.0], [66.0, 50.0]]


def test_features_do_not_depend_on_the_batch_and_tell_pictures_apart() -> None:
    network = load_efficientnet_lite0()
    pictures = np.random.default_rng(0).integers(0, 255, (3, 128, 128, 3), dtype=np.uint8)
    together = extract_features(network, iter([pictures]))
    assert together.shape == (3, FEATURE_WIDTH)
    apart = extract_features(network, (pictures[i : i + 1] for i in range(3)))
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)
    assert torch.equal(together, extract_features(network, iter([pictures])))
    blank = extract_features(network, iter([np.full((1, 128, 128, 3), 255, np.uint8)]))
    assert torch.nn.functional.cosine_similarity(blank, together).max() < 0.9


def test_the_networks_input_is_centred_at_127() -> None:
    grey = prepare(np.full((1, 64, 64, 3), 127, np.uint8))
    assert tuple(grey.shape) == (1, 3, 224, 224) and float(grey.abs().max()) < 1e-6


def test_other_weights_are_refused(tmp_path: Path) -> None:
    altered = tmp_path / "weights.pth"
    altered.write_bytes(default_weights().read_bytes()[:-1])
    with pytest.raises(ValueError, match="sha256"):
        load_efficientnet_lite0(altered)


def test_alignment_generalises_to_concepts_it_was_not_fitted_on() -> None:
    texts = torch.randn(300, 12)
    mixing = torch.randn(12, 40)
    concepts = [f"concept {i}" for i in range(300) for _ in range(3)]
    rows = torch.arange(300).repeat_interleave(3)
    pictures = texts[rows] @ mixing + 0.3 * torch.randn(900, 40)
    fitted = fit_projection(pictures[:600], texts[rows[:600]], concepts[:600])
    ranks = ranks_of_target(fitted.scores(pictures[600:], texts[200:]), rows[600:] - 200)
    assert recall_at(1, ranks) > 0.9
    with pytest.raises(ValueError, match="do not match"):
        fit_projection(pictures, texts, concepts)


@pytest.mark.parametrize(("rows", "columns"), [(30, 12), (12, 30)])
def test_the_regression_is_ridge_regression(rows: int, columns: int) -> None:
    pictures, texts = torch.randn(rows, columns, dtype=torch.float64), torch.randn(rows, 3, dtype=torch.float64)
    (fitted,) = _fit(pictures, texts, [2.0])
    x = (pictures - pictures.mean(0)) / pictures.std(0)
    expected = torch.linalg.solve(x.T @ x + 2 * torch.eye(columns, dtype=torch.float64), x.T @ (texts - texts.mean(0)))
    torch.testing.assert_close(fitted.weight, expected)


Evaluated = tuple[Path, dict[str, Any]]
STYLES = ("noto", "twemoji", "fluent flat")


def _records() -> list[Record]:
    found = []
    for number in range(24):
        split = "unseen_concept" if number % 4 == 3 else "train"
        for style in STYLES:
            held = split == "train" and number % 4 == 0 and style == "noto"
            found.append(
                Record(
                    hexcode=f"{number:04x}",
                    base_hexcode=f"{number:04x}",
                    style=style,
                    label=f"thing {number}",
                    tags=("tag",),
                    group=1,
                    split="unseen_pair" if held else split,  # type: ignore[arg-type]
                )
            )
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture cache of 24 concepts in three styles: coloured blocks."""
    root = tmp_path_factory.mktemp("pictures")
    records = _records()
    rgba = np.zeros((len(records), 128, 128, 4), np.uint8)
    for i, record in enumerate(records):
        number, style = int(record.hexcode, 16), STYLES.index(record.style)
        left, top = 16 * (number % 6), 24 * (number // 6)
        rgba[i, top : top + 48, left : left + 32 + 8 * style] = (40 * style + 80, 10 * number, 255 - 10 * number, 255)
    np.save(root / "pictures.npy", rgba)
    (root / "records.json").write_text(json.dumps([record.to_dict() for record in records]))
    (root / "meta.json").write_text("{}")
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder("embedded", tmp_path_factory.mktemp("tiny") / "student")


def test_held_out_sets_are_prefixes_with_a_gallery_of_distinct_concepts(data: Path) -> None:
    pictures = PictureSet.load(data)
    whole, part = held_out_set(pictures, "unseen_concept"), held_out_set(pictures, "unseen_concept", 7)
    assert whole.indices[:7] == part.indices
    assert len(whole.records) == 18 and len(whole.concepts) == 6
    assert [whole.concepts[target] for target in whole.targets] == [record.base_hexcode for record in whole.records]
    assert whole.seeds(0)[:7] == part.seeds(0) and len(set(whole.seeds(0))) == 18
    assert whole.seeds(0) != whole.seeds(1)
    with pytest.raises(ValueError, match="raise the limit"):
        held_out_set(pictures, "unseen_pair", 1)
    rest = held_out_set(pictures, "unseen_concept", skip=7)
    assert part.indices + rest.indices == whole.indices and rest.seeds(0) == whole.seeds(0)[7:]
    with pytest.raises(ValueError, match="skip fewer"):
        held_out_set(pictures, "unseen_concept", skip=18)


def test_pictures_with_a_twin_in_training_are_no_test(data: Path) -> None:
    pictures = PictureSet.load(data)
    test = held_out_set(pictures, "unseen_concept")
    held = test.records[0]
    trained = next(r for r in pictures.records if r.split == "train" and r.style == held.style)
    twin = replace(held, base_hexcode=f"{trained.base_hexcode}-200d-2640-fe0f")
    changed = PictureSet([twin if record is held else record for record in pictures.records], pictures.rgba)
    smaller = held_out_set(changed, "unseen_concept")
    assert len(smaller.records) == len(test.records) - 1 and twin not in smaller.records


def test_twins_differ_in_gender_and_direction_only() -> None:
    runners = ["1f3c3", "1f3c3-200d-2640-fe0f", "1f3c3-200d-2642-fe0f-200d-27a1-fe0f"]
    assert {twin_of(code) for code in runners} == {"1f3c3"}
    assert twin_of("1f468-200d-1f692") == twin_of("1f469-200d-1f692") != twin_of("1f469-200d-1f33e")


def test_the_floor_has_the_sets_styles_and_other_styles_are_of_the_same_concept(data: Path) -> None:
    pictures = PictureSet.load(data)
    test = held_out_set(pictures, "unseen_pair")
    mix = [pictures.records[i] for i in same_style_mix(pictures, test)]
    assert len(mix) == len(test.records) and {record.style for record in mix} == {"noto"}
    assert {record.split for record in mix} == {"train"}
    for record, other in zip(test.records, other_style_pictures(pictures, test), strict=True):
        assert other is not None
        assert pictures.records[other].base_hexcode == record.base_hexcode
        assert pictures.records[other].style != record.style


def _with_training_only(pictures: PictureSet) -> PictureSet:
    """The same with a further, training-only set of every trained concept."""
    extra = [
        replace(pictures.records[i], style="blob", training_only=True)
        for i in pictures.indices("train")
        if pictures.records[i].style == "twemoji"
    ]
    rgba = np.concatenate([pictures.rgba, 255 - pictures.rgba[: len(extra)]])
    return PictureSet([*pictures.records, *extra], rgba)


def test_training_only_sets_change_no_set_floor_or_other_style(data: Path) -> None:
    pictures = PictureSet.load(data)
    more = _with_training_only(pictures)
    assert len(more.indices("train")) > len(pictures.indices("train"))
    assert measured_indices(more, "train") == pictures.indices("train")
    for name in SETS:
        test = held_out_set(pictures, name)
        assert held_out_set(more, name) == test
        assert same_style_mix(more, test) == same_style_mix(pictures, test)
        assert other_style_pictures(more, test) == other_style_pictures(pictures, test)


def test_only_the_search_for_copies_sees_training_only_sets(
    evaluated: Evaluated, checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    _, content = evaluated
    more = _with_training_only(PictureSet.load(data))
    np.save(tmp_path / "pictures.npy", more.rgba)
    (tmp_path / "records.json").write_text(json.dumps([record.to_dict() for record in more.records]))
    (tmp_path / "meta.json").write_text("{}")
    again = evaluate(_settings(checkpoint, tmp_path, tmp_path, rows=("teacher",)))
    assert again["text_alignment"] == content["text_alignment"]
    assert again["nearest_training"]["training_pictures"] > content["nearest_training"]["training_pictures"]
    for entry, other in zip(content["sets"], again["sets"], strict=True):
        assert other["floor"] == entry["floor"]
        for row, same in zip(entry["rows"][:4], other["rows"], strict=True):
            old, new = ({k: v for k, v in r["metrics"].items() if "nearest" not in k} for r in (row, same))
            assert new == old, row["row"]


def _settings(checkpoint: Path, data: Path, folder: Path, **changes: object) -> EvaluationSettings:
    options: dict[str, Any] = {
        "rows": ("teacher", "student-2+2", "naive-0+4"),
        "seeds": (0, 1),
        "limit": 8,
        "teacher_steps": 3,
        "batch": 5,
        "feature_dtype": dtype_name(native_dtype("cpu")),
        **changes,
    }
    return EvaluationSettings(checkpoint, None, data, folder / "out", folder / "cache", **options)


@pytest.fixture(scope="module")
def evaluated(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    folder = tmp_path_factory.mktemp("evaluated")
    return folder, evaluate(_settings(checkpoint, data, folder))


def test_the_report_has_every_row_with_error_bars_on_both_sets(evaluated: Evaluated) -> None:
    folder, content = evaluated
    assert json.loads((folder / "out" / "quality.json").read_text())["sets"] == json.loads(json.dumps(content["sets"]))
    assert [entry["set"] for entry in content["sets"]] == ["unseen_pair", "unseen_concept"]
    for entry in content["sets"]:
        rows = {row["row"]: row for row in entry["rows"]}
        assert list(rows) == ["real", "other-style", "autoencoder", "teacher", "student-2+2", "naive-0+4"]
        assert rows["teacher"]["evaluations"] == 6 and rows["student-2+2"]["evaluations"] == 4
        assert rows["naive-0+4"]["evaluations"] == 8, "guidance takes two passes a step"
        assert len(rows["student-2+2"]["by_seed"]["kid"]) == 2 and len(rows["teacher"]["by_seed"]["kid"]) == 1
        for name in ("kid", "frechet", "text_r1", "text_r5", "picture_r1", "picture_r5"):
            estimate = rows["student-2+2"]["metrics"][name]
            assert math.isfinite(estimate["value"]) and estimate["deviation"] >= 0
        assert set(entry["floor"]) == {"kid", "frechet"}
        assert entry["chance"]["r1"] == pytest.approx(1 / entry["gallery"])
        assert entry["pictures"] == sum(entry["styles"].values())
    text = markdown(content)
    assert "KID" in text and "Unseen pairs" in text and "Unseen concepts" in text and "not FID" in text
    assert content["versions"]["torch"] == torch.__version__


def test_a_second_run_reads_its_pictures_from_the_cache(
    evaluated: Evaluated,
    checkpoint: Path,
    data: Path,
) -> None:
    folder, content = evaluated
    before = {path: path.stat().st_mtime_ns for path in (folder / "cache").rglob("*.npy")}
    again = evaluate(_settings(checkpoint, data, folder))
    assert again["sets"] == content["sets"]
    assert {path: path.stat().st_mtime_ns for path in (folder / "cache").rglob("*.npy")} == before


def test_checkpoints_can_be_compared_on_training_pictures(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    rows = ("student-2+2",)
    content = evaluate(_settings(checkpoint, data, tmp_path, sets=("train",), rows=rows, seeds=(0,)))
    assert [entry["set"] for entry in content["sets"]] == ["train"]
    assert "for choosing among checkpoints, not a test" in markdown(content)
    pictures = PictureSet.load(data)
    test = held_out_set(pictures, "train", 8)
    assert {record.split for record in test.records} == {"train"}
    assert set(same_style_mix(pictures, test)).isdisjoint(test.indices)


def test_unknown_rows_and_sets_are_named(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    for sets in (("valid",), ("train", "train"), ("unseen_motion",)):
        with pytest.raises(ValueError, match="give some of unseen_pair, unseen_concept, train, each once"):
            evaluate(_settings(checkpoint, data, tmp_path, sets=sets))
    with pytest.raises(ValueError, match=r"unknown row 'student-9\+9'"):
        evaluate(_settings(checkpoint, data, tmp_path, rows=("student-9+9",)))


def test_pictures_do_not_depend_on_the_batch_and_a_damaged_file_is_drawn_again(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    models = Models(_settings(checkpoint, data, tmp_path))
    backbone, cascade = models.load("student"), models.cascades["2+2"]
    prompts, seeds = ["thing 1", "thing 2", "thing 3"], [1, 2, 3]
    cache = PictureCache(tmp_path / "cache")
    whole = generate(backbone, "w", cascade, prompts, seeds, cache, batch=3)
    single = generate(backbone, "w", cascade, prompts, seeds, cache, batch=1)
    assert whole.shape == (3, 64, 64, 3)
    assert np.abs(whole.astype(int) - single.astype(int)).mean() <= 1
    for path in (tmp_path / "cache").rglob("*.npy"):
        path.write_bytes(path.read_bytes()[:50])
    assert np.array_equal(generate(backbone, "w", cascade, prompts, seeds, cache, batch=3), whole)


def test_a_checkpoint_of_other_sizes_is_measured_at_its_own(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "lab"
    shutil.copytree(checkpoint, copy)
    record = json.loads((copy / "cascade.json").read_text())
    stored = record["schedules"]

    def models(*names: str) -> Models:
        kept = {"default": names[0], "schedules": {name: stored[name] for name in names}}
        (copy / "cascade.json").write_text(json.dumps({**record, **kept}))
        return Models(_settings(copy, data, tmp_path, rows=()))

    found = models("2+2")
    assert list(found.cascades) == ["2+2", "0+4", "1+3", "3+1"]
    assert {name: [str(size) for size in cascade.sizes] for name, cascade in found.cascades.items()} == {
        "2+2": ["32x32", "64x64"],
        "0+4": ["64x64"],
        "1+3": ["32x32", "64x64"],
        "3+1": ["32x32", "64x64"],
    }
    shipped = [step.timestep for step in preset("embedded", schedule="1+3").steps]
    assert [step.timestep for step in found.cascades["1+3"].steps] == shipped
    single = models("0+4")
    assert list(single.cascades) == ["0+4"] and single.default_rows() == ("teacher", "student-0+4", "naive-0+4")


def test_the_transition_intensity_can_be_ablated(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    content = evaluate(
        _settings(
            checkpoint,
            data,
            tmp_path,
            rows=("student-2+2",),
            seeds=(0,),
            overrides={"transition_noise_intensity": 0.25},
        )
    )
    assert content["cascades"]["student-2+2"]["transition_noise_intensity"] == 0.25
    assert content["sets"][0]["over_teacher"] == {}, "no ratio without the teacher's row"


def test_sheets_show_hash_chosen_prompts_and_are_png_files(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    test = held_out_set(PictureSet.load(data), "unseen_concept")
    places = chosen(test)
    assert len(places) == 6 and len({test.targets[place] for place in places}) == 6
    first = test.records[places[0]]
    least = min(unit_hash(f"sheet:{record.hexcode}:{record.style}") for record in test.records)
    assert unit_hash(f"sheet:{first.hexcode}:{first.style}") == least
    written = draw_sheets(_settings(checkpoint, data, tmp_path), tmp_path / "docs")
    assert [path.name for path in written] == ["sheet-pairs.png", "sheet-concepts.png", "hero.png"]
    for path in written:
        with Image.open(path) as image:
            assert image.width > 300 and image.height > 60


def test_a_contact_sheet_needs_one_picture_a_prompt() -> None:
    with pytest.raises(ValueError, match="1 pictures for 2 prompts"):
        contact_sheet([("row", np.zeros((1, 8, 8, 3), np.uint8))], ["a", "b"], "title")


def test_a_small_decoders_pictures_are_never_taken_for_the_full_ones(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    decoder = write_tiny_decoder("embedded", tmp_path / "small")
    settings = _settings(checkpoint, data, tmp_path)
    plain, small = Models(settings), Models(replace(settings, decoder=str(decoder)))
    assert small.digest("student") != plain.digest("student")  # the key of the cache of pictures
    assert Models(replace(settings, decoder="full")).digest("student") == plain.digest("student")
    assert small.provenance()["decoder"] == str(decoder) and plain.provenance()["decoder"] == "full"
    for weights in ("student", "teacher"):
        assert isinstance(small.load(weights).component_modules()["decoder"], TinyDecoder)
    # The ceiling in the table is the full autoencoder's, which alone has an encoder.
    pixels = torch.rand(1, 3, 64, 64, dtype=plain.dtype)
    with torch.no_grad():
        assert torch.equal(small.autoencoder().encode(pixels), plain.autoencoder().encode(pixels))
