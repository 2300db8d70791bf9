"""The lab: its grid, costs and statistics, and a tiny grid through the queue, killed and gone on with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from cli.lab import RESULTS, SHIPPED_TEACHER
from rmd.backbones.registry import get_backbone
from rmd.backbones.tiny import write_tiny_folder
from rmd.cascade_file import write_cascade_json
from rmd.checkpoint import CheckpointFolder, TeacherSpec
from tests.training.distil_setup import FULL, LOW, prompt_set, settings_for, tiny_backbone
from training.distill.methods.rmd import RMD
from training.distill.roles import fingerprint
from training.distill.settings import DistillSettings
from training.embedded.data.dataset import PictureSet, Record
from training.lab.cost import row_cost, snapshots, teacher_size, update_cost
from training.lab.grid import Expectation, Grid, Job, Row, Schedule
from training.lab.job import JobStoppedError, Lab, Stop
from training.lab.plan import plan_text
from training.lab.queue import LabFolders, run_queue, work
from training.lab.report import verdict, write_results
from training.lab.statistics import Difference, paired_difference
from training.lab.teacher import halve_pictures, halved, write_lab_card

TINY: dict[str, Any] = {
    "updates": 3,
    "reference": "rmd",
    "seeds": [0, 1],
    "teacher_steps": 2,
    "evaluation": {"limit": 6, "seeds": [0], "features": "float32", "strip": 2},
    "base": {
        "batch_size": 4, "guidance_scale": 2.0, "generator_rate": 1e-3, "fake_rate": 1e-3, "precision": "fp32",
        "low_stage_iterations": 0, "save_every": 1, "keep_checkpoints": 1, "log_every": 1,
    },
    "start": {"warm_start_iterations": 2, "warm_start_fake_iterations": 0},
    "schedules": {
        "2+2": {"sides": [32, 64], "thresholds": [-1.5]},
        "4@32 mapped": {"sides": [32], "teacher_side": 64},
        "teacher": {"sides": [64], "steps": 2},
    },
    "rows": [
        {"key": "teacher", "title": "teacher", "weights": "teacher", "schedule": "teacher"},
        {"key": "start", "title": "start", "weights": "start", "once": True},
        {"key": "rmd", "title": "RMD", "intensities": [0.5]},
        {"key": "low", "title": "RM alone", "schedule": "4@32 mapped", "settings": {"match_at": "64x64"},
         "start": {"match_at": "64x64"}},
        {"key": "wish", "title": "a wish", "settings": {"wishful": 1}},
    ],
    "tables": [{"title": "Table", "against": "rmd", "rows": ["teacher", "low", "rmd", "wish"], "paper": "says so"}],
    "expectations": [{"rows": ["rmd", "low"], "why": "of its sizes"}, {"rows": ["rmd", "wish"], "why": "hope"}],
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> LabFolders:
    """A tiny grid with its teacher and twelve concepts' coloured blocks, two of each split's three styles."""
    root = tmp_path_factory.mktemp("lab")
    (root / "data").mkdir()
    records = []
    for number in range(12):
        for style in ("noto", "twemoji"):
            split = "unseen_concept" if number > 8 else "unseen_pair" if number > 5 and style == "noto" else "train"
            code = f"1f{number:03x}"
            records.append(Record(code, code, style, f"thing {number}", (f"tag {number}",), 1, split))  # type: ignore[arg-type]
    rgba = np.zeros((len(records), 64, 64, 4), np.uint8)
    for i in range(len(records)):
        rgba[i, i : i + 30, 2 * i % 32 : 2 * i % 32 + 30] = (10 * i, 255 - 10 * i, 40 * (i % 2), 255)
    np.save(root / "data" / "pictures.npy", rgba)
    (root / "data" / "records.json").write_text(json.dumps([record.to_dict() for record in records]))
    (root / "data" / "meta.json").write_text("{}")
    teacher = write_tiny_folder("embedded", root / "teacher")
    (root / "grid.yaml").write_text(yaml.safe_dump(TINY))
    return LabFolders(root / "grid.yaml", root / "queue", root / "results", teacher, root / "data")


def opened(folders: LabFolders, stop: Stop | None = None) -> Lab:
    lab = folders.open(None, lambda _text: None)
    return lab if stop is None else replace(lab, stop=stop)


class StopAfter(Stop):
    """Due after it was looked at so many times."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    @property
    def due(self) -> bool:
        self.looks -= 1
        return self.asked or self.looks < 0


