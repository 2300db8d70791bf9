from __future__ import annotations

import pytest
import torch
from torch import nn

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
