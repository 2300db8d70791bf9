"""Which engine backends really work on this machine, in about a minute: build, load, run, replay, refit.

    python -m bench.gpu.probe --device cuda --out benchmarks/gpu

Runs a small SD3 transformer of random weights through every backend by the interface that serves, each in a process of
its own: a library that crashes takes only its own row with it. A backend that does not work is no error of the probe:
its reason is the answer.
"""

from __future__ import annotations

import argparse
import faulthandler
import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from bench.report import command_line, environment, write_report
from engines.build.measure import median_latency
from engines.build.one import build_engine
from engines.compilers import COMPILERS, get_compiler
from engines.compilers.base import EngineRequest
from engines.run.accuracy import relative_l2
from engines.run.cuda_graphs import as_it_runs
from engines.store import EngineStore
from engines.target import this_machine
from engines.weights.bank import WeightBank
from rmd.backbones.registry import get_backbone
from rmd.backbones.tiny import tiny_config
from rmd.size import Size

BATCHES = (1, 2, 4)
_SIZE = Size.square(64)
_FAMILY = "sd3"


def probe(device: str, backends: Sequence[str] = tuple(COMPILERS), dtype: str = "bfloat16") -> list[dict[str, Any]]:
    """One row a backend.

    Returns:
        `backend`, `works`, and `reason` where it does not; else the weights mode, build and load seconds, the relative
        L2 of each batch, whether other weights were taken in place (`refit`, its error against eager, or the reason),
        and the median milliseconds of each batch.
    """
    return [{"backend": name, **_alone(name, device, dtype)} for name in backends]


def _alone(name: str, device: str, dtype: str, run: Callable[..., dict[str, Any]] | None = None) -> dict[str, Any]:
    """The row of one backend, found in a process of its own; ``run`` stands in for :func:`_probe`."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=faulthandler.enable) as pool:
        try:
            return pool.submit(run or _probe, name, device, dtype).result()
        except BrokenProcessPool:
            return {"works": False, "reason": "its process crashed; where, stands on standard error"}


def _probe(name: str, device: str, dtype: str) -> dict[str, Any]:
    compiler = get_compiler(name)
    capabilities = compiler.capabilities(torch.device(device).type)
    if not capabilities.available:
        return {"works": False, "reason": capabilities.reason}
    try:
        with TemporaryDirectory(prefix="rmd-probe-") as folder:
            return {"works": True, **_measure(name, device, dtype, EngineStore(folder))}
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return {"works": False, "reason": f"{error} ({type(error).__name__} in {Path(where.filename).name})"}


def _network(seed: int, dtype: str, device: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = get_backbone(_FAMILY).from_config(tiny_config(_FAMILY), getattr(torch, dtype), device)
        module = backbone.component_modules()["denoiser"].requires_grad_(False)
        for parameter in module.parameters():  # zero biases and norms of ones would all look alike to a refit
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
        return module, backbone.example_inputs("denoiser", _SIZE, max(BATCHES))


def _measure(name: str, device: str, dtype: str, store: EngineStore) -> dict[str, Any]:
    compiler = get_compiler(name)
    module, inputs = _network(0, dtype, device)
    profiles = compiler.capabilities(torch.device(device).type).profiles
    row: dict[str, Any] = {"batches": {}, "refit": None}
    for batches in [BATCHES] if profiles else [(batch,) for batch in BATCHES]:
        given = {key: value[: max(batches)] for key, value in inputs.items()}
        request = EngineRequest(
            "denoiser", str(_SIZE), module, given, this_machine(device), dtype, "probe", tuple(batches)
        )
        spec = compiler.plan(request)
        manifest = build_engine(compiler, store, module, spec, given)
        bank = WeightBank(module)
        loaded = compiler.load(manifest, store.folder(spec.key), bank)
        row |= {
            "weights_mode": manifest.weights_mode,
            "build_seconds": round(row.get("build_seconds", 0.0) + manifest.build_seconds, 2),
            "load_seconds": round(row.get("load_seconds", 0.0) + manifest.load_seconds, 3),
        }
        engines = {batch: as_it_runs(loaded.at(batch)) for batch in batches}
        for batch, engine in engines.items():
            row["batches"][batch] = {
                "relative_l2": relative_l2(engine, module, inputs),  # replayed as a CUDA graph, where it serves so
                "milliseconds": 1000 * median_latency(engine),
            }
        if batches[-1] == max(BATCHES):
            row["refit"] = _refit(engines[max(BATCHES)], dtype, device, inputs)
        for engine in engines.values():
            engine.unload()
        bank.close()
    return row


def _refit(engine: Any, dtype: str, device: str, inputs: dict[str, torch.Tensor]) -> float | str:
    """Relative L2 against another network after its weights were given to the engine, or why it does not take them."""
    other, _ = _network(1, dtype, device)
    try:
        engine.refit(dict([*other.named_parameters(), *other.named_buffers()]))
    except ValueError as error:
        return str(error)
    return relative_l2(engine, other, inputs)


def markdown(content: dict[str, Any]) -> str:
    """The rows as a table."""
    lines = [
        f"# Engine backends on {content['device']['name']}",
        "",
        f"Written by `{content['command']}`. A small SD3 transformer, {content['dtype']}.",
        "",
        "| backend | weights | built in s | loaded in s | relative L2 at batch "
        + ", ".join(map(str, BATCHES))
        + " | ms | "
        "after a refit |",
        "|---|---|---:|---:|---|---|---|",
    ]
    for row in content["rows"]:
        if not row["works"]:
            lines.append(f"| {row['backend']} | does not work: {row['reason']} | | | | | |")
            continue
        errors = ", ".join(f"{entry['relative_l2']:.1e}" for entry in row["batches"].values())
        times = ", ".join(f"{entry['milliseconds']:.2f}" for entry in row["batches"].values())
        refit = row["refit"] if isinstance(row["refit"], str) else f"{row['refit']:.1e}"
        lines.append(
            f"| {row['backend']} | {row['weights_mode']} | {row['build_seconds']} | {row['load_seconds']} | {errors} | "
            f"{times} | {refit} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backends", default=",".join(COMPILERS))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/probe"))
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    content = {
        "format": 1,
        "kind": "probe",
        "command": command_line(),
        **environment(device),
        "dtype": given.dtype,
        "rows": probe(given.device, given.backends.split(","), given.dtype),
    }
    text = markdown(content)
    write_report(given.out, f"probe-{device.type}", content, text)
    print(text)


if __name__ == "__main__":
    main()
