"""One interface over all compilers: plan, build, load; and over what they make: warm up, run, refit, unload."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from engines.errors import EngineError, EngineInputError
from engines.manifest import Manifest
from engines.sources import code_digest
from engines.spec import EngineSpec, TensorSpec, graph_digest
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
class EngineMemory:
    """Bytes of a loaded engine: its own, and those it shares with other engines of its component."""

    private: int
    shared: int


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


class Engine(ABC):
    """A loaded engine at one of its batches. Not safe for concurrent runs; one thread owns a device.

    Args:
        manifest: of the engine.
        batch: rows of a run, one of the manifest's batches; None: the widest.
    """

    def __init__(self, manifest: Manifest, batch: int | None = None) -> None:
        self.manifest = manifest
        self.batch = manifest.spec.batch if batch is None else batch
        self._device_type = manifest.spec.target.device
        self._names = frozenset(spec.name for spec in manifest.inputs)
        self._expected = tuple((spec.name, (self.batch, *spec.shape[1:]), spec.torch_dtype) for spec in manifest.inputs)

    def at(self, batch: int) -> Engine:
        """This engine at another of its batches; the weights are shared. Each is to be unloaded.

        Raises:
            EngineError: it has no such batch.
        """
        if batch != self.batch:
            raise EngineError(f"engine {self.manifest.spec.title} runs at batch {self.batch}, not {batch}")
        return self

    @property
    def latency_seconds(self) -> float | None:
        """The recorded median of a run, None when it was never timed."""
        return self.manifest.latency_seconds.get(self.batch)

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The network's output.

        Args:
            inputs: by name; names, shapes and dtypes as in the manifest, contiguous or not.

        Raises:
            EngineInputError: a name, shape or dtype is wrong; the message says which and what is expected.
        """
        self.check_inputs(inputs)
        return self._run([inputs[name] for name, _, _ in self._expected])

    def check_inputs(self, inputs: Mapping[str, Tensor]) -> None:
        """See :meth:`run`. Compiled code itself would read wrong shapes silently."""
        if inputs.keys() != self._names:
            missing, extra = sorted(self._names - inputs.keys()), sorted(inputs.keys() - self._names)
            said = [f"lacks {', '.join(missing)}"] if missing else []
            said += [f"does not take {', '.join(extra)}"] if extra else []
            raise EngineInputError(f"engine {self.manifest.spec.title} {' and '.join(said)}")
        for name, shape, dtype in self._expected:
            given = inputs[name]
            if given.shape != shape or given.dtype != dtype or given.device.type != self._device_type:
                raise EngineInputError(
                    f"engine {self.manifest.spec.title}: input {name!r} is {tuple(given.shape)} {given.dtype} on "
                    f"{given.device.type}, expected {shape} {dtype} on {self._device_type}"
                )

    def warmup(self, runs: int = 2) -> None:
        """Run on zeros, so that the first request pays for nothing."""
        inputs = {name: torch.zeros(shape, dtype=dtype, device=self.device) for name, shape, dtype in self._expected}
        for _ in range(runs):
            self.run(inputs)

    @property
    def device(self) -> torch.device:
        """Where inputs must lie."""
        return torch.device(self.manifest.spec.target.device)

    @abstractmethod
    def _run(self, inputs: Sequence[Tensor]) -> Tensor:
        """Runs on checked inputs in the manifest's order."""

    @abstractmethod
    def refit(self, state: Mapping[str, Tensor]) -> None:
        """Take new weights, by the component's parameter names, without being built or loaded again.

        This engine's other batches follow, and so does every engine that reads the same weight bank.

        Raises:
            EngineError: this engine cannot, or the weights do not fit.
        """

    def check_refit(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027  -- engines without weights have no say
        """Raises :class:`EngineError` where :meth:`refit` would, before anything is changed."""

    def on_refit(self) -> None:  # noqa: B027  -- most engines need not know
        """Told when the weights that this engine reads were replaced, by it or by another that shares them."""

    def addresses(self) -> tuple[int, ...]:
        """Where weights lie that may be moved behind this engine's back: a recording of it is of no use once these
        are others."""
        return ()

    @abstractmethod
    def memory(self) -> EngineMemory:
        """Bytes held; those of :attr:`~engines.manifest.Manifest.embedded_bytes` are counted as shared."""

    @abstractmethod
    def unload(self) -> None:
        """Free everything; the engine cannot run any more."""


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

    def text_in_one_batch(self, device: str) -> bool:
        """Whether a text encoder needs one engine for all numbers of prompts, since its products round otherwise at
        another batch, and a picture would depend on who shares it."""
        return False

    @abstractmethod
    def settings(self, request: EngineRequest) -> dict[str, str | int | float | bool]:
        """Every setting that touches the engine, with its value."""

    @abstractmethod
    def weights_mode(self, request: EngineRequest) -> str:
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
            weights=request.weights if mode in ("embedded", "refittable") else None,
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

    @abstractmethod
    def load(self, manifest: Manifest, folder: Path, weights: WeightBank) -> Engine:
        """Load a built engine.

        Args:
            manifest: of the engine; the store has checked it and its files.
            folder: of its files.
            weights: the component's weights.
        """


def example_tensors(spec: EngineSpec, device: torch.device | str) -> dict[str, Tensor]:
    """Inputs of a spec's shapes at its widest batch: normal noise for floating ones, 500 for timesteps, text whose
    second half is padding for masks, small numbers for token ids."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for item in spec.inputs:
        dtype = item.torch_dtype
        if item.name == "timestep":
            value = torch.full(item.shape, 500.0)
        elif dtype.is_floating_point:
            value = torch.randn(item.shape, generator=generator)
        elif "mask" in item.name:
            value = torch.ones(item.shape)
            value[..., (item.shape[-1] + 1) // 2 :] = 0
        else:
            value = torch.randint(1, 50, item.shape, generator=generator)
        made[item.name] = value.to(device, dtype)
    return made


class Stopwatch:
    """Wall-clock seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """So far."""
        return time.perf_counter() - self._start
