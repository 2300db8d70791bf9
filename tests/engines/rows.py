"""Rows of a component's engines, whatever the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engines.build.one import build_engine
from engines.plan.checkpoint import CheckpointPlan, load_backbone
from engines.plan.options import EngineOptions
from engines.store import EngineStore
from engines.weights.bank import WeightBank
from rmd.backbones.tiny import write_tiny_folder


def check_rows(tmp_path: Path, component: str, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold a component's engines of batches 1 and 3 to each other, with our own matrix kernels or without."""
    monkeypatch.setattr("engines.compilers.inductor.settings.own_kernels", lambda dtype, cpu: own)
    folder = write_tiny_folder("embedded", tmp_path / "embedded")
    plan = CheckpointPlan.read(folder, EngineOptions.resolve("inductor", dtype="bfloat16", buckets=(1, 2, 3))[0])
    plan = CheckpointPlan(plan.checkpoint, plan.options, load_backbone(plan.checkpoint, plan.options))
    module, store = plan.modules[component], EngineStore(tmp_path / "store")
    full = None if component == "text_encoder" else max(plan.sizes)
    inputs = plan.typical_inputs(component, full, 3)
    outputs: list[Tensor] = []
    for batch in (1, 3):
        manifest = build_engine(plan.compiler, store, module, plan.spec(component, full, batch))
        if component == "denoiser":
            assert manifest.weights_mode == "packed" and not manifest.note
            assert any(recipe["layout"] == "vnni" for recipe in manifest.constants.values()) <= own
        engine = plan.compiler.load(manifest, store.folder(manifest.key), WeightBank(module))
        rows = [{name: value[i : i + batch] for name, value in inputs.items()} for i in range(0, 3, batch)]
        outputs.append(torch.cat([engine.run(row) for row in rows]))
    assert torch.equal(*outputs)