def result(folders: LabFolders, name: str) -> dict[str, Any]:
    """A result but for what differs between two runs of the same."""
    content: dict[str, Any] = json.loads((folders.results / f"{name}.json").read_text())
    for snapshot in content["snapshots"].values():
        snapshot.pop("seconds", None)
    return content


@pytest.fixture(scope="module")
def finished(folders: LabFolders) -> LabFolders:
    """The whole queue by two processes, one of which is killed while it trains; then what that left, here."""
    command = [
        sys.executable, "-m", "cli.main", "lab", "run", "--jobs", "2", "--threads", "1", "--grid", folders.grid,
        "--root", folders.root, "--results", folders.results, "--teacher", folders.teacher, "--data", folders.data,
    ]  # fmt: skip
    said: list[str] = []
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        for line in parent.stdout:
            if ": update " in line and not any(": update " in earlier for earlier in said):
                os.kill(int(line[1 : line.index("]")]), signal.SIGKILL)
            said.append(line)
    assert parent.returncode == 1 and any("ended with SIGKILL; nothing is lost" in line for line in said), said
    torch.set_num_threads(1)
    assert run_queue(folders, 1, None, 1, lambda _text: None)
    return folders


def test_two_processes_one_killed_do_every_job_once(finished: LabFolders) -> None:
    names = {path.stem for path in finished.results.glob("*-s*.json")}
    assert names == {"teacher-s0", "start-s0", "rmd-s0", "rmd-s1", "low-s0", "low-s1"}
    assert not list(finished.root.glob("runs/*/checkpoints")), "checkpoints are kept until there is a result, no longer"
    assert {path.stem for path in (finished.results / "strips").iterdir()} == {"teacher", "start", "rmd", "low"}


def test_the_common_start_is_measured_as_it_was_exported(finished: LabFolders) -> None:
    start, student = result(finished, "start-s0"), result(finished, "rmd-s0")
    assert start["cascade"] == student["cascade"] | {"guidance_scale": start["cascade"]["guidance_scale"]}
    assert start["snapshots"]["updates"]["sets"] != student["snapshots"]["updates"]["sets"]
    assert start["settings"]["warm_start_iterations"] == 2 and "initial_student" not in start["settings"]


def test_a_killed_jobs_result_is_that_of_one_that_ran_through(finished: LabFolders, tmp_path: Path) -> None:
    job = Grid.read(finished.grid).jobs()[0]
    again = replace(finished, root=tmp_path, results=tmp_path / "results")
    for name in ("pictures", "prompts"):
        (tmp_path / name).symlink_to(finished.root / name)
    opened(again).run(job)
    assert result(again, job.name) == result(finished, job.name)


def test_a_job_that_is_stopped_again_and_again_comes_out_the_same(finished: LabFolders, tmp_path: Path) -> None:
    job = next(job for job in Grid.read(finished.grid).jobs() if job.name == "low-s0")
    again = replace(finished, root=tmp_path, results=tmp_path / "results")
    for name in ("pictures", "prompts"):
        (tmp_path / name).symlink_to(finished.root / name)
    stops = 0
    for looks in range(3, 100, 6):
        try:
            opened(again, StopAfter(looks)).run(job)
            break
        except JobStoppedError:
            stops += 1
    assert stops > 1
    assert result(again, "low-s0") == result(finished, "low-s0")


def test_a_failing_job_is_said_and_the_others_go_on(finished: LabFolders, tmp_path: Path) -> None:
    grid = {**TINY, "rows": [*TINY["rows"], {"key": "bad", "title": "bad", "settings": {"match_at": "wide"}}]}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    said: list[str] = []
    lab = replace(finished, grid=tmp_path / "grid.yaml").open(None, said.append)
    outcome = work(lab, lab.grid.jobs())
    assert set(outcome.failed) == {"bad-s0", "bad-s1"} and "WIDTHxHEIGHT" in outcome.failed["bad-s0"]
    assert not outcome.stopped and not outcome.done


def test_a_fault_of_our_own_in_one_job_does_not_end_the_others(folders: LabFolders, tmp_path: Path) -> None:
    tried: list[str] = []

    class Faulty(Lab):
        def run(self, job: Job) -> None:
            tried.append(job.name)
            raise KeyError("a weight")

    lab = opened(replace(folders, root=tmp_path, results=tmp_path / "results"))
    outcome = work(Faulty(**vars(lab)), lab.grid.jobs())
    assert tried == [job.name for job in lab.grid.jobs()] == list(outcome.failed)
    assert outcome.failed["rmd-s0"] == "KeyError: 'a weight'"


