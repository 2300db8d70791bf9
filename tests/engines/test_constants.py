"""The weights that compiled code is given: as it was compiled to read them, and back when it is unloaded."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engines.build.one import build_engine
from engines.compilers import get_compiler
from engines.compilers.base import EngineRequest
from engines.compilers.inductor.engine import CONSTANTS, save_constants, saved_constants
from engines.manifest import Manifest
from engines.spec import graph_digest
from engines.store import EngineStore
from engines.target import this_machine
from engines.weights.bank import WeightBank, storage_bytes
from engines.weights.recipes import Recipe, strides_of
from tests.engines.conftest import Net


class Kernel(nn.Module):
    """A convolution, which keeps its weights unpacked, and a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Conv2d(8, 8, 3, padding=1)
        self.matrix = nn.Linear(8, 8)

    def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
        hidden: Tensor = self.kernel(latents).movedim(1, -1) + timestep[:, None, None, None]
        return self.matrix(hidden)


def kernel_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"latents": torch.randn(2, 8, 6, 6, generator=generator), "timestep": torch.tensor([0.2, 0.7])}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """One AOTInductor engine of :class:`Kernel` whose weights lie outside, as they are."""
    torch.set_num_threads(1)
    root, module, compiler = tmp_path_factory.mktemp("shared"), Kernel().eval(), get_compiler("inductor")
    module.requires_grad_(False)
    request = EngineRequest("decoder", "8x8", module, kernel_inputs(), this_machine("cpu"), "float32", "")
    manifest = build_engine(compiler, EngineStore(root), module, compiler.plan(request))
    assert manifest.weights_mode == "shared"
    return root / manifest.key, manifest


def holders(module: nn.Module) -> list[int]:
    """How many tensors hold the memory of each parameter."""
    storages = [parameter.untyped_storage() for parameter in module.parameters()]
    return [torch._C._storage_Use_Count(storage._cdata) for storage in storages]


def test_an_unloaded_engine_gives_its_weights_back(shared: tuple[Path, Manifest]) -> None:
    """The loader keeps a reference to each for ever: what it points at has to go all the same."""
    module = Kernel().eval().requires_grad_(False)
    before = holders(module)
    bank = WeightBank(module)
    for _ in range(3):
        engine = get_compiler("inductor").load(shared[1], shared[0], bank)
        assert torch.allclose(engine.run(kernel_inputs()), module(**kernel_inputs()), atol=1e-5)
        engine.unload()
    bank.close()
    del bank
    gc.collect()
    assert holders(module) == before, "only the network holds them"
    assert module(**kernel_inputs()).isfinite().all()


def test_packed_copies_go_with_the_last_engine_that_reads_them(compiled: tuple[Path, Manifest], net: nn.Module) -> None:
    root, manifest = compiled
    bank, compiler = WeightBank(net), get_compiler("inductor")
    plain = bank.memory()
    first, second = (compiler.load(manifest, root / manifest.key, bank) for _ in range(2))
    made = list(bank._made.values())
    assert bank.memory() > plain and made
    first.unload()
    assert all(tensor.numel() for tensor in made), "the second still reads them"
    second.unload()
    assert storage_bytes(made) == 0 and bank.memory() == plain


@pytest.mark.parametrize("channels_last", [True, False])
def test_weights_that_lie_otherwise_are_read_right(shared: tuple[Path, Manifest], channels_last: bool) -> None:
    module = Kernel().eval().requires_grad_(False)
    if channels_last:
        module.to(memory_format=torch.channels_last)
    else:
        module.matrix.weight.data = module.matrix.weight.t().contiguous().t()
    bank = WeightBank(module)
    engine = get_compiler("inductor").load(shared[1], shared[0], bank)
    expected = module(**kernel_inputs())
    assert torch.allclose(engine.run(kernel_inputs()), expected, atol=1e-5)
    other = Kernel().eval().requires_grad_(False)
    engine.refit(dict(other.named_parameters()))
    assert torch.allclose(engine.run(kernel_inputs()), other(**kernel_inputs()), atol=1e-5)


def test_a_recipe_holds_strides(tmp_path: Path) -> None:
    weight = torch.randn(6, 4)
    other_way = Recipe(("w",), strides=(1, 6))
    made = other_way.make({"w": weight})
    assert torch.equal(made, weight) and made.stride() == (1, 6)
    assert other_way.make({"w": made}) is made and Recipe(("w",)).make({"w": weight}) is weight
    assert Recipe.from_dict(other_way.to_dict()) == other_way
    row = torch.empty_strided((1, 4), (99, 1))
    assert strides_of(row) is None, "sides of 1 are never stepped along"
    save_constants({"table": made, "plain": weight}, tmp_path)
    assert (tmp_path / CONSTANTS).is_file()
    again = saved_constants(tmp_path, torch.device("cpu"))
    assert again["table"].stride() == (1, 6) and torch.equal(again["table"], weight)
    assert again["plain"].stride() == (4, 1)


def test_what_lies_otherwise_has_another_key() -> None:
    module = Net()
    digest = graph_digest(module)
    module.up.weight.data = module.up.weight.t().contiguous().t()
    assert graph_digest(module) != digest


def test_a_copy_that_nobody_borrowed_lives_as_long_as_it_is_held(net: nn.Module) -> None:
    bank = WeightBank(net)
    made = bank.constant(Recipe(("up.weight",), "vnni", 16))
    held = weakref.ref(made)
    del made
    assert held() is None and not bank._made
