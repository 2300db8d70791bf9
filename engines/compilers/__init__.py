"""The compilers by backend name, and the choice of one for a device."""

from __future__ import annotations

import torch

from engines.compilers.base import Capabilities, Compiler
from engines.compilers.eager import EagerCompiler
from engines.compilers.inductor import InductorCompiler
from engines.compilers.tensorrt import TensorRTCompiler
from engines.compilers.tensorrt_rtx import TensorRTRTXCompiler
from engines.errors import BackendUnavailable
from engines.target import parse_device

COMPILERS: dict[str, type[Compiler]] = {
    kind.name: kind for kind in (TensorRTCompiler, TensorRTRTXCompiler, InductorCompiler, EagerCompiler)
}
BACKENDS = ("auto", *COMPILERS)
_ORDER = {"cuda": ("tensorrt", "inductor", "eager"), "cpu": ("inductor", "eager")}


def get_compiler(name: str) -> Compiler:
    """The compiler called ``name``.

    Raises:
        BackendUnavailable: unknown name.
    """
    if name not in COMPILERS:
        raise BackendUnavailable(f"unknown backend {name!r}; known are {', '.join(BACKENDS)}")
    return COMPILERS[name]()


def choose_backend(name: str, device: torch.device | str) -> tuple[str, str]:
    """The backend to build with on ``device``, and one sentence when it is not the first choice of "auto".

    Raises:
        BackendUnavailable: there is no such device, or a named backend cannot build here; the message says why and
            what can.
    """
    kind = parse_device(device).type
    if name != "auto":
        can = get_compiler(name).capabilities(kind)
        if not can.available:
            usable = [other for other in _ORDER[kind] if get_compiler(other).capabilities(kind).available]
            raise BackendUnavailable(
                f"backend {name!r} is not available: {can.reason}. Use one of: {', '.join(usable)}"
            )
        return name, ""
    reasons: list[str] = []
    for candidate in _ORDER[kind]:
        can = get_compiler(candidate).capabilities(kind)
        if can.available:
            return candidate, f"using {candidate}: {'; '.join(reasons)}" if reasons else ""
        reasons.append(f"{candidate} is not available ({can.reason})")
    raise BackendUnavailable("; ".join(reasons))


__all__ = ["BACKENDS", "COMPILERS", "Capabilities", "Compiler", "choose_backend", "get_compiler"]
