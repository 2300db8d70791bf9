"""One small network, compiled once for the whole folder, and a tiny checkpoint of real diffusers classes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engines.build.one import build_engine
from engines.compilers import get_compiler
from engines.compilers.base import EngineRequest
from engines.manifest import Manifest
from engines.spec import EngineSpec
from engines.store import EngineStore
from engines.target import this_machine


class Net(nn.Module):
    """Two matrices, their biases zero like a fresh network's, a buffer, and a setting that is no parameter."""

    def __init__(self, seed: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.scale = scale
        self.up = nn.Linear(16, 64)
        self.down = nn.Linear(64, 16)
        with torch.no_grad():
            for linear in (self.up, self.down):
                linear.weight.copy_(0.2 * torch.randn(linear.weight.shape, generator=generator))
                linear.bias.zero_()
        self.register_buffer("shift", torch.linspace(-1, 1, 16))

    def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
        hidden = torch.nn.functional.silu(self.up(latents + self.shift) + timestep[:, None, None].to(latents) / 1000)
        return self.down(hidden) * self.scale


def net_inputs(batch: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return {
        "latents": torch.randn(batch, 8, 16, generator=generator).to(dtype),
        "timestep": torch.linspace(100, 900, batch),
    }


def net_request(module: nn.Module, batch: int = 2, dtype: torch.dtype = torch.float32) -> EngineRequest:
    name = str(dtype).removeprefix("torch.")
    return EngineRequest("denoiser", "64x64", module, net_inputs(batch, dtype), this_machine("cpu"), name, "digest")


def net_spec(module: nn.Module, backend: str = "inductor", batch: int = 2) -> EngineSpec:
    return get_compiler(backend).plan(net_request(module, batch))


@pytest.fixture
def net() -> nn.Module:
    return Net().eval().requires_grad_(False)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """A store with one AOTInductor engine of :class:`Net`, batch 2; not to be changed.

    Of all workers of a run: whoever asks first builds, under the store's own lock, and the others find it built.
    """
    torch.set_num_threads(1)  # the number of threads is part of the key
    own = tmp_path_factory.getbasetemp()
    root = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "compiled"
    module = Net().eval().requires_grad_(False)
    manifest = build_engine(get_compiler("inductor"), EngineStore(root), module, net_spec(module))
    return root, manifest


@pytest.fixture
def store(compiled: tuple[Path, Manifest], tmp_path: Path) -> Iterator[tuple[EngineStore, Manifest]]:
    """A copy of :func:`compiled` to break."""
    shutil.copytree(compiled[0], tmp_path / "store")
    yield EngineStore(tmp_path / "store"), compiled[1]


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rmd.backbones.tiny import write_tiny_folder

    return write_tiny_folder("sd3", tmp_path_factory.mktemp("tiny") / "sd3")


@pytest.fixture(scope="session")
def eager_store(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from engines.build.checkpoint import build_checkpoint

    root = tmp_path_factory.mktemp("eager")
    build_checkpoint(tiny_checkpoint, root, "eager", dtype="float32", buckets=(1, 2))
    return root
