"""Tiny bases, and LoRAs of them as diffusers, peft and others' tools write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rmd.backbones.tiny import write_tiny_folder
from rmd.published.gathering import ImportRequest
from rmd.published.importing import Imported, import_model

PRESETS = {"sdxl": "sdxl-turbo", "sd3": "sd3", "pixart": "pixart", "wan-1.3b": "wan"}
TinyFolder = Callable[[str], Path]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> TinyFolder:
    """name -> a tiny folder of that backbone, float32; treat it as read-only."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = write_tiny_folder(name, tmp_path_factory.mktemp("base") / name)
        return made[name]

    return get


@pytest.fixture
def imported(base: TinyFolder, tmp_path: Path) -> Callable[..., Imported]:
    """Runs an import of a tiny base into tmp_path/out."""

    def run(name: str, **options: Any) -> Imported:
        options.setdefault("base", str(base(name)))
        options.setdefault("out", tmp_path / "out")
        options.setdefault("preset", PRESETS[name])
        say = options.pop("say", lambda _text: None)
        return import_model(ImportRequest(backbone=name, **options), say=say)

    return run


@pytest.fixture(scope="module")
def lora(base: TinyFolder) -> dict[str, Tensor]:
    """A diffusers LoRA of the tiny Wan; treat it as read-only."""
    config = LoraConfig(r=4, target_modules=["to_q", "to_k"])
    state = random_lora(WanTransformer3DModel.from_pretrained(base("wan-1.3b") / "transformer"), config)
    return {f"transformer.{name}": value for name, value in state.items()}


def weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a network's folder."""
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return state


def random_lora(network: nn.Module, config: LoraConfig, seed: int = 0) -> dict[str, Tensor]:
    """peft's state of a LoRA with random factors, on a network that is given away for it."""
    network.add_adapter(config, adapter_name="default")  # type: ignore[operator]
    generator = torch.Generator().manual_seed(seed)
    state: Mapping[str, Tensor] = get_peft_model_state_dict(network, adapter_name="default")
    return {name: 0.1 * torch.randn(value.shape, generator=generator) for name, value in state.items()}


def assert_equal_weights(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> None:
    """Within 1e-6 of the oracle, name by name; the oracle itself differs from the base."""
    assert found.keys() == expected.keys()
    worst = max(float((found[name] - expected[name]).abs().max()) for name in expected)
    assert worst <= 1e-6
    assert any(float((expected[name] - base[name]).abs().max()) > 1e-3 for name in expected)


def save(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file of copies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.clone().contiguous() for name, value in state.items()}, path, metadata=dict(metadata or {}))
    return path


def kohya(state: Mapping[str, Tensor], prefix: str, alphas: Sequence[float] = ()) -> dict[str, Tensor]:
    """peft's names in kohya's way, each module with its alpha where alphas are given (cycled through)."""
    made: dict[str, Tensor] = {}
    modules = dict.fromkeys(name.rsplit(".lora_", 1)[0] for name in state)
    for number, module in enumerate(modules):
        flat = prefix + module.replace(".", "_")
        made[f"{flat}.lora_down.weight"] = state[f"{module}.lora_A.weight"]
        made[f"{flat}.lora_up.weight"] = state[f"{module}.lora_B.weight"]
        if alphas:
            made[f"{flat}.alpha"] = torch.tensor(alphas[number % len(alphas)])
    return made


def closed_to_others(path: Path) -> list[Path]:
    """A file, or of a folder and all in it, what other users may not read."""
    found = [each for each in (path, *path.rglob("*")) if not each.is_symlink()]
    return [each for each in found if ~each.stat().st_mode & (0o555 if each.is_dir() else 0o444)]
