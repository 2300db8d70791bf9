"""AOTInductor: machine code for the CPU and CUDA, weights outside and shared by all engines of a component."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engines.compilers.base import Capabilities, Compiler, EngineRequest
from engines.compilers.engine import Engine
from engines.compilers.examples import example_tensors
from engines.compilers.exported import known_options, package, used_tensors, user_inputs
from engines.compilers.inductor.engine import PACKAGE, InductorEngine, load_package, save_constants
from engines.compilers.inductor.packing import (
    EAGER_ROUNDING,
    WEIGHTS_OUTSIDE,
    UnexplainedConstantError,
    compile_packed,
    own_kernels,
    packed_settings,
)
from engines.compilers.inductor.rewrites import rewriting
from engines.errors import EngineError
from engines.manifest import Manifest
from engines.spec import EngineSpec, TensorSpec
from engines.stopwatch import Stopwatch
from engines.target import host_instructions
from engines.weights.bank import WeightBank
from engines.weights.recipes import Recipe, strides_of

log = logging.getLogger(__name__)

_UNTRACEABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
# Variables that change what inductor makes, and those among them that only say where and how long it may work.
_VARIABLES = ("TORCHINDUCTOR_", "AOT_INDUCTOR_")
_NOT_THE_CODE = (
    "_CACHE",
    "_CACHE_DIR",
    "_COMPILE_THREADS",
    "_WORKER_START",
    "_TIMEOUT",
    "_TIMEOUT_SECONDS",
    "_SAVE_ARGS",
    "_VEC_ISA_OK",
)
# An engine for a GPU has host code too: without this it would be for the very CPU that it was built beside.
_ANY_HOST = {"cpp.march": "", **WEIGHTS_OUTSIDE}


class InductorCompiler(Compiler):
    """``torch.export``, then AOTInductor with static shapes; one package per engine."""

    name = "inductor"
    sources = (
        "engines.compilers.exported",
        "engines.compilers.inductor.compiler",
        "engines.compilers.inductor.engine",
        "engines.compilers.inductor.packing",
        "engines.compilers.inductor.rewrites",
        "engines.weights.bank",
        "engines.weights.recipes",
    )

    def capabilities(self, device: str) -> Capabilities:
        """See :meth:`Compiler.capabilities`."""
        from torch._inductor import config

        compilers = [name for name in config.cpp.cxx if name]
        if not any(shutil.which(name) for name in compilers):
            return Capabilities(False, f"no C++ compiler ({' or '.join(compilers)}) is installed")
        if device == "cuda" and not torch.cuda.is_available():
            return Capabilities(False, "torch sees no CUDA device")
        if device == "cuda":
            from torch.utils.cpp_extension import CUDA_HOME

            if CUDA_HOME is None:
                return Capabilities(False, "AOTInductor needs the CUDA toolkit (CUDA_HOME is not set)")
        return Capabilities(True)

    def text_in_one_batch(self, device: str) -> bool:
        """Its unpacked products are the CPU library's, which chooses by shape."""
        return device == "cpu"

    def settings(self, request: EngineRequest) -> dict[str, str | int | float | bool]:
        """See :meth:`Compiler.settings`."""
        settings: dict[str, str | int | float | bool] = {"package_constants_in_so": False, **_environment()}
        if request.target.device == "cpu":
            settings |= known_options(EAGER_ROUNDING | WEIGHTS_OUTSIDE) | {"threads": torch.get_num_threads()}
        else:
            settings |= known_options(_ANY_HOST)
            if not known_options(_ANY_HOST).keys() >= _ANY_HOST.keys():
                # Older versions have no such option: the host code is for this very processor.
                settings["host"] = host_instructions()
        if request.dtype == "float32":
            settings["float32_matmul_precision"] = torch.get_float32_matmul_precision()
        if self.weights_mode(request) == "packed":
            own = own_kernels(request.dtype, request.target.instruction_set)
            settings |= packed_settings(own) | {"rewriting": rewriting(request.module)}
        return settings

    def weights_mode(self, request: EngineRequest) -> str:
        """Packed on the CPU where every constant can be traced to its parameter, shared elsewhere.

        That holds for networks that have a rewriting, and for those of plain matrix products. Convolutions pack into
        opaque tensors, and lookups at constant positions are folded with what is added to them.
        """
        if request.target.device != "cpu" or request.dtype not in ("bfloat16", "float32"):
            return "shared"
        kinds = {type(child) for child in request.module.modules()}
        plain = nn.Linear in kinds and not any(issubclass(kind, _UNTRACEABLE) for kind in kinds)
        return "packed" if plain or rewriting(request.module) else "shared"

    def build(self, module: nn.Module, spec: EngineSpec, folder: Path) -> Manifest:
        """See :meth:`Compiler.build`."""
        watch = Stopwatch()
        inputs = example_tensors(spec, spec.target.device)
        note = ""
        if spec.weights_mode == "packed":
            try:
                own = own_kernels(spec.dtype, spec.target.instruction_set)
                names, output, recipes, fixed = compile_packed(module, inputs, folder / PACKAGE, own)
                save_constants(fixed, folder)
                return self._manifest(spec, names, output, "packed", recipes, watch)
            except UnexplainedConstantError as error:
                note = f"weights are not packed: {error}"
                log.info("%s: %s", spec.title, note)
                (folder / PACKAGE).unlink(missing_ok=True)
        options = EAGER_ROUNDING | WEIGHTS_OUTSIDE if spec.target.device == "cpu" else _ANY_HOST
        names, output, recipes = self._compile_shared(module, inputs, folder, options)
        return self._manifest(spec, names, output, "shared", recipes, watch).updated(note=note)

    def _compile_shared(
        self, module: nn.Module, inputs: Mapping[str, Tensor], folder: Path, options: Mapping[str, Any]
    ) -> tuple[list[str], Tensor, dict[str, Recipe]]:
        with torch.no_grad():
            program = torch.export.export(module, (), kwargs=dict(inputs), strict=False)
            output = module(**inputs)
            package(program, folder / PACKAGE, {**options, "aot_inductor.package_constants_in_so": False})
        wanted = load_package(folder / PACKAGE).get_constant_fqns()
        held = dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])
        inside = {name: program.constants[name] for name in wanted if name not in held and name in program.constants}
        lacking = [name for name in wanted if name not in held and name not in inside]
        if lacking:
            raise EngineError(
                f"the compiled graph reads {lacking[0]!r}, which is no parameter, buffer or constant of it"
            )
        outside = {held[name].data_ptr() for name in wanted if name in held}
        baked = [name for name in used_tensors(program) if held[name].data_ptr() not in outside]
        if baked:
            raise EngineError(
                f"the compiled graph holds the values of {baked[0]!r} itself, and other weights could not reach them"
            )
        save_constants(inside, folder)
        recipes = {name: Recipe((name,), strides=strides_of(held[name])) for name in wanted if name in held}
        return user_inputs(program, inputs), output, recipes

    def _manifest(
        self,
        spec: EngineSpec,
        names: list[str],
        output: Tensor,
        mode: str,
        recipes: Mapping[str, Recipe],
        watch: Stopwatch,
    ) -> Manifest:
        by_name = {item.name: item for item in spec.inputs}
        return Manifest(
            spec,
            {},
            tuple(by_name[name] for name in names),
            TensorSpec.of("output", output),
            mode,
            constants={name: recipe.to_dict() for name, recipe in recipes.items()},
            build_seconds=watch.seconds,
        )

    def load(self, manifest: Manifest, folder: Path, weights: WeightBank) -> Engine:
        """See :meth:`Compiler.load`.

        Raises:
            EngineMismatch: the machine code uses CPU extensions that this machine lacks.
        """
        return InductorEngine(manifest, folder, weights)


def _environment() -> dict[str, str | int | float | bool]:
    """The variables by which inductor is told to compile otherwise."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_VARIABLES) and not name.endswith(_NOT_THE_CODE)
    }
