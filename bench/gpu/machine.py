"""What the machine is, and whether its ceilings hold."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import torch

from bench.gpu.case import Context, Row
from bench.report import environment
from bench.timing import time_interleaved


def machine(context: Context) -> Iterator[Row]:
    """Versions, the driver's view, products in bfloat16 (TFLOP/s) and copies (TB/s)."""
    found = environment(context.device)
    yield {"what": "versions", **found["versions"]}
    yield {"what": "device", **found["device"]}
    if context.device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.sm", "--format=csv,noheader"]
        yield {"what": "nvidia-smi", "said": subprocess.run(query, capture_output=True, text=True).stdout.strip()}
        yield {"what": "cudnn", "version": torch.backends.cudnn.version()}  # type: ignore[no-untyped-call]
    side = 8192 if context.scale == "full" else 256
    left, right = (torch.randn(side, side, device=context.device, dtype=context.dtype) for _ in range(2))
    target = torch.empty_like(left)
    calls = {"product": lambda: torch.mm(left, right, out=target), "copy": lambda: target.copy_(left)}
    timings = time_interleaved(calls, context.device, repeats=20).timings
    work = 2 * side**3 / timings["product"].median / 1e12
    moved = 2 * target.nbytes / timings["copy"].median / 1e12
    yield {"what": "product", "ms": round(1e3 * timings["product"].median, 3), "TFLOP/s": round(work, 1)}
    yield {"what": "copy", "ms": round(1e3 * timings["copy"].median, 3), "TB/s": round(moved, 2)}
