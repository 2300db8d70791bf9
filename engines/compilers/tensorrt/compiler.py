"""TensorRT through torch-tensorrt: the whole graph in one block or no engine at all.

One plan serves all batch buckets of a component and size: each bucket is an optimisation profile whose smallest, best
and largest batch are equal, so that its kernels are chosen for that very batch, and all profiles share the plan's
weights. A plan of one bucket is static.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
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
from engines.compilers.exported import used_tensors
from engines.compilers.tensorrt.conversion import export_batches, input_ranges, profile_per_batch, recorded_weights
from engines.compilers.tensorrt.refit import WeightIndex, changed_fixed, read_rest, refit_plan, save_rest
from engines.errors import BackendUnavailable, EngineError, EngineMismatch
from engines.manifest import Manifest
from engines.spec import EngineSpec, TensorSpec
from engines.weights.bank import Recipe, WeightBank

PLAN = "engine.plan"


class TensorRTCompiler(Compiler):
    """Strongly typed, no shape but the batch varies; the network is in its precision before it comes here."""

    name: ClassVar[str] = "tensorrt"
    packages = (*Compiler.packages, "torch-tensorrt", "tensorrt")
    sources = (
        "engines.compilers.exported",
        "engines.compilers.tensorrt.compiler",
        "engines.compilers.tensorrt.conversion",
        "engines.compilers.tensorrt.refit",
        "engines.weights.bank",
    )
    extra: ClassVar[str] = "gpu"
    rtx: ClassVar[bool] = False

    def capabilities(self, device: str) -> Capabilities:
        """See :meth:`Compiler.capabilities`. The library is imported only when all else is in place."""
        reason = self._obstacle(device)
        return Capabilities(not reason, reason, profiles=True, parallel=False)

    @property
    def _mode(self) -> str:
        # A refittable plan can only be built where there is a GPU, and building without one is what RTX plans are for.
        return "embedded" if self.rtx else "refittable"

    def _obstacle(self, device: str) -> str:
        if device != "cuda":
            return f"{self.name} engines run on NVIDIA GPUs, not on the {device}"
        if importlib.util.find_spec("torch_tensorrt") is None:
            return f"{self.packages[3]} is not installed (pip install 'rmd[{self.extra}]')"
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
            "disable_tf32": request.dtype == "float32",  # its products keep 10 bits of the mantissa
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
        program = export_batches(module, inputs, spec)
        names = [str(name) for name in program.graph_signature.user_inputs]
        with recorded_weights() as recorded:
            try:
                plan = self._convert(program, inputs, spec)
            finally:
                # offload_module_to_cpu moves the caller's own parameters, which the exported program shares.
                module.to(device)
        (folder / PLAN).write_bytes(plan)
        held = dict([*module.named_parameters(), *module.named_buffers()])
        index = WeightIndex(held)
        recipes = {name: index.only_recipe(weight.to(device)) for name, weight in recorded.items()}
        traced = {source for recipe in recipes.values() if recipe is not None for source in recipe.sources}
        save_rest(
            folder,
            {name: weight for name, weight in recorded.items() if recipes[name] is None},
            {name: held[name] for name in used_tensors(program) if name in held and name not in traced},
        )
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
        convert = importlib.import_module("torch_tensorrt.dynamo").convert_exported_program_to_serialized_trt_engine
        given = dict(inputs) if len(spec.batches) == 1 else input_ranges(spec)
        try:
            with profile_per_batch(spec.batches):
                plan = convert(program, arg_inputs=(), kwarg_inputs=given, **spec.settings)
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
        return TensorRTEngine(manifest, _Plan(manifest, folder))


class _Plan:
    """A loaded plan with its weights, shared by the engines of all its batches."""

    def __init__(self, manifest: Manifest, folder: Path) -> None:
        self.folder = folder
        tensorrt = importlib.import_module("torch_tensorrt._TensorRTProxyModule") and importlib.import_module(
            "tensorrt"
        )
        self.tensorrt: Any = tensorrt
        self.logger = tensorrt.Logger(tensorrt.Logger.WARNING)
        self.engine: Any = tensorrt.Runtime(self.logger).deserialize_cuda_engine((folder / PLAN).read_bytes())
        if self.engine is None:
            raise EngineMismatch(
                f"TensorRT refuses the plan of {manifest.spec.title}: it was built for another GPU or version; "
                f"build it on this machine (rmd build)"
            )
        profiles = self.engine.num_optimization_profiles
        if profiles != len(manifest.spec.batches):
            raise EngineMismatch(
                f"the plan of {manifest.spec.title} has {profiles} profiles; build it again (rmd build)"
            )


class TensorRTEngine(Engine):
    """One profile of a plan and its execution context, on torch's current stream.

    The context, and with it the profile's memory, comes with the first run: whoever warms engines up, smallest batch
    first, meets an exhausted memory there and can go without the larger ones.
    """

    def __init__(self, manifest: Manifest, plan: _Plan, batch: int | None = None) -> None:
        super().__init__(manifest, batch)
        self._plan: _Plan | None = plan
        self._tensorrt, self._logger, self._engine = plan.tensorrt, plan.logger, plan.engine
        self._profile = manifest.spec.batches.index(self.batch)
        self._context: Any = None
        modes = {name: self._engine.get_tensor_mode(name) for name in self._tensor_names()}
        self._outputs = [name for name, mode in modes.items() if mode == self._tensorrt.TensorIOMode.OUTPUT]
        self._inputs = [name for name, mode in modes.items() if mode == self._tensorrt.TensorIOMode.INPUT]
        known = {item.name for item in manifest.inputs}
        if len(self._outputs) != 1 or not set(self._inputs) <= known:
            raise EngineMismatch(f"the plan of {manifest.spec.title} takes {self._inputs}, not {sorted(known)}")

    def at(self, batch: int) -> Engine:
        """See :meth:`Engine.at`."""
        if batch == self.batch or batch not in self.manifest.spec.batches or self._plan is None:
            return super().at(batch)
        return TensorRTEngine(self.manifest, self._plan, batch)

    def _new_context(self) -> Any:
        # The context's memory is that of its own profile, not of the widest one.
        context = self._engine.create_execution_context(
            self._tensorrt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        )
        stream = torch.cuda.current_stream()
        # The profile is one of the plan's: what can fail here is the allocation.
        if context is None or not context.set_optimization_profile_async(self._profile, stream.cuda_stream):
            raise torch.OutOfMemoryError(f"out of memory: no execution context for {self.manifest.spec.title}")
        stream.synchronize()
        for name, shape, _ in self._expected:
            if name in self._inputs and not context.set_input_shape(name, shape):
                raise EngineError(f"TensorRT does not take {name!r} {shape} in {self.manifest.spec.title}")
        return context

    def _tensor_names(self) -> Iterator[str]:
        for index in range(self._engine.num_io_tensors):
            yield self._engine.get_tensor_name(index)

    def _run(self, inputs: Sequence[Tensor]) -> Tensor:
        if self._plan is None:
            raise EngineError(f"engine {self.manifest.spec.title} was unloaded")
        if self._context is None:
            self._context = self._new_context()
        named = {
            spec.name: tensor.contiguous() for spec, tensor in zip(self.manifest.inputs, inputs, strict=True)
        }  # alive until the launch below: TensorRT gets addresses only
        spec = self.manifest.output
        output = torch.empty((self.batch, *spec.shape[1:]), dtype=spec.torch_dtype, device=self.device)
        for name in self._inputs:
            self._context.set_tensor_address(name, named[name].data_ptr())
        self._context.set_tensor_address(self._outputs[0], output.data_ptr())
        stream = torch.cuda.current_stream()
        for tensor in named.values():
            tensor.record_stream(stream)
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise EngineError(f"TensorRT could not run {self.manifest.spec.title}")
        return output

    def check_refit(self, state: Mapping[str, Tensor]) -> None:
        """See :meth:`Engine.check_refit`.

        Raises:
            EngineError: the plan holds its weights for good; or a parameter changes whose place in the plan is not
                known, since it was equal to another or computed with when the plan was built.
        """
        if self.manifest.weights_mode != "refittable" or self._plan is None:
            raise EngineError(
                f"engine {self.manifest.spec.title} holds its weights for good; build it for the new ones (rmd build)"
            )
        for recipe in self.manifest.constants.values():
            Recipe.from_dict(recipe).make(state)
        # TensorRT itself would keep the old values of these without a word.
        changed = changed_fixed(self._plan.folder, state)
        if changed:
            raise EngineError(
                f"refit of {self.manifest.spec.title}: {changed[0]!r} changes ({len(changed)} in all), whose place in "
                f"the plan is not known; build the engine again"
            )

    def refit(self, state: Mapping[str, Tensor]) -> None:
        """See :meth:`Engine.refit`.

        Raises:
            EngineError: see :meth:`check_refit`; nothing was changed then. Or TensorRT refuses, after which the plan
                may hold some old weights and some new ones: load it again.
        """
        self.check_refit(state)
        assert self._plan is not None
        torch.cuda.synchronize()  # a refit beside pending work is undefined
        refitter = self._tensorrt.Refitter(self._engine, self._logger)
        recipes = {name: Recipe.from_dict(recipe) for name, recipe in self.manifest.constants.items()}
        # On the CPU, and kept until the refit is done: a second set of weights may not fit beside the plan's.
        made = {name: recipe.make(state).detach().cpu().contiguous() for name, recipe in recipes.items()}
        refit_plan(self._tensorrt, refitter, made | read_rest(self._plan.folder), self.manifest.spec.title)

    def memory(self) -> EngineMemory:
        """The profile's workspace, and the plan's weights."""
        workspace = 0 if self._context is None else self._engine.get_device_memory_size_for_profile_v2(self._profile)
        return EngineMemory(int(workspace), self.manifest.embedded_bytes)

    def unload(self) -> None:
        """See :meth:`Engine.unload`. The plan goes with the last of its engines."""
        self._context = None
        self._engine = self._plan = None


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


def _version(name: str) -> tuple[int, ...]:
    from engines.target import package_version

    return tuple(int(part) for part in package_version(name).split("+")[0].split(".")[:2] if part.isdigit())
