"""How much faster a cascade is than its teacher: steps, schedules, text, decoding, by batch and way of running.

    python -m bench.speedup.run --device cuda --backbone sdxl --out benchmarks/gpu

Latency depends on the architecture and not on the weights' values, so the large backbones are measured with random
weights of their public configurations. Whole schedules are run where that takes seconds; else they are the sum of their
measured steps, and the report says so.
"""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.report import command_line, environment, write_speedup
from bench.speedup.executors import make_executor, variants_for
from bench.speedup.ratios import (
    DECODE_SMALL,
    PACKAGE,
    PAPER,
    STOCK,
    Measured,
    rows_of,
    schedule_seconds,
    speedups,
    step_key,
)
from bench.subjects import (
    Runner,
    Subject,
    checkpoint_subject,
    parameter_bytes,
    random_subject,
)
from bench.timing import Timing, time_interleaved
from rmd.backbones.base import usable_device
from rmd.checkpoint import FULL_DECODER
from rmd.dtypes import dtype_name, parse_dtype


@dataclass(frozen=True)
class SpeedupSettings:
    """What is measured.

    Attributes:
        backbone: key of the registry; the checkpoint's own where one is given.
        checkpoint: folder, None for random weights.
        engines: folder of built engines (adds the variant "engines"; needs a checkpoint).
        backend: of those engines.
        buckets: of those engines; None for the default ones.
        device, dtype: such as "cuda" and "bfloat16"; "auto" is the device's own dtype.
        scale: "full" or "tiny" (see :func:`random_subject`).
        batches: pictures at a time.
        variants: None for the device's own list.
        repeats: rounds at most.
        whole_limit: a schedule is run whole when its steps add up to fewer seconds than this.
        minutes: nothing new is begun after this long; what is missing then is listed in the report.
        threads: of the CPU; None leaves torch's choice.
        decoder: small decoder beside the full one; what the checkpoint names when None, "full" for none.
        stock: also run the teacher as a diffusers pipeline would.
        out: folder of the report.
    """

    backbone: str = "embedded"
    checkpoint: Path | None = None
    engines: Path | None = None
    backend: str = "auto"
    buckets: tuple[int, ...] | None = None
    device: str = "cpu"
    dtype: str = "auto"
    scale: str = "full"
    batches: tuple[int, ...] = (1, 8)
    variants: tuple[str, ...] | None = None
    repeats: int = 7
    whole_limit: float = 20.0
    minutes: float = 30.0
    threads: int | None = None
    decoder: str | None = None
    stock: bool = True
    out: Path = Path("benchmarks/speedup")


