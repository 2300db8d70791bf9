"""TensorRT through torch-tensorrt: the whole graph in one block or no engine at all.

One plan serves all batch buckets of a component and size: each bucket is an optimisation profile whose smallest, best
and largest batch are equal, so that its kernels are chosen for that very batch, and all profiles share the plan's
weights. A plan of one bucket is static.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from engines.compilers.base import Capabilities, Compiler, EngineRequest
from engines.compilers.engine import Engine
from engines.compilers.examples import example_tensors
from engines.compilers.exported import used_tensors
from engines.compilers.tensorrt.conversion import export_batches, input_ranges, profile_per_batch, recorded_weights
from engines.compilers.tensorrt.engine import PLAN, Plan, TensorRTEngine
from engines.compilers.tensorrt.refit import FIXED, REST, WeightIndex, save_rest
from engines.errors import BackendUnavailable, EngineError
from engines.manifest import Manifest
from engines.spec import EngineSpec, TensorSpec, WeightsMode
from engines.stopwatch import Stopwatch
from engines.weights.bank import WeightBank


class TensorRTCompiler(Compiler):
    """Strongly typed, no shape but the batch varies; the network is in its precision before it comes here."""

    name: ClassVar[str] = "tensorrt"
    packages = (*Compiler.packages, "torch-tensorrt", "tensorrt")
    sources = (
        "engines.compilers.exported",
        "engines.compilers.tensorrt.compiler",
        "engines.compilers.tensorrt.conversion",
        "engines.compilers.tensorrt.engine",
        "engines.compilers.tensorrt.refit",
        "engines.weights.bank",
        "engines.weights.recipes",
    )
    extra: ClassVar[str] = "gpu"
    rtx: ClassVar[bool] = False

    def capabilities(self, device: str) -> Capabilities:
        """See :meth:`Compiler.capabilities`. The library is imported only when all else is in place."""
        reason = self._obstacle(device)
        return Capabilities(not reason, reason, profiles=True, parallel=False)

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

    def weights_mode(self, request: EngineRequest) -> WeightsMode:
        """Inside the plan."""
        # A refittable plan can only be built where there is a GPU, and building without one is what RTX plans are for.
        return WeightsMode.EMBEDDED if self.rtx else WeightsMode.REFITTABLE

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

    def refitted(self, manifest: Manifest, built: Path, module: nn.Module, spec: EngineSpec, folder: Path) -> Manifest:
        """See :meth:`Compiler.refitted`."""
        watch = Stopwatch()
        plan = Plan(manifest, built)
        TensorRTEngine(manifest, plan).refit(dict([*module.named_parameters(), *module.named_buffers()]))
        (folder / PLAN).write_bytes(plan.serialized())
        for name in (REST, FIXED):  # what it refuses to change is as it was
            if (built / name).is_file():
                shutil.copyfile(built / name, folder / name)
        return manifest.updated(spec=spec, build_seconds=watch.seconds, latency_seconds={})

    def load(self, manifest: Manifest, folder: Path, weights: WeightBank) -> Engine:
        """See :meth:`Compiler.load`.

        Raises:
            BackendUnavailable: no GPU, or the library cannot be imported.
            EngineMismatch: the runtime refuses the plan.
        """
        problem = self._obstacle("cuda")
        if problem:
            raise BackendUnavailable(f"a {self.name} engine cannot be loaded: {problem}")
        return TensorRTEngine(manifest, Plan(manifest, folder))


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