def test_results_of_another_teacher_are_refused(finished: LabFolders, tmp_path: Path) -> None:
    other = write_tiny_folder("embedded", tmp_path / "teacher", seed=1)
    lab = opened(replace(finished, teacher=other))
    with pytest.raises(ValueError, match="another 'teacher' than this grid: give another --results"):
        _ = lab.measurer


def test_the_report_says_what_was_run_what_was_not_and_what_came_out(finished: LabFolders, tmp_path: Path) -> None:
    page, plots, sheet = write_results(Grid.read(finished.grid), finished.results, tmp_path / "results.md")
    text = page.read_text()
    assert "6 of 6 runs are done." in text and "Preliminary" not in text
    assert "Not yet available with this version: `wish`" in text
    assert "| rmd better than wish | hope |  | not yet run |" in text
    assert "standard deviation) between training seeds" in text
    assert "| RM alone | 2 |" in text and "| RMD | 0.5 |" in text
    assert plots.stat().st_size > 1000 and sheet.stat().st_size > 100
    (tmp_path / "part").mkdir()
    for name in ("sets.json", "rmd-s0.json"):
        (tmp_path / "part" / name).write_bytes((finished.results / name).read_bytes())
    write_results(Grid.read(finished.grid), tmp_path / "part", tmp_path / "part.md")
    assert "**Preliminary**: 1 of 6 runs are done." in (tmp_path / "part.md").read_text()
    own = json.loads((finished.results / "low-s0.json").read_text())
    for other in ({**own, "settings": {**own["settings"], "newer": 1}}, {**own, "dtype": "bfloat16"}):
        (tmp_path / "part" / "low-s0.json").write_text(json.dumps(other))
        write_results(Grid.read(finished.grid), tmp_path / "part", tmp_path / "part.md")
        assert "not to be compared: rmd-s0; low-s0." in (tmp_path / "part.md").read_text()
    assert write_results(Grid.read(finished.grid), tmp_path, tmp_path / "none.md") == [tmp_path / "none.md"]
    none = (tmp_path / "none.md").read_text()
    assert "0 of 6 runs are done." in none and none.count("not yet run") == 3


def test_the_plan_names_costs_state_and_expectations(finished: LabFolders) -> None:
    text = plan_text(Grid.read(finished.grid), finished.root, finished.results)
    assert "6 jobs: 4 rows" in text and "6 done" in text
    assert "not yet available: unknown setting 'wishful'" in text
    assert "- rmd better than low: of its sizes" in text


def test_the_shipped_grid_has_the_papers_schedules() -> None:
    grid = Grid.read()
    two = grid.cascade(grid.row("rmd"))
    assert [step.timestep for step in two.steps] == [1000, 857, 500, 250]
    assert two.stages[0].teacher_interval[0] == pytest.approx(1 / (1 + np.exp(-0.75)))
    alone = grid.cascade(grid.row("rm-64"))
    assert [(step.timestep, step.size.width) for step in alone.steps] == [(1000, 64), (857, 64), (667, 64), (400, 64)]
    assert [step.timestep for step in grid.cascade(grid.row("inverse")).steps] == [1000, 600, 500, 250]
    assert [len(stage.steps) for stage in grid.cascade(grid.row("rmd-1+2+1")).stages] == [1, 2, 1]
    first = [job.name for job in grid.jobs()[:4]]
    assert first == ["rmd-s0", "rmd-s1", "rmd-s2", "teacher-s0"], "the seeds' own spread comes before all comparisons"


def test_a_student_that_ends_low_is_matched_at_the_teachers_size() -> None:
    cascade = Schedule(sides=(32,), teacher_side=64).cascade("low")
    for match_at, size in (("64x64", FULL), (None, LOW)):
        method = RMD(tiny_backbone(), cascade, settings_for(match_at=match_at), prompt_set(), 2.0)
        assert method.matched_size(LOW) == size
    with pytest.raises(ValueError, match="teacher_side is for one side"):
        Schedule(sides=(32, 64), teacher_side=64).cascade("low")