def run_speedup(settings: SpeedupSettings, progress: Callable[[str], None] = lambda _what: None) -> dict[str, Any]:
    """Measure and write ``speedup-<backbone>-<device>.json``, ``.md`` and (with matplotlib) ``.png``.

    Returns:
        the content of the JSON file.

    Raises:
        ValueError: unknown backbone, dtype or variant, or engines without a checkpoint.
    """
    device = usable_device(settings.device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    dtype = parse_dtype(settings.dtype, device)
    settings = replace(settings, dtype=dtype_name(dtype))
    began = time.monotonic()
    progress("building the networks")
    subject = (
        checkpoint_subject(settings.checkpoint, dtype, device, settings.decoder)
        if settings.checkpoint
        else random_subject(settings.backbone, settings.scale, dtype, device)
    )
    runners, unavailable = _runners(settings, subject, device)
    measured, notes = Measured(), [subject.note] if subject.note else []
    content: dict[str, Any] = {}
    for batch in settings.batches:
        if time.monotonic() - began > 60 * settings.minutes:
            notes.append(f"batch {batch} was not begun: the {settings.minutes:g} minutes of --minutes were over")
        else:
            _measure_batch(settings, subject, runners, batch, began + 60 * settings.minutes, measured, progress)
        content = _content(settings, subject, measured, unavailable, notes, device)
        write_speedup(settings.out, content)  # after every batch: whoever ends the process early keeps these
    return content


def _runners(
    settings: SpeedupSettings, subject: Subject, device: torch.device
) -> tuple[dict[str, Runner], dict[str, str]]:
    """By variant, what runs student and teacher; and why other variants are not there."""
    runners: dict[str, Runner] = {}
    unavailable: dict[str, str] = {}
    shared: dict[str, Any] = {}
    small_shared: dict[str, Any] = {}
    for variant in variants_for(device, settings.variants):
        try:
            executor = make_executor(variant, subject.backbone, device, settings.dtype, shared)
        except (ValueError, ImportError) as error:
            unavailable[variant] = str(error)
            continue
        small = None
        if subject.small is not None:
            small = make_executor(variant, subject.small, device, settings.dtype, small_shared)
        runners[variant] = Runner(subject, executor, small_executor=small)
    if settings.engines is not None:
        if settings.checkpoint is None:
            raise ValueError("--engines needs the --checkpoint that they were built for")
        # The teacher has the same architecture: its time through the same engines does not depend on whose weights
        # they hold.
        runners["engines"] = _engines_runner(settings, settings.checkpoint, settings.engines, subject)
    if not runners:
        raise ValueError("no variant can run here: " + "; ".join(f"{k}: {v}" for k, v in unavailable.items()))
    return runners, unavailable


def _engines_runner(settings: SpeedupSettings, checkpoint: Path, store: Path, subject: Subject) -> Runner:
    """Through built engines, of the full and the small decoder where both are there.

    Raises:
        EngineMissing: neither is complete.
    """
    from engines.errors import EngineMissing
    from engines.run.executor import EngineExecutor

    opened: dict[str, Any] = {}
    missing: EngineMissing | None = None
    for choice in dict.fromkeys((FULL_DECODER, subject.small_decoder or FULL_DECODER)):
        try:
            opened[choice] = EngineExecutor.open(
                checkpoint, store, settings.backend, settings.device,
                dtype=settings.dtype, buckets=settings.buckets, decoder=choice,
            )  # fmt: skip
        except EngineMissing as error:
            missing = missing or error
    if not opened and missing is not None:
        raise missing
    small = opened.get(subject.small_decoder)
    return Runner(subject, opened.get(FULL_DECODER, small), small_executor=small, decodes=FULL_DECODER in opened)


def _measure_batch(
    settings: SpeedupSettings,
    subject: Subject,
    runners: Mapping[str, Runner],
    batch: int,
    deadline: float,
    measured: Measured,
    progress: Callable[[str], None],
) -> None:
    device = subject.backbone.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    guidance = subject.teacher.guidance_scale
    cases: dict[tuple[str, int, Any], Callable[[], Any]] = {}
    for variant, runner in runners.items():
        for size in subject.sizes:
            cases[variant, batch, step_key(size, False)] = runner.step(size, batch, 1.0)
        full = subject.teacher.full_size
        cases[variant, batch, step_key(full, True)] = runner.step(full, batch, guidance)
        if "decoder" in subject.backbone.component_modules() and runner.decodes:
            cases[variant, batch, "decode"] = runner.decode(full, batch)
        small = runner.decode_small(full, batch)
        if small is not None:
            cases[variant, batch, DECODE_SMALL] = small
        text = runner.text(batch)
        if text is not None:
            cases[variant, batch, "text"] = text
    first, runner = next(iter(runners.items()))
    package = runner.package(subject.teacher.full_size, batch)
    if package is not None:  # the same for all of them
        cases[first, batch, PACKAGE] = package
    _time(cases, settings, deadline, measured, progress, f"batch {batch}, steps")
    whole: dict[tuple[str, int, Any], Callable[[], Any]] = {}
    for variant, runner in runners.items():
        for name, cascade in (("teacher", subject.teacher), *subject.students.items()):
            estimate = schedule_seconds(measured, variant, batch, name, cascade)
            if estimate is not None and estimate[0] < settings.whole_limit:
                whole[variant, batch, name] = runner.schedule(cascade, batch)
    stock = measured.seconds("eager", batch, step_key(subject.teacher.full_size, True))
    if settings.stock and stock is not None and stock * subject.teacher.num_steps < settings.whole_limit:
        whole[STOCK, batch, "teacher"] = runners["eager"].diffusers_loop(subject.teacher, batch)
    _time(whole, settings, deadline, measured, progress, f"batch {batch}, schedules")
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        outside = max(0, total - free - torch.cuda.memory_reserved(device))  # TensorRT's own, and the context
        peak = torch.cuda.max_memory_allocated(device) + outside
        measured.timings[STOCK, batch, "peak_bytes"] = Timing.of([float(peak)])
    for runner in runners.values():
        for executor in (runner.executor, runner.small_executor):
            if hasattr(executor, "release") and device.type == "cuda":
                executor.release()


def _time(
    cases: Mapping[tuple[str, int, Any], Callable[[], Any]],
    settings: SpeedupSettings,
    deadline: float,
    measured: Measured,
    progress: Callable[[str], None],
    what: str,
) -> None:
    found = time_interleaved(
        cases,
        torch.device(settings.device),
        deadline=deadline,
        repeats=settings.repeats,
        case_budget=settings.whole_limit,
        progress=lambda case: progress(f"{what}: {case}"),
    )
    measured.timings.update(found.timings)
    measured.failures.update(found.failures)


def _content(
    settings: SpeedupSettings,
    subject: Subject,
    measured: Measured,
    unavailable: Mapping[str, str],
    notes: Sequence[str],
    device: torch.device,
) -> dict[str, Any]:
    backbone = subject.backbone
    variants = list(dict.fromkeys(variant for variant, _, _ in measured.timings if variant != STOCK))
    peaks = {
        str(batch): int(timing.median) for (_, batch, what), timing in measured.timings.items() if what == "peak_bytes"
    }
    rows = rows_of(subject, measured, variants, settings.batches)
    borrowed = {
        f"{row['variant']}, batch {row['batch']}: {part} is eager's, its own was not measured"
        for row in rows
        for part in row["from_eager"]
        if row["variant"] != STOCK
    }
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()}
    return {
        "format": 1,
        "kind": "speedup",
        "command": command_line(),
        **environment(device),
        "settings": plain,
        "backbone": backbone.name,
        "weights": subject.weights,
        "small_decoder": subject.small_decoder,
        "parameters": backbone.denoiser_parameters(),
        "component_bytes": parameter_bytes(backbone.component_modules()),
        "tokens": {str(size): backbone.tokens(size) for size in subject.sizes},
        "teacher": {"steps": subject.teacher.num_steps, "guidance_scale": subject.teacher.guidance_scale},
        "timings": [
            {"variant": variant, "batch": batch, "what": _label(what), **timing.to_dict()}
            for (variant, batch, what), timing in measured.timings.items()
            if what != "peak_bytes"
        ],
        "schedules": rows,
        **speedups(rows),
        "peak_bytes": peaks,
        "unavailable": dict(unavailable),
        "failures": [
            {"variant": variant, "batch": batch, "what": _label(what), "reason": reason}
            for (variant, batch, what), reason in measured.failures.items()
        ],
        "paper": PAPER.get(backbone.name),
        "notes": [*notes, *sorted(borrowed)],
    }


