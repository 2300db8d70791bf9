"""TensorRT through torch-tensorrt: one plan per engine, the whole graph in one block or no engine at all."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from engines.compilers.base import (
    Capabilities,
    Compiler,
    Engine,
    EngineMemory,
    EngineRequest,
    Stopwatch,
    example_tensors,
)
from engines.errors import BackendUnavailable, EngineError, EngineMismatch
from engines.manifest import Manifest
from engines.spec import EngineSpec, TensorSpec
from engines.weights import Recipe, WeightBank, find_recipe

PLAN = "engine.plan"


class TensorRTCompiler(Compiler):
    """Strongly typed, static shapes; the network is in its precision before it comes here."""

    name: ClassVar[str] = "tensorrt"
    packages = ("torch", "diffusers", "torch-tensorrt", "tensorrt")
    extra: ClassVar[str] = "gpu"
    rtx: ClassVar[bool] = False

    def capabilities(self, device: str) -> Capabilities:
        """See :meth:`Compiler.capabilities`. The library is imported only when all else is in place."""
        reason = self._obstacle(device)
        return Capabilities(not reason, reason, (self._mode,), parallel=False)

    @property
    def _mode(self) -> str:
        # A refittable plan can only be built where there is a GPU, and building without one is what RTX plans are for.
        return "embedded" if self.rtx else "refittable"

    def _obstacle(self, device: str) -> str:
        if device != "cuda":
            return f"{self.name} engines run on NVIDIA GPUs, not on the {device}"
        if importlib.util.find_spec("torch_tensorrt") is None:
            return f"{self.packages[2]} is not installed (pip install 'rmd[{self.extra}]')"
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
        return _import_problem(self.rtx)

    def settings(self, request: EngineRequest) -> dict[str, str | int | float | bool]:
        """See :meth:`Compiler.settings`."""
        return {
            "require_full_compilation": True,
            "min_block_size": 1,
            "truncate_double": True,
            # True would turn a padding mask into a causal one without a word.
            "attn_bias_is_causal": False,
            "immutable_weights": self.rtx,
            "offload_module_to_cpu": True,
            # float16 products accumulate in float16 otherwise.
            "use_fp32_acc": request.dtype == "float16",
            # Older versions leave attention to eager execution unless it is taken apart.
            "decompose_attention": _version("torch") < (2, 13),
        }

    def weights_mode(self, request: EngineRequest) -> str:
        """Inside the plan."""
        return self._mode

    def build(self, module: nn.Module, spec: EngineSpec, folder: Path) -> Manifest:
        """See :meth:`Compiler.build`.

        Raises:
            EngineError: an operator has no converter, so that the graph would fall apart.
            BackendUnavailable: the library cannot be imported.
        """
        watch = Stopwatch()
        problem = _import_problem(self.rtx)
        if problem:
            raise BackendUnavailable(f"backend {self.name!r} is not available: {problem}")
        device = next(module.parameters()).device
        inputs = example_tensors(spec, device)
        with torch.no_grad():
            output = module(**inputs)
            program = torch.export.export(
                module, (), kwargs=inputs, strict=False, prefer_deferred_runtime_asserts_over_guards=True
            )
        names = [str(name) for name in program.graph_signature.user_inputs]
        with _recorded_weights() as recorded:
            try:
                plan = self._convert(program, inputs, spec)
            finally:
                # offload_module_to_cpu moves the caller's own parameters, which the exported program shares.
                module.to(device)
        (folder / PLAN).write_bytes(plan)
        held = dict([*module.named_parameters(), *module.named_buffers()])
        recipes = {name: _only_recipe(weight.to(device), held) for name, weight in recorded.items()}
        by_name = {item.name: item for item in spec.inputs}
        return Manifest(
            spec,
            {},
            tuple(by_name[name] for name in names),
            TensorSpec.of("output", output),
            spec.weights_mode,
            constants={name: recipe.to_dict() for name, recipe in recipes.items() if recipe is not None},
            embedded_bytes=sum(tensor.nbytes for tensor in held.values()),
            build_seconds=watch.seconds,
        )

    def _convert(self, program: Any, inputs: Mapping[str, Tensor], spec: EngineSpec) -> bytes:
        dynamo = importlib.import_module("torch_tensorrt.dynamo")
        convert = dynamo.convert_exported_program_to_serialized_trt_engine
        try:
            plan = convert(program, arg_inputs=(), kwarg_inputs=dict(inputs), **spec.settings)
        except Exception as error:
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise EngineError(f"TensorRT cannot build {spec.title} as one block: {first[:300]}") from error
        return bytes(plan)

    def load(self, manifest: Manifest, folder: Path, weights: WeightBank) -> Engine:
        """See :meth:`Compiler.load`.

        Raises:
            BackendUnavailable: no GPU, or the library cannot be imported.
            EngineMismatch: the runtime refuses the plan.
        """
        problem = self._obstacle("cuda")
        if problem:
            raise BackendUnavailable(f"a {self.name} engine cannot be loaded: {problem}")
        return TensorRTEngine(manifest, folder, weights)


class TensorRTEngine(Engine):
    """A plan and its execution context, on torch's current stream."""

    def __init__(self, manifest: Manifest, folder: Path, weights: WeightBank) -> None:
        super().__init__(manifest)
        tensorrt = importlib.import_module("torch_tensorrt._TensorRTProxyModule") and importlib.import_module(
            "tensorrt"
        )
        self._tensorrt: Any = tensorrt
        self._logger = tensorrt.Logger(tensorrt.Logger.WARNING)
        self._engine = tensorrt.Runtime(self._logger).deserialize_cuda_engine((folder / PLAN).read_bytes())
        if self._engine is None:
            raise EngineMismatch(
                f"TensorRT refuses the plan of {manifest.spec.title}: it was built for another GPU or version; "
                f"build it on this machine (rmd build)"
            )
        self._weights = weights
        self._context: Any = self._engine.create_execution_context()
        modes = {name: self._engine.get_tensor_mode(name) for name in self._tensor_names()}
        self._outputs = [name for name, mode in modes.items() if mode == tensorrt.TensorIOMode.OUTPUT]
        self._inputs = [name for name, mode in modes.items() if mode == tensorrt.TensorIOMode.INPUT]
        known = {item.name for item in manifest.inputs}
        if len(self._outputs) != 1 or not set(self._inputs) <= known:
            raise EngineMismatch(f"the plan of {manifest.spec.title} takes {self._inputs}, not {sorted(known)}")

    def _tensor_names(self) -> Iterator[str]:
        for index in range(self._engine.num_io_tensors):
            yield self._engine.get_tensor_name(index)

    def _run(self, inputs: Sequence[Tensor]) -> Tensor:
        if self._context is None:
            raise EngineError(f"engine {self.manifest.spec.title} was unloaded")
        named = {
            spec.name: tensor.contiguous() for spec, tensor in zip(self.manifest.inputs, inputs, strict=True)
        }  # alive until the launch below: TensorRT gets addresses only
        spec = self.manifest.output
        output = torch.empty(spec.shape, dtype=spec.torch_dtype, device=self.device)
        for name in self._inputs:
            self._context.set_tensor_address(name, named[name].data_ptr())
        self._context.set_tensor_address(self._outputs[0], output.data_ptr())
        stream = torch.cuda.current_stream()
        for tensor in named.values():
            tensor.record_stream(stream)
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise EngineError(f"TensorRT could not run {self.manifest.spec.title}")
        return output

    def refit(self, state: Mapping[str, Tensor]) -> None:
        """See :meth:`Engine.refit`.

        Raises:
            EngineError: the plan does not take the weights, or a parameter was not told apart from an equal one when
                it was built; the old ones stay in use.
        """
        if self.manifest.weights_mode != "refittable":
            raise EngineError(
                f"engine {self.manifest.spec.title} holds its weights for good; build it for the new ones (rmd build)"
            )
        recipes = {name: Recipe.from_dict(recipe) for name, recipe in self.manifest.constants.items()}
        # TensorRT itself would keep the old values of these without a word.
        traced = {source for recipe in recipes.values() for source in recipe.sources}
        untraced = [tied[0] for tied in self._weights.parameters if traced.isdisjoint(tied)]
        if untraced:
            raise EngineError(
                f"refit of {self.manifest.spec.title} lacks {untraced[0]!r} ({len(untraced)} in all), whose place in "
                f"the plan is not known; build the engine again"
            )
        refitter = self._tensorrt.Refitter(self._engine, self._logger)
        made = {name: recipe.make(state).detach().to(self.device).contiguous() for name, recipe in recipes.items()}
        for name, tensor in made.items():
            kind = getattr(self._tensorrt, _TYPES[tensor.dtype])
            holder = self._tensorrt.Weights(kind, tensor.data_ptr(), tensor.numel())
            if not refitter.set_named_weights(name, holder, self._tensorrt.TensorLocation.DEVICE):
                raise EngineError(f"TensorRT does not take new weights for {name!r} in {self.manifest.spec.title}")
        missing = refitter.get_missing_weights()
        if missing:
            raise EngineError(f"refit of {self.manifest.spec.title} lacks {missing[0]!r}; build the engine again")
        if not refitter.refit_cuda_engine():
            raise EngineError(f"TensorRT could not refit {self.manifest.spec.title}")

    def memory(self) -> EngineMemory:
        """The plan's weights and workspace; nothing is shared."""
        workspace = int(getattr(self._engine, "device_memory_size_v2", 0)) if self._engine is not None else 0
        return EngineMemory(self.manifest.embedded_bytes + workspace, 0)

    def unload(self) -> None:
        """See :meth:`Engine.unload`."""
        self._context = None
        self._engine = None


_TYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.int32: "int32"}


@lru_cache(maxsize=2)
def _import_problem(rtx: bool) -> str:
    """Why the library cannot be used, "" when it can. torch-tensorrt and its RTX build share one module name."""
    try:
        library = importlib.import_module("torch_tensorrt")
    except Exception as error:  # a missing libnvinfer shows as any of ImportError, OSError and plain Exception
        return (
            f"torch_tensorrt cannot be imported ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        )
    is_rtx = bool(getattr(getattr(library, "ENABLED_FEATURES", None), "tensorrt_rtx", False))
    if is_rtx != rtx:
        return f"the installed torch_tensorrt is built for {'TensorRT-RTX' if is_rtx else 'TensorRT'}"
    return ""


@contextmanager
def _recorded_weights() -> Iterator[dict[str, Tensor]]:
    """The weights of the network that is converted meanwhile, by the names under which the plan can be refitted."""
    context = importlib.import_module("torch_tensorrt.dynamo.conversion._ConversionContext").ConversionContext
    original = context.record_weight
    recorded: dict[str, Tensor] = {}

    def record(self: Any, name: str, weight: Tensor) -> Any:
        if isinstance(weight, Tensor):
            recorded[name] = weight.detach()
        return original(self, name, weight)

    context.record_weight = record
    try:
        yield recorded
    finally:
        context.record_weight = original


def _only_recipe(weight: Tensor, held: Mapping[str, Tensor]) -> Recipe | None:
    """How ``weight`` comes from one of ``held``; None where several are equal (zero biases, norms of ones)."""
    found = [find_recipe(weight, {name: tensor}, {}) for name, tensor in held.items()]
    recipes = [recipe for recipe in found if recipe is not None]
    return recipes[0] if len(recipes) == 1 else None


def _version(name: str) -> tuple[int, ...]:
    from engines.target import package_version

    return tuple(int(part) for part in package_version(name).split("+")[0].split(".")[:2] if part.isdigit())
