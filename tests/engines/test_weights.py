from __future__ import annotations

import pytest
import torch
from torch import nn

from engines.compilers.inductor.joined_sd3 import gelu_tanh
from engines.compilers.inductor.rewrites import rewrite, rewriting
from engines.errors import EngineError
from engines.weights.bank import WeightBank
from engines.weights.recipes import Recipe, find_recipe, lay_out
from tests.engines.conftest import Net


def test_layouts_put_every_element_where_the_kernels_read_it() -> None:
    weight = torch.arange(5 * 4, dtype=torch.float32).reshape(5, 4)  # N = 5, K = 4
    blocked = lay_out(weight, "blocked", 2)
    assert blocked.shape == (3, 4, 2)
    vnni = lay_out(weight, "vnni", 2)
    for n in range(6):
        for k in range(4):
            expected = weight[n, k] if n < 5 else torch.tensor(0.0)
            assert blocked[n // 2, k, n % 2] == expected
            assert vnni.view(3, 2, 2, 2)[n // 2, k // 2, n % 2, k % 2] == expected
    with pytest.raises(ValueError, match="unknown layout"):
        lay_out(weight, "diagonal", 2)


@pytest.mark.parametrize("layout", ["plain", "transposed", "blocked", "vnni"])
def test_a_constant_is_traced_to_its_parameter_and_layout(layout: str) -> None:
    weights = {"a": torch.randn(48, 32), "b": torch.randn(48, 32), "joined": torch.randn(96, 32)}
    block = 16 if layout in ("blocked", "vnni") else 0
    sources = {"joined": Recipe(("x", "y", "z"))}
    strides = (1, 32) if layout == "transposed" else None
    assert find_recipe(lay_out(weights["b"], layout, block), weights, sources) == Recipe(
        ("b",), layout, block, strides=strides
    )
    assert find_recipe(lay_out(weights["joined"], layout, block), weights, sources) == Recipe(
        ("x", "y", "z"), layout, block, strides=strides
    )
    assert find_recipe(torch.randn(48, 32), weights, sources) is None


def test_constants_are_made_once_and_plain_ones_are_the_parameters(net: nn.Module) -> None:
    bank = WeightBank(net)
    packed = bank.constant(Recipe(("up.weight",), "vnni", 16))
    assert bank.constant(Recipe(("up.weight",), "vnni", 16)) is packed
    assert bank.constant(Recipe(("up.weight",))).data_ptr() == net.get_parameter("up.weight").data_ptr()
    plain = sum(tensor.nbytes for tensor in [*net.parameters(), *net.buffers()])
    assert bank.memory() == plain + packed.nbytes


def test_released_parameters_are_no_longer_counted(net: nn.Module) -> None:
    bank = WeightBank(net)
    recipes = [Recipe(("up.weight",), "vnni", 16), Recipe(("up.bias",))]
    kept = [bank.constant(recipe) for recipe in recipes]
    bank.release(recipes)
    assert bank.memory() == sum(tensor.nbytes for tensor in kept)
    assert bank.module is None
    assert net.get_parameter("up.weight").numel() == net.get_parameter("down.weight").numel() == 0
    assert net.get_parameter("up.bias").numel() == 64
    assert net.get_buffer("shift").numel() == 0, "position tables are hundreds of megabytes"


def test_a_table_whose_crop_is_packed_may_be_left_out_of_new_weights() -> None:
    """As SD3's positions are: the engines read the middle, and the whole table is dropped."""
    module = nn.Module()
    module.linear = nn.Linear(4, 4).requires_grad_(False)
    module.register_buffer("table", torch.randn(1, 16, 4))
    crop, other = Recipe(("table",), crop=(2, 2)), torch.randn(1, 16, 4)
    bank = WeightBank(module)
    middle = bank.constant(crop)
    before = middle.clone()
    bank.release([Recipe(("linear.weight",)), Recipe(("linear.bias",)), crop])
    assert "table" not in bank.tensors
    new = {"linear.weight": torch.ones(4, 4), "linear.bias": torch.ones(4)}
    bank.refit(new)
    assert torch.equal(middle, before) and torch.equal(module.linear.weight, new["linear.weight"])
    bank.refit({**new, "table": other})
    assert torch.equal(middle, crop.make({"table": other}))


def test_new_weights_reach_packed_joined_and_plain_constants_in_place(net: nn.Module) -> None:
    bank = WeightBank(net)
    recipes = [Recipe(("up.weight",), "blocked", 16), Recipe(("up.bias", "down.bias")), Recipe(("down.weight",))]
    held = [bank.constant(recipe) for recipe in recipes]
    addresses = [tensor.data_ptr() for tensor in held]
    bank.release(recipes)
    other = dict(Net(seed=7).named_parameters())
    bank.refit(other)
    for recipe, tensor, address in zip(recipes, held, addresses, strict=True):
        assert torch.equal(tensor, recipe.make(other)) and tensor.data_ptr() == address


def test_weights_that_do_not_fit_change_nothing(net: nn.Module) -> None:
    bank = WeightBank(net)
    packed = bank.constant(Recipe(("up.weight",), "vnni", 16))
    before = packed.clone()
    with pytest.raises(EngineError, match=r"'up.weight' has shape \(3, 3\)"):
        bank.refit({"down.weight": torch.ones(16, 64), "up.weight": torch.ones(3, 3)})
    bank.release([Recipe(("up.weight",), "vnni", 16)])
    with pytest.raises(EngineError, match=r"lack 'up.weight'"):
        bank.refit({"down.weight": torch.ones(16, 64)})
    assert torch.equal(packed, before)


def test_new_weights_must_name_every_parameter(net: nn.Module) -> None:
    bank = WeightBank(net)
    state = dict(Net(seed=7).named_parameters())
    before = net.get_parameter("up.weight").clone()
    misnamed = {name.replace("down.", "lower."): tensor for name, tensor in state.items()}
    with pytest.raises(EngineError, match=r"lack 'down.weight' \(2 in all\)"):
        bank.refit(misnamed)
    assert torch.equal(net.get_parameter("up.weight"), before)
    bank.refit(state)
    assert torch.equal(net.get_parameter("up.weight"), state["up.weight"])


def test_a_tied_parameter_may_come_under_any_of_its_names() -> None:
    tied = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)}).requires_grad_(False)
    tied["b"].weight = tied["a"].weight
    bank = WeightBank(tied)
    recipe = Recipe(("b.weight",), "blocked", 2)
    packed = bank.constant(recipe)
    new = torch.randn(4, 4)
    bank.refit({"a.weight": new})
    assert torch.equal(packed, recipe.make({"b.weight": new}))


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


def test_the_joined_transformer_computes_the_same() -> None:
    module = sd3()
    inputs = {
        "latents": torch.randn(2, 4, 6, 8),
        "timestep": torch.tensor([20.0, 700.0]),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "pooled_projections": torch.randn(2, 24),
    }
    joined = rewrite(module, inputs)
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
