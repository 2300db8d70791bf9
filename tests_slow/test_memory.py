"""Loading and unloading engines again and again: what is held does not grow, but for code that torch never unmaps."""

from __future__ import annotations

import gc
from pathlib import Path

import psutil
import pytest
import torch

from engines.build.checkpoint import build_checkpoint
from engines.run.executor import EngineExecutor
from rmd.backbones.tiny import write_tiny_folder
from rmd.size import Size

SIZE, LATENTS = Size(64, 64), (16, 8, 8)
ROUNDS = 10
_WARM = 3  # the first rounds also fill the allocator's own lists


def code() -> tuple[int, int]:
    """How many libraries of AOTInductor packages are mapped, and how many bytes of them are resident."""
    maps = [entry for entry in psutil.Process().memory_maps(grouped=False) if "/aotinductor_" in entry.path]
    return len({entry.path for entry in maps}), sum(entry.rss for entry in maps)


def resident() -> int:
    """Bytes of this process without the code of packages."""
    gc.collect()
    return int(psutil.Process().memory_info().rss) - code()[1]


def load_run_unload(folder: Path, store: Path) -> None:
    executor = EngineExecutor.open(folder, store, "inductor", dtype="float32", buckets=(1,))
    executor.run("decoder", SIZE, {"latents": torch.randn(1, *LATENTS)})
    executor.unload()


@pytest.mark.timeout(1800)
def test_ten_rounds_of_two_servers_hold_what_three_did(tmp_path: Path) -> None:
    """Two engines of one store, as two servers beside each other, loaded and unloaded in turn; flat to 2 %."""
    folder, store = write_tiny_folder("sd3", tmp_path / "sd3"), tmp_path / "engines"
    build_checkpoint(folder, store, "inductor", dtype="float32", buckets=(1,))
    other = write_tiny_folder("sd3", tmp_path / "other")
    held: list[int] = []
    for _ in range(ROUNDS):
        for checkpoint in (folder, other):
            load_run_unload(checkpoint, store)
        held.append(resident())
    assert max(held[_WARM:]) < 1.02 * held[_WARM - 1], [round(each / 2**20, 1) for each in held]


def test_torch_itself_keeps_the_code_of_every_package_that_it_loaded(tmp_path: Path) -> None:
    """Torch alone. Once this fails, torch unmaps packages: then `code` above, and what docs/engines.md says, can go."""
    program = torch.export.export(torch.nn.Linear(4, 4), (torch.randn(2, 4),))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "linear.pt2"))
    before = code()[0]
    for _ in range(5):
        loader = torch._C._aoti.AOTIModelPackageLoader(package, "model", False, 1, -1)
        del loader
        gc.collect()
    assert code()[0] == before + 5
