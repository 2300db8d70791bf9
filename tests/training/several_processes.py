"""What `test_processes.py` starts on each process: short runs, whose gradients and weights they write down."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from tests.training.distil_setup import make_trainer
from training.distill.optimizer import MasterAdamW
from training.runtime.processes import processes
from training.runtime.sharding import whole


def gradients(optimizer: MasterAdamW, found: dict[str, torch.Tensor], role: str) -> None:
    """Have the optimiser's first step write down, whole, what it steps by."""
    step = optimizer.adamw.step

    def watched() -> None:
        for name, master in zip(optimizer.names, optimizer.masters, strict=True):
            if master.grad is not None:
                found.setdefault(f"{role}.{name}", whole(master.grad).clone())
        step()

    optimizer.adamw.step = watched  # type: ignore[method-assign, assignment]


def run_once(run: Path, options: dict[str, Any], resume: bool = False) -> None:
    """One run, or one that goes on."""
    run.mkdir(parents=True, exist_ok=True)
    accelerator = processes("cpu")
    trainer = make_trainer(run, accelerator=accelerator, **options)
    if resume:
        assert trainer.resume()
    found: dict[str, torch.Tensor] = {}
    gradients(trainer.student_optimizer, found, "student")
    gradients(trainer.fake_optimizer, found, "fake")
    assert trainer.train()
    assert isinstance(next(trainer.networks.student.parameters()), DTensor) == trainer.settings.sharding
    state = trainer.student_optimizer.master_state()
    weights = {
        **{f"student.{name}": whole(value) for name, value in state.items()},
        **{f"fake.{name}": whole(value) for name, value in trainer.fake_optimizer.master_state().items()},
        **{f"ema.{name}": whole(value) for name, value in trainer.ema.state(state).items()},
    }
    rank = accelerator.process_index
    save_file({k: v.contiguous().clone() for k, v in found.items()}, run / f"gradients-{rank}.safetensors")
    save_file({k: v.contiguous().clone() for k, v in weights.items()}, run / f"weights-{rank}.safetensors")


if __name__ == "__main__":
    for folder, wanted, goes_on in json.loads(sys.argv[1]):
        run_once(Path(folder), wanted, goes_on)
