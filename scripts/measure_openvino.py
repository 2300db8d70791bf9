"""OpenVINO beside this project's CPU engines and eager: every component, size and batch of a checkpoint.

    pip install --no-deps --target FOLDER openvino
    PYTHONPATH=FOLDER python scripts/measure_openvino.py models/embedded engines-cache OUT

Writes ``openvino.json`` and ``openvino.md``. Every OpenVINO model has static shapes and its weights inside, and runs on
as many threads as the engines, in float32.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import openvino
import torch
from torch import Tensor, nn

from bench.files import write_report
from bench.report import environment
from bench.subjects import checkpoint_subject
from bench.timing import Interleaved, time_interleaved
from engines.run.executor import EngineExecutor
from rmd.backbones.executor import EagerExecutor
from rmd.size import Size

REPEATS = 31
GOAL = 0.95
"""How fast it has to be beside ours at every batch to be offered."""


class Positional(nn.Module):
    """A component whose inputs come in order: OpenVINO's reader of traces names them anew."""

    def __init__(self, component: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.component, self.names = component, names

    def forward(self, *inputs: Tensor) -> Tensor:
        output: Tensor = self.component(**dict(zip(self.names, inputs, strict=True)))
        return output


def compiled(component: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Callable[[], Tensor], float]:
    """An OpenVINO model of one batch as a call on these inputs, and the seconds that making it took."""
    began = time.perf_counter()
    values = tuple(inputs.values())
    with torch.inference_mode():
        read = openvino.convert_model(Positional(component, tuple(inputs)).eval(), example_input=values)
    read.reshape({port: list(value.shape) for port, value in zip(read.inputs, values, strict=True)})
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
    }
    request = openvino.Core().compile_model(read, "CPU", settings).create_infer_request()
    seconds = time.perf_counter() - began

    def run() -> Tensor:
        for index, value in enumerate(values):
            request.set_input_tensor(index, openvino.Tensor(value.contiguous().numpy(), shared_memory=True))
        request.infer()
        return torch.from_numpy(request.get_output_tensor().data)

    return run, seconds


def measure(checkpoint: Path, engines: Path) -> dict[str, Any]:
    """Time all of them, interleaved."""
    subject = checkpoint_subject(checkpoint, torch.float32, torch.device("cpu"))
    backbone = subject.small or subject.backbone  # with the decoder that the engines are of
    modules = backbone.component_modules()
    ours = EngineExecutor.open(checkpoint, engines, dtype="float32")
    eager = EagerExecutor(modules)
    cases: dict[tuple[str, str, str, int], Callable[[], Any]] = {}
    made: dict[tuple[str, str, int], dict[str, float]] = {}
    for manifest in sorted(ours.manifests(), key=lambda m: (m.spec.component, str(m.spec.size), m.spec.batches)):
        for batch in manifest.spec.batches:
            component, size = manifest.spec.component, manifest.spec.size
            where = None if size is None else Size.parse(size)
            inputs = backbone.example_inputs(component, where, batch)
            theirs, seconds = compiled(modules[component], inputs)

            def run(executor: Any, component: str = component, where: Any = where, inputs: Any = inputs) -> Tensor:
                with torch.inference_mode():
                    output: Tensor = executor.run(component, where, inputs)
                return output

            expected = run(eager)
            error = float((theirs() - expected).norm() / expected.norm())
            place = component, size or "", batch
            made[place] = {"relative_l2": error, "made_in_s": seconds, "engine_built_in_s": manifest.build_seconds}
            cases["eager", *place], cases["inductor", *place] = partial(run, eager), partial(run, ours)
            cases["openvino", *place] = theirs
            print(*place, f"made in {seconds:.1f} s, relative L2 {error:.1e}", flush=True)
    found = time_interleaved(cases, torch.device("cpu"), repeats=REPEATS)
    rows = [{"component": c, "size": s, "batch": b, **figures(found, (c, s, b)), **made[c, s, b]} for c, s, b in made]
    return {"format": 1, "openvino": openvino.__version__, **environment(torch.device("cpu")), "rows": rows}


def figures(found: Interleaved, place: tuple[str, str, int]) -> dict[str, float]:
    """Median milliseconds of each, and how many times as fast as ours OpenVINO is."""
    median = {kind: found.timings[kind, *place].median for kind in ("eager", "inductor", "openvino")}
    milliseconds = {f"{kind}_ms": 1000 * seconds for kind, seconds in median.items()}
    return {**milliseconds, "over_inductor": median["inductor"] / median["openvino"]}


def markdown(content: Mapping[str, Any]) -> str:
    """The table, for people."""
    device, rows = content["device"], content["rows"]
    slower = sum(row["over_inductor"] < GOAL for row in rows)
    return "\n".join(
        [
            "# OpenVINO beside our engines",
            "",
            "Written by `python scripts/measure_openvino.py models/embedded engines-cache OUT` on "
            f"{device['name']}, {device['threads']} CPU threads: OpenVINO {content['openvino'].partition('-')[0]}, "
            f"float32, static shapes. Medians of up to {REPEATS} interleaved repeats, ms; above 1 x it is faster.",
            "",
            "| component | size | batch | eager | ours | OpenVINO | OpenVINO over ours | made in, s | relative L2 |",
            "|---|---|---:|---:|---:|---:|---:|---:|---:|",
            *map(line, rows),
            "",
            f"Below {GOAL:g} x: {slower} of {len(rows)}.",
            "",
        ]
    )


def line(row: Mapping[str, Any]) -> str:
    """One place's."""
    place = f"| {row['component']} | {row['size']} | {row['batch']} "
    medians = f"| {row['eager_ms']:.1f} | {row['inductor_ms']:.1f} | {row['openvino_ms']:.1f} "
    return f"{place}{medians}| {row['over_inductor']:.2f} x | {row['made_in_s']:.1f} | {row['relative_l2']:.0e} |"


if __name__ == "__main__":
    report = measure(Path(sys.argv[1]), Path(sys.argv[2]))
    write_report(Path(sys.argv[3]), "openvino", report, markdown(report))
