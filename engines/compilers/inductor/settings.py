"""What AOTInductor is told: made once, when an engine is planned. The key holds it; a build is told nothing else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from engines.target import Target, host_instructions

Settings = dict[str, str | int | float | bool]

_OPTION = "inductor."
"""In front of the names of inductor's own options among an engine's settings."""

# Without these weights would end up in the package.
_OUTSIDE: Settings = {
    "aot_inductor.package_constants_in_so": False,
    # Otherwise vectors of up to 8 values (a decoder's last bias, say) stand in the code as numbers, and an engine that
    # two checkpoints share, or that is refitted, computes with those of the one that it was built from.
    "always_keep_tensor_constants": True,
}
# Batch 1 fuses other operations than batch 2. With bfloat16 rounded where eager rounds it, and not only where a kernel
# happens to end, every batch computes the same bits, and those are nearer to eager's.
_EAGER_ROUNDING: Settings = {"emulate_precision_casts": True}
# An engine for a GPU has host code too: without this it would be for the very CPU that it was built beside.
_ANY_HOST: Settings = {"cpp.march": ""}
# Only debuggers and profilers miss these, and the C++ compiler is faster without. The same for every engine: one set of
# flags is one set of precompiled headers.
_LEAN: Settings = {"aot_inductor.enable_line_tables": False, "aot_inductor.enable_frame_pointer": False}
_PACKED: Settings = {"fx_graph_cache": False}
_OWN_KERNELS: Settings = {"freezing": True, "max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN"}
_TEMPLATES = "first C++ template"

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


def settings_of(target: Target, dtype: str, rewriting: str | None) -> Settings:
    """Every setting that touches an engine.

    Args:
        target: the machine.
        dtype: of the weights.
        rewriting: of the network whose matrices lie as the kernels read them, "" for the network itself; None where
            weights are shared as they are.
    """
    settings, options = _environment(), _OUTSIDE | _LEAN
    if target.device == "cpu":
        options |= _EAGER_ROUNDING
        settings["threads"] = torch.get_num_threads()
    else:
        options |= _ANY_HOST
        if not known_options(_ANY_HOST):
            # Older versions have no such option: the host code is for this very processor.
            settings["host"] = host_instructions()
    if dtype == "float32":
        settings["float32_matmul_precision"] = torch.get_float32_matmul_precision()
    if rewriting is not None:
        own = own_kernels(dtype, target.instruction_set)
        options |= _PACKED | (_OWN_KERNELS if own else {})
        settings |= {"matrix_kernels": _TEMPLATES if own else "oneDNN", "rewriting": rewriting}
    return settings | {f"{_OPTION}{name}": value for name, value in known_options(options).items()}


def options_of(settings: Mapping[str, Any], packed: bool = True) -> dict[str, Any]:
    """Inductor's options among an engine's settings, by their dotted names.

    Args:
        settings: of the engine's spec.
        packed: False leaves out those of packed weights, where packing was tried and given up.
    """
    options = {name.removeprefix(_OPTION): value for name, value in settings.items() if name.startswith(_OPTION)}
    return {name: value for name, value in options.items() if packed or name not in _PACKED | _OWN_KERNELS}


def takes_templates(settings: Mapping[str, Any]) -> bool:
    """Whether matrix products are inductor's own kernels, for packed weights."""
    return settings.get("matrix_kernels") == _TEMPLATES


def own_kernels(dtype: str, instruction_set: str) -> bool:
    """Whether inductor's matrix kernels are the faster ones on such a CPU: not with bf16 vectors and no tiles."""
    extensions = instruction_set.split()
    return dtype != "bfloat16" or "amx_tile" in extensions or "avx512_bf16" not in extensions


def known_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of inductor's options, by dotted name, that the installed torch has: it refuses to be told of others."""
    from torch._inductor import config

    def known(name: str) -> bool:
        place: Any = config
        for part in name.split("."):
            if not hasattr(place, part):
                return False
            place = getattr(place, part)
        return True

    return {name: value for name, value in options.items() if known(name)}


def _environment() -> dict[str, str | int | float | bool]:
    """The variables by which inductor is told to compile otherwise."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_VARIABLES) and not name.endswith(_NOT_THE_CODE)
    }