def _label(what: Any) -> str:
    return what if isinstance(what, str) else f"step {what[1]}{' guided' if what[2] else ''}"


def parser() -> argparse.ArgumentParser:
    """The command line of this module; `rmd bench speedup` takes the same options."""
    options = argparse.ArgumentParser(prog="python -m bench.speedup.run", description=__doc__.splitlines()[0])
    options.add_argument("--backbone", default="embedded", help="embedded, sdxl, pixart, sd3, wan-1.3b or wan-14b")
    options.add_argument("--checkpoint", type=Path, help="measure this folder instead of random weights")
    options.add_argument("--engines", type=Path, help="also through the engines in this folder")
    options.add_argument("--backend", default="auto", help="of those engines")
    options.add_argument("--buckets", help="of those engines, as they were built")
    options.add_argument("--device", default="cpu")
    options.add_argument("--dtype", default="auto")
    options.add_argument("--scale", default="full", choices=("full", "tiny"), help="tiny rehearses the same path")
    options.add_argument("--batches", default="1,8")
    options.add_argument("--variants", help="eager, compiled, tensorrt, inductor, each also +graphs; comma-separated")
    options.add_argument("--repeats", type=int, default=7)
    options.add_argument("--whole-limit", type=float, default=20.0, help="run schedules whole below so many seconds")
    options.add_argument("--minutes", type=float, default=30.0, help="begin nothing new after this long")
    options.add_argument("--threads", type=int)
    options.add_argument("--decoder", help="small decoder of the checkpoint beside the full one; full: none")
    options.add_argument("--no-stock", action="store_true", help="leave the diffusers loop out")
    options.add_argument("--out", type=Path, default=Path("benchmarks/speedup"))
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    chosen = parser().parse_args(argv)
    settings = SpeedupSettings(
        backbone=chosen.backbone,
        checkpoint=chosen.checkpoint,
        engines=chosen.engines,
        backend=chosen.backend,
        buckets=tuple(int(part) for part in chosen.buckets.split(",")) if chosen.buckets else None,
        device=chosen.device,
        dtype=chosen.dtype,
        scale=chosen.scale,
        batches=tuple(int(part) for part in chosen.batches.split(",")),
        variants=tuple(chosen.variants.split(",")) if chosen.variants else None,
        repeats=chosen.repeats,
        whole_limit=chosen.whole_limit,
        minutes=chosen.minutes,
        threads=chosen.threads,
        decoder=chosen.decoder,
        stock=not chosen.no_stock,
        out=chosen.out,
    )
    began = time.monotonic()
    content = run_speedup(settings, lambda what: print(f"[{time.monotonic() - began:6.1f} s] {what}", flush=True))
    from bench.report import speedup_markdown

    print(speedup_markdown(content))
    return 0


def _out_of_time(*_: object) -> None:
    raise RuntimeError("stopped from outside")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _out_of_time)  # the case at hand fails, and the report of the others is written
    raise SystemExit(main())
