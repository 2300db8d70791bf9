"""Several processes, as a launcher starts them: equal weights, unequal noise, one set of records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from training.runtime.processes import processes

WORKER = """
import hashlib, json, sys
from pathlib import Path
from tests.training.distil_setup import make_trainer
from training.runtime.processes import processes

run = Path(sys.argv[1])
accelerator = processes("cpu")
trainer = make_trainer(run, accelerator=accelerator, iterations=2, save_every=1)
assert trainer.train()
weights = {**trainer.student_optimizer.master_state(), **trainer.fake_optimizer.master_state()}
digest = hashlib.sha256(b"".join(weight.numpy().tobytes() for weight in weights.values())).hexdigest()
said = {"weights": digest, "noise": float(trainer.random.normal((1,))), "of": accelerator.num_processes}
(run / f"rank-{accelerator.process_index}.json").write_text(json.dumps(said))
"""


def test_two_processes_share_their_gradients_and_not_their_noise(tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(worker)]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [*command, str(tmp_path)],
        cwd=root, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert first["of"] == 2
    assert first["weights"] == second["weights"]
    assert first["noise"] != second["noise"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_one_numbered_device_is_no_place_for_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(ValueError, match="--device cuda:1: every process would take that one"):
        processes("cuda:1")
