"""The reference backend: no compilation; an "engine" is the network's own module, on a GPU in CUDA graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from engines.compilers.base import Capabilities, Compiler, EngineRequest
from engines.compilers.engine import Engine, EngineMemory
from engines.compilers.examples import example_tensors
from engines.errors import EngineError
from engines.manifest import Manifest
from engines.spec import EngineSpec, TensorSpec, WeightsMode
from engines.stopwatch import Stopwatch
from engines.weights.bank import WeightBank


class EagerCompiler(Compiler):
    """Runs anywhere, on a CPU any number of rows, and is what the others are measured against."""

    name = "eager"
    sources = (
        "engines.compilers.eager",
        "engines.weights.bank",
        "engines.weights.recipes",
    )

    def capabilities(self, device: str) -> Capabilities:
        """See :meth:`Compiler.capabilities`."""
        if device == "cuda" and not torch.cuda.is_available():
            return Capabilities(False, "torch sees no CUDA device", profiles=True, parallel=False)
        # On a GPU it is replayed as a CUDA graph, which has a fixed batch.
        return Capabilities(True, static_shapes=device == "cuda", profiles=True, parallel=False)

    def on_the_spot(self, device: str) -> bool:
        """A graph is recorded in a second, and in no other process than the one that replays it."""
        return device == "cuda"

    def settings(self, request: EngineRequest) -> dict[str, str | int | float | bool]:
        """None."""
        return {}

    def weights_mode(self, request: EngineRequest) -> WeightsMode:
        """The module holds them."""
        return WeightsMode.MODULE

    def build(self, module: nn.Module, spec: EngineSpec, folder: Path) -> Manifest:
        """Runs one row through the module to learn its output's shape; writes no files."""
        watch = Stopwatch()
        inputs = example_tensors(spec, next(module.parameters()).device)
        with torch.inference_mode():
            row = TensorSpec.of("output", module(**{name: tensor[:1] for name, tensor in inputs.items()}))
        output = replace(row, shape=(spec.batch, *row.shape[1:]))
        return Manifest(spec, {}, spec.inputs, output, WeightsMode.MODULE, build_seconds=watch.seconds)

    def load(self, manifest: Manifest, folder: Path, weights: WeightBank) -> Engine:
        """See :meth:`Compiler.load`."""
        if weights.module is None:
            raise EngineError("the eager backend needs the network's module, which was released")
        return EagerEngine(manifest, weights)


class EagerEngine(Engine):
    """Calls the module under inference mode; any number of rows."""

    def __init__(self, manifest: Manifest, weights: WeightBank, batch: int | None = None) -> None:
        super().__init__(manifest, batch)
        self._weights = weights
        self._module = weights.module
        parameters = [] if self._module is None else list(self._module.parameters())
        self._ends = [parameters[0], parameters[-1]] if parameters else []

    def at(self, batch: int) -> Engine:
        """See :meth:`Engine.at`."""
        if batch == self.batch or batch not in self.manifest.spec.batches:
            return super().at(batch)
        return EagerEngine(self.manifest, self._weights, batch)

    @property
    def device(self) -> torch.device:
        """Where the module lies."""
        return next(iter(self._weights.tensors.values())).device

    def check_inputs(self, inputs: Mapping[str, Tensor]) -> None:
        """As :meth:`Engine.check_inputs`, but for the number of rows, which may be any as long as all inputs agree."""
        rows = {tensor.shape[0] for tensor in inputs.values()}
        if len(rows) == 1 and rows != {self.batch}:
            count = rows.pop()
            fitted = {
                name: tensor[:1].expand(self.batch, *tensor.shape[1:]) for name, tensor in inputs.items() if count
            }
            super().check_inputs(fitted)
        else:
            super().check_inputs(inputs)

    def _run(self, inputs: Sequence[Tensor]) -> Tensor:
        if self._module is None:
            raise EngineError(f"engine {self.manifest.spec.title} was unloaded")
        named = {spec.name: tensor for spec, tensor in zip(self.manifest.inputs, inputs, strict=True)}
        with torch.inference_mode():
            output: Tensor = self._module(**named)
        return output

    def refit(self, state: Mapping[str, Tensor]) -> None:
        """See :meth:`Engine.refit`."""
        self._weights.refit(state)

    def addresses(self) -> tuple[int, ...]:
        """Of the first and the last parameter: whoever moves a module moves it whole."""
        return tuple(parameter.data_ptr() for parameter in self._ends)

    def memory(self) -> EngineMemory:
        """Only the shared weights."""
        return EngineMemory(0, self._weights.memory())

    def unload(self) -> None:
        """See :meth:`Engine.unload`."""
        self._module = None
        self._ends = []