def test_what_a_row_needs_and_this_version_lacks_is_said() -> None:
    grid = Grid(**TINY)
    assert grid.unavailable(grid.row("wish")).startswith("unknown setting 'wishful'")
    assert "no training/configs/teleport.yaml" in grid.unavailable(Row(key="x", title="x", config="teleport"))
    assert grid.unavailable(Row(key="x", title="x", settings={"method": "rmd"})) == ""
    assert all(job.row.key != "wish" for job in grid.jobs())


def test_a_recipe_lies_beneath_what_the_lab_fixes() -> None:
    grid = Grid.read()
    settings = grid.settings(grid.row("recipe-ours"), 2)
    assert (settings.loss, settings.stage_weights, settings.rollout) == ("elementwise_huber", (3.0, 1.0), "pipelined")
    assert (settings.batch_size, settings.guidance_scale, settings.seed, settings.decay_share) == (32, 3.0, 2, 0.0)


def test_the_reference_row_is_the_papers_recipe() -> None:
    grid = Grid.read()
    row = grid.row(grid.reference)
    cascade, intensities = grid.cascade(row), ("score_noise_intensity", "transition_noise_intensity")
    recipe = grid.settings(Row(key="paper", title="", config="embedded/paper"), 0)
    said = {name: getattr(recipe, name) for name in (*intensities, "inference_noise_intensity")}
    assert grid.settings(row, 0).model_copy(update=said) == recipe
    assert (cascade.score_noise_intensity, cascade.training_noise_intensity) == tuple(said[n] for n in intensities)
    assert cascade.transition_noise_intensity == said["inference_noise_intensity"]


