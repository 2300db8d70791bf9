"""TensorRT-RTX: the same path through the RTX build of torch-tensorrt; its plans can be built without a GPU."""

from __future__ import annotations

from typing import ClassVar

from engines.compilers.base import Compiler
from engines.compilers.tensorrt.compiler import TensorRTCompiler


class TensorRTRTXCompiler(TensorRTCompiler):
    """Plans are finished for the GPU at hand when they are loaded."""

    name: ClassVar[str] = "tensorrt_rtx"
    packages = (*Compiler.packages, "torch-tensorrt-rtx", "tensorrt-rtx-cu13-libs")
    extra: ClassVar[str] = "gpu-rtx"
    rtx: ClassVar[bool] = True
