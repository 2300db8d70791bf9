"""Every engine of a checkpoint beside eager and the diffusers loop: latency, throughput, memory, by batch bucket."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.engines.pictures import picture_rows
from bench.files import write_report
from bench.plots import plot_engines
from bench.report import (
    command_line,
    engines_markdown,
    environment,
    resident_bytes,
)
from bench.subjects import Runner, Subject, checkpoint_subject, parameter_bytes
from bench.timing import Interleaved, Timing, time_interleaved
from engines.manifest import Manifest
from engines.plan.options import DEFAULT_BUCKETS
from engines.run.executor import EngineExecutor
from rmd.backbones.executor import EagerExecutor
from rmd.cascade import Cascade
from rmd.dtypes import dtype_name, parse_dtype
from rmd.size import Size

DIFFUSERS = "diffusers"
STORED_EAGER = "eager engines"


@dataclass(frozen=True)
class EngineBenchSettings:
    """What is measured.

    Attributes:
        checkpoint: folder.
        engines: folder of its built engines.
        backends: those to open, side by side; eager and the diffusers loop are always there.
        device, dtype: as the engines were built.
        buckets: as they were built; None for the default ones.
        repeats: rounds at most.
        loop_batches: batches of the whole schedules.
        out: folder of the report.
    """

    checkpoint: Path
    engines: Path
    backends: tuple[str, ...] = ("auto",)
    device: str = "cpu"
    dtype: str = "auto"
    buckets: tuple[int, ...] | None = None
    repeats: int = 15
    loop_batches: tuple[int, ...] = (1, 8)
    out: Path = Path("benchmarks/engines")


def run_engines(settings: EngineBenchSettings, progress: Callable[[str], None] = lambda _what: None) -> dict[str, Any]:
    """Measure and write ``engines-<device>.json``, ``.md`` and (with matplotlib) ``.png``.

    Returns:
        the content of the JSON file.

    Raises:
        EngineError: engines are missing or not for this machine; the message says how to build them.
    """
    device = torch.device(settings.device)
    progress("loading")
    dtype = parse_dtype(settings.dtype, device)
    settings = replace(settings, dtype=dtype_name(dtype))
    subject = _as_built(checkpoint_subject(settings.checkpoint, dtype, device))
    backbone = subject.backbone
    eager = EagerExecutor(backbone.component_modules())
    opened: dict[str, EngineExecutor] = {}
    for name in settings.backends:
        compiled = EngineExecutor.open(
            settings.checkpoint, settings.engines, name, settings.device, dtype=settings.dtype, buckets=settings.buckets
        )
        # The eager backend's own engines stand beside plain eager: they show what the executor itself costs.
        opened[STORED_EAGER if compiled.kind == "eager" else compiled.kind] = compiled
    loaded = [manifest for executor in opened.values() for manifest in executor.manifests()]
    places = _places(loaded)
    cases: dict[tuple[str, str, str | None, int], Callable[[], Any]] = {}
    for component, size, batch in places:
        inputs = backbone.example_inputs(component, None if size is None else Size.parse(size), batch)
        for kind, executor in (("eager", eager), *opened.items()):
            cases[kind, component, size, batch] = _call(executor, component, size, inputs)
    found = time_interleaved(cases, device, repeats=settings.repeats, progress=lambda case: progress(str(case)))
    executors = {"eager": eager, **opened}
    loops = _loops(settings, subject, executors, device, progress)
    progress("pictures")
    exact = _as_built(checkpoint_subject(settings.checkpoint, torch.float32, device)).backbone
    pictures = picture_rows(subject, exact, executors, _default(subject), settings.buckets or DEFAULT_BUCKETS)
    rows = engine_rows(found, loaded)
    for row in rows:
        if row["backend"] in opened:
            where = None if row["size"] is None else Size.parse(row["size"])
            held = opened[row["backend"]].engine_memory(row["component"], where, row["batch"])
            row |= {"private_bytes": held.private, "shared_bytes": held.shared}
    content = {
        "format": 1,
        "kind": "engines",
        "command": command_line(),
        **environment(device),
        "checkpoint": str(settings.checkpoint),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(settings).items()},
        "engines": rows,
        "batching_gain": buckets_summary(rows),
        "loops": loop_rows(loops),
        "pictures": pictures,
        "memory": {
            "eager": parameter_bytes(backbone.component_modules()),
            **{kind: executor.memory() for kind, executor in opened.items()},
        },
        "peak_process_bytes": resident_bytes(),
        "failures": [{"case": list(case), "reason": why} for case, why in {**found.failures, **loops.failures}.items()],
    }
    write_report(settings.out, f"engines-{device.type}", content, engines_markdown(content))
    plot_engines(content, settings.out / f"engines-{device.type}.png")
    return content


def _as_built(subject: Subject) -> Subject:
    """The subject with the decoder that its engines have: the one that the checkpoint names."""
    return subject if subject.small is None else replace(subject, backbone=subject.small)


def _call(executor: Any, component: str, size: str | None, inputs: Mapping[str, torch.Tensor]) -> Callable[[], Any]:
    where = None if size is None else Size.parse(size)

    def run() -> Any:
        with torch.inference_mode():
            return executor.run(component, where, inputs)

    return run


def _places(loaded: Sequence[Manifest]) -> list[tuple[str, str | None, int]]:
    """Component, size and bucket of every loaded engine."""
    found = {(m.spec.component, m.spec.size, batch) for m in loaded for batch in m.spec.batches}
    return sorted(found, key=lambda place: (place[0], place[1] or "", place[2]))


def _loops(
    settings: EngineBenchSettings,
    subject: Any,
    executors: Mapping[str, Any],
    device: torch.device,
    progress: Callable[[str], None],
) -> Interleaved:
    cases: dict[tuple[str, str, int], Callable[[], Any]] = {}
    student = _default(subject)
    for batch in settings.loop_batches:
        for kind, executor in executors.items():
            runner = Runner(subject, executor)
            cases[kind, "teacher", batch] = runner.schedule(subject.teacher, batch)
            cases[kind, student.schedule_name, batch] = runner.schedule(student, batch)
        cases[DIFFUSERS, "teacher", batch] = Runner(subject, executors["eager"]).diffusers_loop(subject.teacher, batch)
    return time_interleaved(
        cases, device, repeats=min(5, settings.repeats), progress=lambda case: progress(f"schedule {case}")
    )


def _default(subject: Subject) -> Cascade:
    name = next((name for name in ("2+2", "3+3") if name in subject.students), next(iter(subject.students)))
    return subject.students[name]


def engine_rows(found: Interleaved, loaded: Sequence[Manifest]) -> list[dict[str, Any]]:
    """One row a (component, size, bucket, backend); ``loaded`` are the manifests of the engines that were timed."""
    manifests = {
        (manifest.spec.backend, manifest.spec.component, manifest.spec.size, batch): manifest
        for manifest in loaded
        for batch in manifest.spec.batches
    }
    rows: list[dict[str, Any]] = []
    for case, timing in sorted(found.timings.items(), key=lambda item: (item[0][1], item[0][2] or "", item[0][3])):
        kind, component, size, batch = case
        manifest = manifests.get(("eager" if kind == STORED_EAGER else kind, component, size, batch))
        if kind == "eager":
            manifest = None
        eager: Timing | None = found.timings.get(("eager", component, size, batch))
        rows.append(
            {
                "component": component,
                "size": size,
                "batch": batch,
                "backend": kind,
                **timing.to_dict(),
                "rows_per_second": batch / timing.median,
                "over_eager": None if eager is None else eager.median / timing.median,
                "file_bytes": None if manifest is None else manifest.bytes,
                "build_seconds": None if manifest is None else manifest.build_seconds,
                "load_seconds": None if manifest is None else manifest.load_seconds,
                "relative_l2": None if manifest is None else manifest.relative_l2,
            }
        )
    return rows


def loop_rows(found: Interleaved) -> list[dict[str, Any]]:
    """One row a (backend, schedule, batch), beside the teacher's diffusers loop of that batch."""
    rows: list[dict[str, Any]] = []
    for (kind, schedule, batch), timing in found.timings.items():
        stock: Timing | None = found.timings.get((DIFFUSERS, "teacher", batch))
        rows.append(
            {
                "backend": kind,
                "schedule": schedule,
                "batch": batch,
                **timing.to_dict(),
                "over_diffusers": None if stock is None else stock.median / timing.median,
            }
        )
    return rows


def buckets_summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How many times the rows a second the largest bucket gives over the smallest, by component, size and backend."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(f"{row['backend']} {row['component']} {row['size'] or ''}".strip(), []).append(row)
    found: dict[str, float] = {}
    for name, group in groups.items():
        ordered = sorted(group, key=lambda row: row["batch"])
        found[name] = ordered[-1]["rows_per_second"] / ordered[0]["rows_per_second"]
    return found
