"""Several processes, as a launcher starts them, against one: gradients, weights, checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.several_processes import run_once
from training.distill.batches import Batches
from training.distill.settings import DistillSettings
from training.runtime.checkpoints import checkpoints, load_checkpoint
from training.runtime.files import load_tensors
from training.runtime.processes import LostProcessError, lost_processes, processes

OPTIONS: dict[str, Any] = {"batch_size": 4, "micro_batch": 1, "iterations": 2, "clip_norm": 1000.0, "save_every": 1}


def close(first: Path, second: Path, tolerance: float) -> None:
    left, right = load_tensors(first), load_tensors(second)
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, rtol=tolerance, atol=tolerance * float(value.abs().max()))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process with all micro-batches; two that share them: whole, sharded, and sharded and resumed."""
    folder = tmp_path_factory.mktemp("runs")
    run_once(folder / "alone", OPTIONS)
    sharded = {**OPTIONS, "sharding": True, "gradient_checkpointing": True}
    scenarios = [
        (str(folder / "replicated"), OPTIONS, False),
        (str(folder / "sharded"), sharded, False),
        (str(folder / "parts"), {**sharded, "iterations": 1}, False),
        (str(folder / "parts"), sharded, True),
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*command, "-m", "tests.training.several_processes", json.dumps(scenarios)],
        cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_two_processes_give_the_gradients_of_one_with_the_same_batch(runs: Path) -> None:
    close(runs / "alone" / "gradients-0.safetensors", runs / "replicated" / "gradients-0.safetensors", 1e-5)
    first, second = (load_tensors(runs / "replicated" / f"weights-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len((runs / "replicated" / "metrics.jsonl").read_text().splitlines()) == 2


def test_sharded_networks_give_the_gradients_of_whole_ones(runs: Path) -> None:
    close(runs / "alone" / "gradients-0.safetensors", runs / "sharded" / "gradients-0.safetensors", 1e-5)


def test_a_sharded_run_resumes_to_the_bit_and_is_read_by_one_process(runs: Path) -> None:
    whole, parts = (load_tensors(runs / name / "weights-0.safetensors") for name in ("sharded", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    roles, state = load_checkpoint(checkpoints(runs / "parts" / "checkpoints")[-1])
    assert state["sharded"] == ["student", "student_optimizer", "fake", "fake_optimizer", "ema"]
    for role in ("student", "fake", "ema"):
        assert all(torch.equal(value, whole[f"{role}.{name}"]) for name, value in roles[role].items())
    assert not list(runs.rglob("*.pt")) and not list(runs.rglob(".metadata")), "safetensors only"


def test_a_batch_is_spread_evenly_or_refused() -> None:
    settings = DistillSettings(batch_size=32, micro_batch=2)
    assert Batches.of(settings, 8, 3) == Batches(size=2, count=2, first=6)
    assert Batches.of(DistillSettings(batch_size=32)) == Batches(size=32, count=1, first=0)
    with pytest.raises(ValueError, match="batch_size 32 is not to be shared evenly by 3 processes"):
        Batches.of(settings, 3)
    with pytest.raises(ValueError, match="micro_batch 5 does not divide the 16 samples"):
        Batches.of(DistillSettings(batch_size=32, micro_batch=5), 2)
    for settings_that_exclude in ({"lora_rank": 4}, {"compile": True}, {"second_moment": "8bit"}):
        with pytest.raises(ValueError, match=r"sharded|sharding"):
            DistillSettings(sharding=True, **settings_that_exclude)  # type: ignore[arg-type]


def test_a_process_that_ended_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    ended = pytest.raises(LostProcessError, match=r"another process .* has ended .*; start again with --resume")
    with ended, lost_processes("start again with --resume"):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4563")
    with pytest.raises(RuntimeError, match="shapes"), lost_processes("x"):
        raise RuntimeError("shapes differ")


def test_one_numbered_device_is_no_place_for_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(ValueError, match="--device cuda:1: every process would take that one"):
        processes("cuda:1")
