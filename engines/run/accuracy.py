"""How far an engine's output is from eager's, and how far it may be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from engines.compilers.engine import Engine
from engines.compilers.examples import example_tensors
from engines.errors import EngineAccuracyError
from engines.spec import EngineSpec

# Relative L2 against eager in the same dtype that an engine may have.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 1e-2}
# GPU engines round where their fused kernels end and not where eager does: compiled so, the embedded denoiser is 1.9e-2
# from eager in bfloat16, and nearer than eager to float32 (1.1e-2 against 1.6e-2; measured on a CPU).
_CUDA_BFLOAT16 = 3e-2


def tolerance_of(spec: EngineSpec) -> float:
    """The relative L2 against eager that an engine may have."""
    on_gpu = spec.target.device == "cuda" and spec.dtype == "bfloat16"
    return _CUDA_BFLOAT16 if on_gpu else TOLERANCE[spec.dtype]


def check_accuracy(spec: EngineSpec, error: float) -> None:
    """Raises :class:`EngineAccuracyError` where the relative L2 ``error`` is more than the engine may have, or NaN."""
    tolerance = tolerance_of(spec)
    if not error <= tolerance:
        raise EngineAccuracyError(
            f"engine {spec.title} ({spec.backend}) differs from eager by {error:.1e} (relative L2), more than the "
            f"{tolerance:.0e} allowed in {spec.dtype}"
        )


def worst_relative_l2(engine: Engine, module: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> float:
    """:func:`relative_l2` at every batch of an engine, the worst of them."""
    errors = []
    for batch in engine.manifest.spec.batches:
        at_batch = engine.at(batch)
        try:
            errors.append(relative_l2(at_batch, module, inputs))
        finally:
            if at_batch is not engine:
                at_batch.unload()
    return max(errors)


def relative_l2(engine: Engine, module: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> float:
    """|engine - eager| / |eager|, both in the engine's dtype, on the first rows of ``inputs``."""
    inputs = first_rows(inputs or example_tensors(engine.manifest.spec, engine.device), engine.batch)
    with torch.inference_mode(), _exact_convolutions(engine.manifest.spec.dtype == "float32"):
        eager: Tensor = module(**inputs).double()
        difference = (engine.run(inputs).double() - eager).norm().item()
    norm = eager.norm().item()
    return float(difference / norm if norm > 0 else difference)


@contextmanager
def _exact_convolutions(exact: bool) -> Iterator[None]:
    """By default cuDNN computes float32 convolutions in TF32, with 10 bits: further from an engine than is allowed.

    That one setting alone: ``torch.backends.cudnn.flags`` would switch cuDNN itself off.
    """
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = before and not exact
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def first_rows(inputs: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The first ``count`` rows of every input."""
    return {name: tensor[:count] for name, tensor in inputs.items()}