def test_a_broken_grid_is_one_error_that_names_the_place(tmp_path: Path) -> None:
    def refused(change: dict[str, Any]) -> str:
        (tmp_path / "grid.yaml").write_text(yaml.safe_dump({**TINY, **change}))
        with pytest.raises(ValueError) as error:
            Grid.read(tmp_path / "grid.yaml")
        return str(error.value)

    only = {"tables": [], "expectations": []}
    assert "grid.yaml, updates" in refused({"updates": 0})
    assert "there is no row 'nobody'" in refused({"reference": "nobody"})
    assert "there is no schedule '9+9'" in refused({**only, "rows": [{**TINY["rows"][2], "schedule": "9+9"}]})
    assert "two rows have the same key" in refused({"rows": [*TINY["rows"], TINY["rows"][0]]})
    (tmp_path / "grid.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="is no grid"):
        Grid.read(tmp_path / "grid.yaml")
    with pytest.raises(FileNotFoundError, match="--grid"):
        Grid.read(tmp_path / "none.yaml")


def test_costs_are_the_passes_counted_by_hand() -> None:
    grid = Grid.read()
    low = 40 / 88  # 16 and 64 tokens, 24 of text
    rollout, own = (0 + low + 2 * low + (2 * low + 1)) / 4, (2 * low + 2) / 4
    assert row_cost(grid, grid.row("rmd")) == pytest.approx(rollout + 3 * own + 3 + 3)
    assert row_cost(grid, grid.row("rmd-0+4")) == pytest.approx(1.5 + 3 + 3 + 3)
    assert row_cost(grid, grid.row("rm-64")) == pytest.approx(low * (1.5 + 3) + 6)
    assert row_cost(grid, grid.row("own-64")) == pytest.approx(low * 10.5)
    size = grid.cascade(grid.row("rmd-0+4")).full_size
    five = DistillSettings(method="dmd2", gan_weight=0)
    assert update_cost(grid.cascade(grid.row("rmd-0+4")), five, size) == pytest.approx(10.5 + 4 * (1.5 + 1 + 3))
    dear, cheap = (snapshots(grid, grid.row(key)) for key in ("rmd-0+4", "own-64"))
    assert dear["compute"] < dear["updates"] == cheap["updates"] < cheap["compute"]
    assert dear["compute"] * 10.5 == pytest.approx(grid.updates * row_cost(grid, grid.row("rmd")), rel=0.01)


def test_a_constant_difference_has_no_interval_and_seeds_that_disagree_have_a_wide_one() -> None:
    concepts = torch.tensor([0, 0, 1, 2, 3, 3])
    values = torch.rand(6, generator=torch.Generator().manual_seed(0))
    row = {0: values, 1: values + 1}
    better = {seed: value - 0.5 for seed, value in row.items()}
    found = paired_difference(better, row, concepts)
    assert found is not None and found.seen and found.seeds == 2
    assert (found.value, found.low, found.high) == pytest.approx((-0.5, -0.5, -0.5))
    apart = paired_difference({0: values - 1, 1: values + 1}, {0: values, 1: values}, concepts)
    assert apart is not None and not apart.seen and (apart.low, apart.high) == pytest.approx((-1, 1))
    assert paired_difference({0: values, 1: values}, {2: values, 3: values}, concepts) is None
    one = paired_difference({0: values}, row, concepts)
    assert one is not None and one.seeds == 1, "what else the other was trained with has no pair"
    teacher = paired_difference({0: values}, row, concepts, untrained=True)
    assert teacher is not None and teacher.seeds == 2, "the teacher stands against each of the other's"


def test_the_interval_is_that_of_a_mean_over_concepts() -> None:
    noise = torch.randn(4000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    single = paired_difference({0: noise[:400]}, {0: torch.zeros(400)}, torch.arange(400))
    assert single is not None
    assert single.high - single.low == pytest.approx(2 * 1.96 * float(noise[:400].std()) / 20, rel=0.1)
    # Ten pictures of a concept that say the same are worth one.
    copies = noise[:400].repeat_interleave(10)
    clustered = paired_difference({0: copies}, {0: torch.zeros(4000)}, torch.arange(400).repeat_interleave(10))
    assert clustered is not None
    assert clustered.high - clustered.low == pytest.approx(single.high - single.low, rel=0.1)


def test_verdicts_say_nulls_and_single_seeds() -> None:
    better = Expectation(rows=("a", "b"), why="")
    alike = Expectation(rows=("a", "b"), claim="alike", why="")
    seen, unseen = Difference(-0.2, -0.3, -0.1, 3), Difference(-0.2, -0.5, 0.1, 3)
    assert verdict(better, seen) == "as expected"
    assert verdict(better, Difference(0.2, 0.1, 0.3, 3)) == "the opposite"
    assert verdict(better, unseen) == "no difference seen"
    assert verdict(alike, unseen) == "as expected: none seen"
    assert verdict(alike, seen) == "a difference, not expected"
    assert verdict(better, replace(seen, seeds=1)) == "as expected (one training seed)"
    assert verdict(better, None) == "not yet run"


def test_halved_pictures_do_not_take_colour_from_what_is_transparent(tmp_path: Path, folders: LabFolders) -> None:
    rgba = np.zeros((1, 4, 4, 4), np.uint8)
    rgba[0, :, 0] = (200, 100, 50, 255)  # one opaque column beside a transparent black one
    half = halved(rgba)
    assert half.shape == (1, 2, 2, 4)
    assert half[0, :, 0].tolist() == [[200, 100, 50, 128]] * 2 and not half[0, :, 1].any()
    halve_pictures(folders.data, tmp_path / "half")
    assert np.load(tmp_path / "half" / "pictures.npy").shape[1:] == (32, 32, 4)
    assert PictureSet.load(tmp_path / "half").composite(0).shape == (32, 32, 3)


def test_the_shipped_teacher_is_the_one_whose_results_are_committed() -> None:
    folder = CheckpointFolder.read(SHIPPED_TEACHER)
    assert folder.default_cascade.full_size == teacher_size(Grid.read())
    sets = json.loads((RESULTS / "sets.json").read_text())
    backbone = get_backbone(folder.backbone_name).load(SHIPPED_TEACHER, dtype=torch.float32, device="cpu")
    assert sets["teacher"] == fingerprint(backbone.component_modules()["denoiser"])


def test_an_exported_teacher_gets_the_labs_size_and_card(folders: LabFolders, tmp_path: Path) -> None:
    shutil.copytree(folders.teacher, tmp_path / "teacher")
    exported = CheckpointFolder.read(tmp_path / "teacher")
    write_cascade_json(
        tmp_path / "teacher",
        backbone="embedded",
        cascades=exported.cascades,
        default=exported.default,
        teacher=TeacherSpec(7, 2.5, folder="."),
        distillation={"training": {"minutes": 3, "step": 40, "samples": 500, "device": "a machine"}},
    )
    write_lab_card(tmp_path / "teacher", Grid(**TINY))
    cascade = CheckpointFolder.read(tmp_path / "teacher").default_cascade
    assert (len(cascade.steps), cascade.guidance_scale, cascade.full_size) == (7, 2.5, FULL)
    assert "3 minutes, 40 steps, 500 samples, on a machine" in (tmp_path / "teacher" / "README.md").read_text()
