"""One case in this process: ``python -m bench.gpu.case NAME --rows FILE``. A row is a line of JSON, written at once."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu.cases import find
from bench.speedup.executors import GraphReplay
from bench.subjects import Subject, random_subject
from bench.timing import time_interleaved
from rmd.backbones.base import usable_device
from rmd.backbones.executor import EagerExecutor
from rmd.dtypes import parse_dtype

Row = dict[str, Any]
_REPEATS = 15


@dataclass(frozen=True)
class Context:
    """Where a case runs.

    Attributes:
        device: of the networks.
        scale: "full" or "tiny".
        out: folder of the report.
    """

    device: torch.device
    scale: str
    out: Path

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16, but on a CPU without products in it."""
        return parse_dtype("auto", self.device)

    @property
    def graphs(self) -> bool:
        """Whether calls are recorded as CUDA graphs."""
        return self.device.type == "cuda"

    def subject(self, name: str = "sdxl") -> Subject:
        """A backbone of random weights, without text encoders."""
        return random_subject(name, self.scale, self.dtype, self.device, text=False)

    def call(self, module: nn.Module | Callable[..., Tensor], inputs: Mapping[str, Tensor]) -> Callable[[], Tensor]:
        """A network at fixed inputs; on a GPU recorded, at its first call, and replayed."""
        eager = EagerExecutor({"": module})  # type: ignore[dict-item]
        executor: Any = GraphReplay(eager) if self.graphs else eager
        return lambda: executor.run("", None, inputs)

    def time(self, cases: Mapping[str, Callable[[], Any]]) -> Iterator[Row]:
        """A row a case, timed turn about: median milliseconds, and of the first call, compiling included."""
        found = time_interleaved(cases, self.device, repeats=_REPEATS, case_budget=5.0)
        for what, timing in found.timings.items():
            yield {"what": what, "ms": round(1e3 * timing.median, 3), "first s": round(timing.first, 2)}
        for what, why in found.failures.items():
            yield {"what": what, "failed": why}


def relative_l2(made: Tensor, reference: Tensor) -> float:
    """|made - reference| / |reference|."""
    reference = reference.detach().double()
    return float(f"{float((made.detach().double() - reference).norm() / reference.norm()):.2e}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one case."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.case")
    parser.add_argument("name")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", default="full", choices=("full", "tiny"))
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    case = find(given.name)
    module, _, function = case.call.partition(":")
    rows: Callable[..., Iterator[Row]] = getattr(importlib.import_module(f"bench.gpu.{module}"), function)
    torch.manual_seed(0)
    with given.rows.open("a") as file:
        for row in rows(Context(usable_device(given.device), given.scale, given.out), *case.words):
            print(json.dumps(row), file=file, flush=True)
            print(row, flush=True)


if __name__ == "__main__":
    main()
