"""The compilers by backend name, and the choice of one for a device."""

from __future__ import annotations

import torch

from engines.compilers.base import Capabilities, Compiler
from engines.compilers.eager import EagerCompiler
from engines.compilers.inductor.compiler import InductorCompiler
from engines.compilers.tensorrt.compiler import TensorRTCompiler
from engines.compilers.tensorrt.rtx import TensorRTRTXCompiler
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
        BackendUnavailable: see :func:`backend_ladder`.
    """
    ladder, note = backend_ladder(name, device)
    return ladder[0], note


def backend_ladder(name: str, device: torch.device | str) -> tuple[tuple[str, ...], str]:
    """The backends to try in turn on ``device``, and one sentence when the first is not the first choice of "auto".

    A named backend stands alone: what was asked for by name is not replaced by something else.

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
        return (name,), ""
    found: list[str] = []
    reasons: list[str] = []
    for candidate in _ORDER[kind]:
        can = get_compiler(candidate).capabilities(kind)
        if can.available:
            found.append(candidate)
        elif not found:
            reasons.append(f"{candidate} is not available ({can.reason})")
    if not found:
        raise BackendUnavailable("; ".join(reasons))
    return tuple(found), f"using {found[0]}: {'; '.join(reasons)}" if reasons else ""


__all__ = ["BACKENDS", "COMPILERS", "Capabilities", "Compiler", "backend_ladder", "choose_backend", "get_compiler"]
