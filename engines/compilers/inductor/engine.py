"""A loaded package, and the files beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines.compilers.engine import Engine, EngineMemory
from engines.compilers.inductor.streams import StreamedCode
from engines.errors import EngineError, EngineMismatch
from engines.manifest import Manifest
from engines.tracks import Track
from engines.weights.bank import WeightBank, hollow
from engines.weights.recipes import Recipe, strides_of

# Read by the compiled code at its first run: without it wrong shapes are read as if they were right.
os.environ.setdefault("AOTI_RUNTIME_CHECK_INPUTS", "1")

PACKAGE = "engine.pt2"
CONSTANTS = "constants.safetensors"
# As AOTInductor's metadata names CPU extensions, against the names of /proc/cpuinfo.
_EXTENSIONS = {
    "AVX2": "avx2",
    "AVX512": "avx512f",
    "AVX512_VNNI": "avx512_vnni",
    "AVX512_BF16": "avx512_bf16",
    "AMX_TILE": "amx_tile",
    "AMX_FP16": "amx_fp16",
}


class InductorEngine(Engine):
    """A loaded package whose constants point into the weight bank."""

    def __init__(self, manifest: Manifest, folder: Path, weights: WeightBank) -> None:
        super().__init__(manifest)
        self._code: StreamedCode | PackagedCode | None = _load(manifest, folder)
        _check_extensions(self._code.get_metadata(), manifest)
        self._weights = weights
        self._borrowed: list[Recipe] = []
        self._inside = saved_constants(folder, self.device)
        self._private = sum(tensor.nbytes for tensor in self._inside.values()) + manifest.bytes
        # The code keeps pointers only: these tensors must live as long as it does.
        self._constants: dict[str, Tensor] = dict(self._inside)
        try:
            for name, entry in manifest.constants.items():
                recipe = Recipe.from_dict(entry)
                self._constants[name] = weights.lend(recipe)
                self._borrowed.append(recipe)
            self._code.load_constants(self._constants)
        except BaseException:
            self.unload()
            raise

    def takes_tracks(self, count: int) -> bool:
        """See :meth:`Engine.takes_tracks`: where it runs in streams that they can share."""
        return isinstance(self._code, StreamedCode) and self._code.takes_tracks(count)

    def _run(self, inputs: Sequence[Tensor]) -> Tensor:
        if self._code is None:
            raise EngineError(f"engine {self.manifest.spec.title} was unloaded")
        with torch.inference_mode():
            return self._code.run([_plain(tensor) for tensor in inputs])

    def _run_on(self, track: Track, inputs: Sequence[Tensor]) -> Tensor:
        if not isinstance(self._code, StreamedCode):
            return super()._run_on(track, inputs)
        with torch.inference_mode():
            return self._code.run([_plain(tensor) for tensor in inputs], track)

    def refit(self, state: Mapping[str, Tensor]) -> None:
        """In place in the bank: every engine of the component follows."""
        self._weights.refit(state)

    def memory(self) -> EngineMemory:
        """The package, and the bank it shares."""
        return EngineMemory(self._private, self._weights.memory())

    def unload(self) -> None:
        """See :meth:`Engine.unload`. What it borrowed is freed with the last borrower, parameters with their bank."""
        self._code = None
        self._constants = {}
        for recipe in self._borrowed:
            self._weights.take_back(recipe)
        for tensor in self._inside.values():
            hollow(tensor)
        self._borrowed, self._inside = [], {}


class PackagedCode:
    """A package's machine code, by torch's own binding."""

    def __init__(self, package: Path, device: str) -> None:
        self._loader: Any = load_package(package, device)

    def get_metadata(self) -> Mapping[str, str]:
        """What AOTInductor noted of the machine it compiled for."""
        noted: Mapping[str, str] = self._loader.get_metadata()
        return noted

    def load_constants(self, constants: Mapping[str, Tensor]) -> None:
        """Read the constants from where they lie: they must live as long as this does."""
        self._loader.load_constants(dict(constants), False, True, True)

    def run(self, inputs: Sequence[Tensor]) -> Tensor:
        """The one output."""
        # boxed_run, not the package's __call__: that one parses the call's tree specification anew each time.
        outputs: list[Tensor] = self._loader.boxed_run(list(inputs))
        return outputs[0]


def _load(manifest: Manifest, folder: Path) -> StreamedCode | PackagedCode:
    if manifest.streams > 1:
        return StreamedCode(folder / PACKAGE, manifest.streams, int(manifest.spec.settings["threads"]))
    return PackagedCode(folder / PACKAGE, manifest.spec.target.device)


def _plain(tensor: Tensor) -> Tensor:
    """The tensor with its shape's own strides: `contiguous()` leaves those of dimensions of size 1 as they are, such as
    the batch's of one row of a wider tensor, and compiled code compares them."""
    tensor = tensor.contiguous()
    strides, step = [], 1
    for size in reversed(tensor.shape):
        strides.append(step)
        step *= size
    return tensor.as_strided(tensor.shape, strides[::-1])


def save_constants(constants: Mapping[str, Tensor], folder: Path) -> None:
    """Keep constants that are no weights beside the package, with the strides that the code was compiled for."""
    from safetensors.torch import save_file

    if constants:
        held = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in constants.items()}
        strides = {name: json.dumps(list(strides_of(tensor) or ())) for name, tensor in constants.items()}
        save_file(held, folder / CONSTANTS, metadata=strides)


def saved_constants(folder: Path, device: torch.device) -> dict[str, Tensor]:
    """What :func:`save_constants` kept."""
    from safetensors import safe_open

    if not (folder / CONSTANTS).is_file():
        return {}
    with safe_open(folder / CONSTANTS, "pt", device=str(device)) as file:
        strides = file.metadata() or {}
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  -- it is no mapping
    own = {name: Recipe((name,), strides=tuple(json.loads(strides.get(name, "[]"))) or None) for name in held}
    return {name: recipe.make(held) for name, recipe in own.items()}


def load_package(path: Path, device: str = "cpu") -> Any:
    """The package's code, its constants not yet given.

    What ``torch._inductor.aoti_load_package`` makes, without the second in which that compiles programs to learn this
    processor's extensions: :func:`_check_extensions` knows them.
    """
    # On CUDA each run would otherwise ask for an event of the one before, which is forbidden while a graph is recorded.
    # Engines are run by one thread anyway.
    single = device == "cuda"
    return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", single, 1, -1)


def _check_extensions(metadata: Mapping[str, str], manifest: Manifest) -> None:
    if manifest.spec.target.device != "cpu":
        return
    from engines.target import this_machine

    here = this_machine("cpu").instruction_set.split()
    used = [_EXTENSIONS.get(name) for name in metadata.get("AOTI_CPU_ISA", "").split()]
    lacking = sorted(name for name in used if name and name not in here)
    if lacking and manifest.spec.target.platform.endswith("x86_64"):
        raise EngineMismatch(
            f"engine {manifest.spec.title} uses CPU instructions {' '.join(lacking)}, which this CPU lacks; "
            f"build it on this machine (rmd build)"
        )
