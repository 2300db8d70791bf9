"""New weights for TensorRT's plans, as far as that shows without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from engines.compilers.exported import used_tensors
from engines.compilers.tensorrt import refit as tensorrt_refit
from engines.compilers.tensorrt.engine import TensorRTEngine
from engines.compilers.tensorrt.refit import WeightIndex, read_rest, refit_plan, save_rest
from engines.errors import EngineError
from engines.manifest import Manifest
from engines.spec import WeightsMode
from engines.weights.recipes import Recipe, lay_out
from tests.engines.conftest import Net, net_spec


def test_a_plans_weights_are_traced_by_value_alone() -> None:
    weights = {"a": torch.zeros(8), "b": torch.zeros(8), "c": torch.randn(8), "table": torch.randn(3, 8)}
    index = WeightIndex(weights)
    assert index.only_recipe(torch.zeros(8)) is None
    assert index.only_recipe(weights["c"].clone()) == Recipe(("c",))
    assert index.only_recipe(weights["table"][None]) == Recipe(("table",)), "sides of 1 do not matter to a plan"


def test_a_plan_takes_no_new_value_for_a_parameter_whose_place_is_not_known(net: nn.Module, tmp_path: Path) -> None:
    spec, held = net_spec(net, "tensorrt"), dict(net.named_parameters())
    constants = {name: Recipe((name,)).to_dict() for name in ("up.weight", "down.weight", "down.bias")}
    save_rest(tmp_path, {"norm": torch.ones(1)}, {"up.bias": held["up.bias"]})
    engine = TensorRTEngine.__new__(TensorRTEngine)  # without a GPU there is no plan to load
    engine.manifest = Manifest(spec, {}, spec.inputs, spec.inputs[0], WeightsMode.REFITTABLE, constants=constants)
    engine._plan = SimpleNamespace(folder=tmp_path)  # type: ignore[assignment]
    other = dict(Net(seed=7).named_parameters())
    engine.check_refit({**other, "up.bias": held["up.bias"].clone()})
    with pytest.raises(EngineError, match=r"'up.bias' changes \(1 in all\).*build the engine again"):
        engine.check_refit({**other, "up.bias": held["up.bias"] + 1})
    assert read_rest(tmp_path).keys() == {"norm"}
    program = torch.export.export(Unused(), (torch.ones(1, 4),))
    assert used_tensors(program) == ["used.weight", "shift"]


class Unused(nn.Module):
    """Holds more than it computes with."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(4, 2, bias=False), nn.Linear(4, 2)
        self.pooler = nn.Linear(2, 2)
        self.register_buffer("shift", torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.used(x) + self.shift
        torch.tanh(self.pooler(hidden))  # of which nobody asks
        return hidden


def test_weights_are_compared_only_where_they_may_be_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of recorded weights against thousands of parameters, each a wait for the device, took minutes."""
    held = {str(index): torch.randn(4, 6) for index in range(30)} | {f"zero {index}": torch.zeros(4) for index in "abc"}
    index, find, compared = WeightIndex(held), tensorrt_refit.find_recipe, []

    def counted(*arguments: Any) -> Recipe | None:
        compared.append(arguments)
        return find(*arguments)

    monkeypatch.setattr(tensorrt_refit, "find_recipe", counted)
    for name in map(str, range(30)):
        assert index.only_recipe(held[name].t()) == Recipe((name,), "transposed", strides=(1, 6))
    assert index.only_recipe(lay_out(held["3"], "blocked", 4)) == Recipe(("3",), "blocked", 4)
    assert index.only_recipe(torch.zeros(4)) is None
    assert len(compared) == 30 + 1 + 2


class Library:
    """The part of TensorRT that a refit speaks to. Like the real one it knows no weight that the builder folded away,
    and refuses a name that it does not know."""

    TensorLocation = SimpleNamespace(HOST="host")
    float32, int64, bool = "FLOAT", "INT64", "BOOL"
    Weights = staticmethod(lambda kind, address, count: (kind, address, count))

    def __init__(self, known: Sequence[str]) -> None:
        self.known, self.given = set(known), dict[str, tuple[str, int, int]]()

    def get_all_weights(self) -> list[str]:
        return sorted(self.known)

    def set_named_weights(self, name: str, weights: tuple[str, int, int], location: str) -> bool:
        if name not in self.known or location != "host":
            return False
        self.given[name] = weights
        return True

    def get_missing_weights(self) -> list[str]:
        return sorted(self.known - self.given.keys())

    def refit_cuda_engine(self) -> bool:
        return True


def test_what_the_builder_folded_away_is_no_weight_of_the_plan() -> None:
    plan = Library(["kernel", "ids", "padded", "scale"])
    made = {
        "kernel": torch.ones(2, 3),
        "folded": torch.ones(3),
        "ids": torch.arange(4),
        "padded": torch.tensor([True, False]),
        "scale": torch.ones((), dtype=torch.float64),
        "odd": torch.ones(1, dtype=torch.complex64),
    }
    refit_plan(plan, plan, made, "denoiser")
    assert {name: (kind, count) for name, (kind, _, count) in plan.given.items()} == {
        "kernel": ("FLOAT", 6), "ids": ("INT64", 4), "padded": ("BOOL", 2), "scale": ("FLOAT", 1),
    }  # fmt: skip
    assert plan.given["kernel"][1] == made["kernel"].data_ptr()


def test_a_plan_that_lacks_a_weight_is_not_refitted() -> None:
    plan = Library(["kernel", "bias"])
    with pytest.raises(EngineError, match="refit of denoiser lacks 'bias'; build the engine again"):
        refit_plan(plan, plan, {"kernel": torch.ones(2)}, "denoiser")
    odd = Library(["odd"])
    with pytest.raises(EngineError, match=r"TensorRT holds no torch\.complex64, which 'odd' is"):
        refit_plan(odd, odd, {"odd": torch.ones(1, dtype=torch.complex64)}, "denoiser")
