"""One interface over all compilers: plan, build, load."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from engines.compilers.engine import Engine
from engines.errors import EngineError
from engines.manifest import Manifest
from engines.sources import code_digest
from engines.spec import EngineSpec, TensorSpec, WeightsMode, graph_digest
from engines.target import Target, package_version
from engines.weights.bank import WeightBank


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do on a device kind of this machine.

    Attributes:
        available: it can build here.
        reason: why not, else "".
        static_shapes: engines take exactly their batch; False means that any number of rows runs.
        profiles: one engine serves several batches; otherwise there is one engine a batch.
        parallel: several builds may run at once.
    """

    available: bool
    reason: str = ""
    static_shapes: bool = True
    profiles: bool = False
    parallel: bool = True


@dataclass(frozen=True)
class EngineRequest:
    """What to plan an engine from.

    Attributes:
        component: such as "denoiser".
        size: in pixels as text, or None.
        module: the component; may lie on the meta device.
        inputs: example inputs of the widest batch to plan for, on any device; only shapes and dtypes count.
        target: the machine.
        dtype: of the weights, such as "bfloat16".
        weights: digest of the weights' files, used where they go into the engine.
        batches: all batches to plan for, where one engine is to serve several; empty: the inputs' own.
    """

    component: str
    size: str | None
    module: nn.Module
    inputs: Mapping[str, Tensor]
    target: Target
    dtype: str
    weights: str
    batches: tuple[int, ...] = ()


class Compiler(ABC):
    """One backend."""

    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ("torch", "diffusers", "transformers")
    """Distributions whose versions are part of the key: masks and attention of the text encoders are transformers'."""
    sources: ClassVar[tuple[str, ...]]
    """Modules of this project whose code shapes an engine; a digest of them is part of the key."""

    @abstractmethod
    def capabilities(self, device: str) -> Capabilities:
        """What it can do for device kind ``device`` ("cpu" or "cuda") on this machine. Never raises."""

    def on_the_spot(self, device: str) -> bool:
        """Whether its engines on ``device`` are made where they are loaded, with no need for a store of built ones."""
        return False

    def text_in_one_batch(self, spec: EngineSpec) -> bool:
        """Whether a text encoder needs one engine for all numbers of prompts, since its products round otherwise at
        another batch, and a picture would depend on who shares it.

        Args:
            spec: of its engine at any batch.
        """
        return False

    @abstractmethod
    def settings(self, request: EngineRequest) -> dict[str, str | int | float | bool]:
        """Every setting that touches the engine, with its value."""

    @abstractmethod
    def weights_mode(self, request: EngineRequest) -> WeightsMode:
        """How this engine is to hold its weights."""

    def plan(self, request: EngineRequest) -> EngineSpec:
        """The spec, and with it the key, of the engine that would be built. Reads and writes nothing."""
        mode = self.weights_mode(request)
        batches = {tensor.shape[0] for tensor in request.inputs.values()}
        if len(batches) != 1:
            raise EngineError(f"inputs of {request.component!r} disagree about the batch: {sorted(batches)}")
        widest = batches.pop()
        wanted = tuple(sorted(set(request.batches))) or (widest,)
        if wanted[-1] != widest:
            raise EngineError(f"inputs of {request.component!r} have batch {widest}, the widest profile {wanted[-1]}")
        return EngineSpec(
            component=request.component,
            size=request.size,
            batches=wanted,
            dtype=request.dtype,
            backend=self.name,
            weights_mode=mode,
            inputs=tuple(TensorSpec.of(name, tensor) for name, tensor in request.inputs.items()),
            graph=graph_digest(request.module),
            target=request.target,
            versions={name: package_version(name) for name in self.packages},
            settings=self.settings(request),
            weights=request.weights if mode.inside else None,
            code=code_digest(self.sources),
        )

    @abstractmethod
    def build(self, module: nn.Module, spec: EngineSpec, folder: Path) -> Manifest:
        """Write the engine's files into ``folder``, which the store has made and will publish whole or drop.

        Args:
            module: the component with its real weights, on the target's device.
            spec: from :meth:`plan`.
            folder: empty.

        Raises:
            EngineError: it cannot be compiled whole; the message names the operators or the reason.
        """

    def refitted(self, manifest: Manifest, built: Path, module: nn.Module, spec: EngineSpec, folder: Path) -> Manifest:
        """As :meth:`build`, from an engine that differs in its weights alone: in seconds where compiling takes minutes.

        Args:
            manifest, built: that engine and the folder of its files, which stay as they are.
            module, spec, folder: as for :meth:`build`.

        Raises:
            EngineError: it does not take these weights.
        """
        raise EngineError(f"{self.name} engines are built anew for other weights")

    @abstractmethod
    def load(self, manifest: Manifest, folder: Path, weights: WeightBank) -> Engine:
        """Load a built engine.

        Args:
            manifest: of the engine; the store has checked it and its files.
            folder: of its files.
            weights: the component's weights.
        """
