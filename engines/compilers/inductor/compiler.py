"""AOTInductor: machine code for the CPU and CUDA, weights outside and shared by all engines of a component."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engines.compilers.base import Capabilities, Compiler, EngineRequest
from engines.compilers.engine import Engine
from engines.compilers.examples import example_tensors
from engines.compilers.exported import package, used_tensors, user_inputs
from engines.compilers.inductor.engine import PACKAGE, InductorEngine, load_package, save_constants
from engines.compilers.inductor.packing import UnexplainedConstantError, compile_packed
from engines.compilers.inductor.rewrites import rewriting
from engines.compilers.inductor.settings import options_of, settings_of, takes_templates
from engines.compilers.inductor.streams import LEAST_ROWS, as_many_threads, streams_of, why_not_in_streams
from engines.errors import EngineError
from engines.manifest import Manifest
from engines.spec import EngineSpec, TensorSpec, WeightsMode
from engines.stopwatch import Stopwatch
from engines.weights.bank import WeightBank
from engines.weights.recipes import Recipe, strides_of

log = logging.getLogger(__name__)

_UNTRACEABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


class InductorCompiler(Compiler):
    """``torch.export``, then AOTInductor with static shapes; one package per engine."""

    name = "inductor"
    sources = (
        "engines.compilers.exported",
        "engines.compilers.inductor.attention",
        "engines.compilers.inductor.compiler",
        "engines.compilers.inductor.engine",
        "engines.compilers.inductor.joined",
        "engines.compilers.inductor.joined_bert",
        "engines.compilers.inductor.joined_sd3",
        "engines.compilers.inductor.streams",
        "engines.compilers.inductor.packing",
        "engines.compilers.inductor.rewrites",
        "engines.compilers.inductor.settings",
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

    def text_in_one_batch(self, spec: EngineSpec) -> bool:
        """On a CPU, where its products are the library's, which chooses by shape; a rewritten one's do not show it."""
        return spec.target.device == "cpu" and "matrix_kernels" not in spec.settings

    def settings(self, request: EngineRequest) -> dict[str, str | int | float | bool]:
        """See :meth:`Compiler.settings`."""
        packed = self.weights_mode(request) is WeightsMode.PACKED
        settings = settings_of(request.target, request.dtype, rewriting(request.module) if packed else None)
        if "matrix_kernels" in settings:
            rows = max(t.shape[0] for t in request.inputs.values())
            least = 1 if takes_templates(settings) else LEAST_ROWS
            settings["streams"] = streams_of(int(settings["threads"]), rows, least)
        return settings

    def weights_mode(self, request: EngineRequest) -> WeightsMode:
        """Packed on the CPU where every constant can be traced to its parameter, shared elsewhere.

        That holds for networks that have a rewriting, and for those of plain matrix products. Convolutions pack into
        opaque tensors, and lookups at constant positions are folded with what is added to them.
        """
        if request.target.device != "cpu" or request.dtype not in ("bfloat16", "float32"):
            return WeightsMode.SHARED
        kinds = {type(child) for child in request.module.modules()}
        plain = nn.Linear in kinds and not any(issubclass(kind, _UNTRACEABLE) for kind in kinds)
        return WeightsMode.PACKED if plain or rewriting(request.module) else WeightsMode.SHARED

    def build(self, module: nn.Module, spec: EngineSpec, folder: Path) -> Manifest:
        """See :meth:`Compiler.build`."""
        watch = Stopwatch()
        streams, note = int(spec.settings.get("streams", 1)), ""
        if streams > 1:
            with as_many_threads(int(spec.settings["threads"]) // streams):
                manifest = self._build(module, spec, folder, streams)
            reason = why_not_in_streams(folder / PACKAGE)
            if not reason:
                return manifest.updated(build_seconds=watch.seconds)
            note = f"not run in {streams} streams: {reason}"
            log.info("%s: %s", spec.title, note)
            for left in folder.iterdir():
                left.unlink()
        manifest = self._build(module, spec, folder, 1)
        return manifest.updated(build_seconds=watch.seconds, note="; ".join(filter(None, (note, manifest.note))))

    def _build(self, module: nn.Module, spec: EngineSpec, folder: Path, streams: int) -> Manifest:
        inputs = {
            name: tensor[: spec.batch // streams] for name, tensor in example_tensors(spec, spec.target.device).items()
        }
        note = ""
        if spec.weights_mode is WeightsMode.PACKED:
            try:
                names, output, recipes, fixed = compile_packed(module, inputs, folder / PACKAGE, spec.settings)
                save_constants(fixed, folder)
                return self._manifest(spec, names, output, WeightsMode.PACKED, recipes, streams)
            except UnexplainedConstantError as error:
                note = f"weights are not packed: {error}"
                log.info("%s: %s", spec.title, note)
                (folder / PACKAGE).unlink(missing_ok=True)
        options = options_of(spec.settings, packed=False)
        names, output, recipes = self._compile_shared(module, inputs, folder, options)
        return self._manifest(spec, names, output, WeightsMode.SHARED, recipes, streams).updated(note=note)

    def _compile_shared(
        self, module: nn.Module, inputs: Mapping[str, Tensor], folder: Path, options: Mapping[str, Any]
    ) -> tuple[list[str], Tensor, dict[str, Recipe]]:
        with torch.no_grad():
            program = torch.export.export(module, (), kwargs=dict(inputs), strict=False)
            output = module(**inputs)
            package(program, folder / PACKAGE, options)
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
        mode: WeightsMode,
        recipes: Mapping[str, Recipe],
        streams: int,
    ) -> Manifest:
        by_name = {item.name: item for item in spec.inputs}
        row = TensorSpec.of("output", output)
        return Manifest(
            spec,
            {},
            tuple(by_name[name] for name in names),
            replace(row, shape=(spec.batch, *row.shape[1:])),
            mode,
            constants={name: recipe.to_dict() for name, recipe in recipes.items()},
            streams=streams,
        )

    def load(self, manifest: Manifest, folder: Path, weights: WeightBank) -> Engine:
        """See :meth:`Compiler.load`.

        Raises:
            EngineMismatch: the machine code uses CPU extensions that this machine lacks.
        """
        return InductorEngine(manifest, folder, weights)
