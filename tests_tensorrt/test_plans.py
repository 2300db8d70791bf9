"""Every denoiser and decoder becomes one TensorRT-RTX plan: one block, no operator left to eager execution."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from engines.compilers import get_compiler
from engines.compilers.base import EngineRequest
from engines.compilers.tensorrt.engine import PLAN
from engines.errors import EngineError
from engines.manifest import Manifest
from engines.store import EngineStore
from engines.target import Target, package_version
from rmd.backbones.base import Backbone
from rmd.backbones.registry import get_backbone
from rmd.backbones.tiny import TINY_BACKBONES, tiny_config, tiny_sizes
from rmd.size import Size

ROOT = Path(__file__).parent.parent
A100 = Target("cuda", "linux-x86_64", "", "8.0", "13.0", "580")
TINY = sorted(set(TINY_BACKBONES) - {"wan-14b"})  # the same classes as wan-1.3b


def build(
    backbone: Backbone, component: str, size: Size | None, store: EngineStore, batches: tuple[int, ...] = (1, 2, 4)
) -> Manifest:
    compiler = get_compiler("tensorrt_rtx")
    module = backbone.component_modules()[component].requires_grad_(False)
    inputs = backbone.example_inputs(component, size, max(batches))
    text = None if size is None else str(size)
    request = EngineRequest(component, text, module, inputs, A100, "bfloat16", "digest", batches)
    spec = compiler.plan(request)
    return store.build(spec.key, lambda folder: compiler.build(module, spec, folder))


def is_whole(folder: Path) -> bool:
    return (folder / "transformer").is_dir()


def check(manifest: Manifest, module: nn.Module, store: EngineStore) -> None:
    plan = (store.folder(manifest.key) / PLAN).read_bytes()
    assert len(plan) == manifest.files[PLAN].bytes > 10_000
    assert manifest.spec.settings["attn_bias_is_causal"] is False
    assert dict(manifest.spec.versions)["tensorrt-rtx-cu13-libs"] == package_version("tensorrt-rtx-cu13-libs") != ""
    assert json.loads(manifest.to_json())["weights_mode"] == "embedded"
    # The plan's weights by the names under which a refittable plan would take new ones.
    assert manifest.constants
    known = {name for name, _ in [*module.named_parameters(), *module.named_buffers()]}
    assert {source for recipe in manifest.constants.values() for source in recipe["sources"]} <= known


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_denoiser_is_one_block_with_a_profile_a_batch(name: str, tmp_path: Path, profiles: list[int]) -> None:
    backbone = get_backbone(name).from_config(tiny_config(name))
    store = EngineStore(tmp_path)
    sizes = tiny_sizes(name)
    for size in sizes:
        check(build(backbone, "denoiser", size, store), backbone.component_modules()["denoiser"], store)
    assert profiles == [3] * len(sizes)


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_denoiser_of_one_batch_is_static(name: str, tmp_path: Path, profiles: list[int]) -> None:
    backbone = get_backbone(name).from_config(tiny_config(name))
    store = EngineStore(tmp_path)
    manifest = build(backbone, "denoiser", tiny_sizes(name)[0], store, batches=(2,))
    check(manifest, backbone.component_modules()["denoiser"], store)
    assert profiles == [0]


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_decoder_is_one_block(name: str, tmp_path: Path) -> None:
    backbone = get_backbone(name).from_config(tiny_config(name))
    store = EngineStore(tmp_path)
    manifest = build(backbone, "decoder", tiny_sizes(name)[0], store, batches=(1, 4))
    check(manifest, backbone.component_modules()["decoder"], store)


@pytest.mark.parametrize("name", TINY)
def test_tiny_text_encoders_are_one_block(name: str, tmp_path: Path) -> None:
    backbone = get_backbone(name).from_config(tiny_config(name))
    store = EngineStore(tmp_path)
    for component, module in backbone.component_modules().items():
        if component not in ("denoiser", "decoder"):
            check(build(backbone, component, None, store, batches=(1, 4)), module, store)


def test_the_embedded_model_is_one_block_a_component(tmp_path: Path) -> None:
    # Teacher and student are the same networks with other weights; one is enough, and the teacher comes first.
    folder = next(
        path for path in (ROOT / "models" / name for name in ("embedded", "embedded-teacher")) if is_whole(path)
    )
    backbone = get_backbone("embedded").load(folder)
    store = EngineStore(tmp_path)
    for component, size in (("denoiser", Size(128, 128)), ("denoiser", Size(256, 256)), ("decoder", Size(256, 256))):
        check(build(backbone, component, size, store), backbone.component_modules()[component], store)


def test_an_operator_without_a_converter_is_an_error_and_no_fallback(tmp_path: Path) -> None:
    class Sorts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, latents: torch.Tensor) -> torch.Tensor:
            return torch.linalg.qr(self.linear(latents))[0]

    compiler = get_compiler("tensorrt_rtx")
    module = Sorts().eval().requires_grad_(False)
    spec = compiler.plan(
        EngineRequest("denoiser", None, module, {"latents": torch.randn(2, 8, 8)}, A100, "float32", "")
    )
    store = EngineStore(tmp_path)
    with pytest.raises(EngineError, match="as one block"):
        store.build(spec.key, lambda folder: compiler.build(module, spec, folder))
    assert store.keys() == []


def test_a_plan_for_another_gpu_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    backbone = get_backbone("sd3").from_config(tiny_config("sd3"))
    store = EngineStore(tmp_path)
    manifest = build(backbone, "denoiser", tiny_sizes("sd3")[0], store, batches=(1,))
    with pytest.raises(EngineError, match=r"GPU compute capability 8.0, here 9.0.*rmd build"):
        store.check(manifest, replace(A100, compute_capability="9.0"), "rmd build")
