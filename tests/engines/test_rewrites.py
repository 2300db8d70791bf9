"""The networks that are compiled in place of the embedded denoisers: the same result from the same parameters."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from engines.build.one import build_engine
from engines.compilers import get_compiler
from engines.compilers.base import EngineRequest
from engines.compilers.inductor.attention import Attention, attention_by_products, fused_attention
from engines.compilers.inductor.joined_sd3 import gelu_tanh
from engines.compilers.inductor.rewrites import rewrite, rewriting
from engines.store import EngineStore
from engines.target import this_machine
from engines.weights.bank import WeightBank


def sd3(**overrides: object) -> nn.Module:
    from diffusers import SD3Transformer2DModel

    from rmd.backbones.wrappers import SD3Denoiser

    config: dict[str, object] = {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3,
        "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 24, "caption_projection_dim": 32, "pooled_projection_dim": 24,
        "pos_embed_max_size": 8,
    }  # fmt: skip
    return SD3Denoiser(SD3Transformer2DModel(**{**config, **overrides})).eval().requires_grad_(False)


@pytest.mark.parametrize("attend", [fused_attention, attention_by_products])
def test_the_joined_transformer_computes_the_same(attend: Attention) -> None:
    module = sd3()
    inputs = {
        "latents": torch.randn(2, 4, 6, 8),
        "timestep": torch.tensor([20.0, 700.0]),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "pooled_projections": torch.randn(2, 24),
    }
    joined = rewrite(module, inputs, attend)
    assert joined.name == rewriting(module) != ""
    expected = module(**inputs)
    assert torch.linalg.vector_norm(joined.module(**inputs) - expected) < 1e-5 * torch.linalg.vector_norm(expected)
    held = dict([*module.named_parameters(), *module.named_buffers()])
    for name, parameter in [*joined.module.named_parameters(), *joined.module.named_buffers()]:
        recipe = joined.sources[name]
        if recipe.sources:
            assert torch.equal(recipe.make(held).reshape(parameter.shape), parameter), name
        else:
            assert name == "frequencies"


def films(**overrides: object) -> nn.Module:
    from rmd.backbones.film_transformer import FilmTransformer
    from rmd.backbones.wrappers import FilmDenoiser

    config: dict[str, object] = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 24, "caption_projection_dim": 32, "pooled_projection_dim": 24,
        "pos_embed_max_size": 8, "max_frames": 5,
    }  # fmt: skip
    return FilmDenoiser(FilmTransformer(**{**config, **overrides})).eval().requires_grad_(False)


@pytest.mark.parametrize("frames", [1, 3])
def test_the_joined_film_transformer_computes_the_same(frames: int) -> None:
    module = films()
    module.transformer.temporal_embed.copy_(torch.randn(5, 32))
    inputs = {
        "latents": torch.randn(2, 4, frames, 6, 8),
        "timestep": torch.tensor([20.0, 700.0]),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "pooled_projections": torch.randn(2, 24),
    }
    joined = rewrite(module, inputs)
    expected = module(**inputs)
    assert joined.name == rewriting(module) != ""
    assert torch.linalg.vector_norm(joined.module(**inputs) - expected) < 1e-5 * torch.linalg.vector_norm(expected)
    assert ("moments" in joined.sources) is (frames > 1)
    held = dict([*module.named_parameters(), *module.named_buffers()])
    for name, tensor in [*joined.module.named_parameters(), *joined.module.named_buffers()]:
        if joined.sources[name].sources:
            assert torch.equal(joined.sources[name].make(held).reshape(tensor.shape), tensor), name


def test_a_films_engines_are_packed_and_each_film_is_alike_at_every_batch(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    compiler, store, module = get_compiler("inductor"), EngineStore(tmp_path), films(num_layers=1)
    inputs = {
        "latents": torch.randn(2, 4, 3, 4, 4),
        "timestep": torch.tensor([20.0, 700.0]),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "pooled_projections": torch.randn(2, 24),
    }
    outputs = []
    for batch in (1, 2):
        part = {name: tensor[-batch:] for name, tensor in inputs.items()}
        request = EngineRequest("denoiser", "32x32x3", module, part, this_machine("cpu"), "float32", "")
        manifest = build_engine(compiler, store, module, compiler.plan(request))
        assert manifest.weights_mode == "packed", manifest.note
        engine = compiler.load(manifest, tmp_path / manifest.key, WeightBank(copy.deepcopy(module)))
        outputs.append(engine.run(part))
    assert torch.equal(outputs[0], outputs[1][-1:])


def test_no_product_of_the_joined_transformer_copies_its_weight_for_each_sample() -> None:
    """A linear layer on a slice becomes B products with B copies of the weight, which cannot be packed."""
    module = sd3()
    inputs = {
        "latents": torch.randn(3, 4, 8, 8),
        "timestep": torch.tensor([20.0, 700.0, 900.0]),
        "encoder_hidden_states": torch.randn(3, 5, 24),
        "pooled_projections": torch.randn(3, 24),
    }
    joined = rewrite(module, inputs).module
    program = torch.export.export(joined, (), kwargs=inputs, strict=False)
    operators = [str(node.target) for node in program.run_decompositions().graph.nodes if node.op == "call_function"]
    layers = [child for child in joined.modules() if isinstance(child, nn.Linear)]
    assert operators.count("aten.addmm.default") == len(layers)


def test_transformers_with_further_parts_are_left_alone() -> None:
    module = sd3(qk_norm="rms_norm")
    assert rewrite(module, {}).module is module and rewriting(module) == ""
    assert rewriting(sd3(dual_attention_layers=(0,))) == ""


def test_gelu_equals_its_tanh_form() -> None:
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    assert (gelu_tanh(x) - nn.functional.gelu(x, approximate="tanh")).abs().max() < 1e-12
