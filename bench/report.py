"""Reports of the benches: JSON with everything, Markdown with what matters, both written whole or not at all."""

from __future__ import annotations

import os
import platform
import resource
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench.files import write_report
from bench.speedup.ratios import DECODE_SMALL, PACKAGE
from rmd.machine import device_name

_PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "tensorrt",
    "torch-tensorrt",
    "tensorrt-rtx-cu13",
    "torch-tensorrt-rtx",
)


def environment(device: torch.device) -> dict[str, Any]:
    """The machine and the versions that a measurement was made with."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found: dict[str, Any] = {
        "kind": device.type,
        "name": device_name(device),
        "cpus": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found.update(
            memory_bytes=properties.total_memory,
            compute_capability=f"{properties.major}.{properties.minor}",
        )
        versions["cuda"] = str(torch.version.cuda)
    return {"device": found, "versions": versions}


def resident_bytes() -> int:
    """The most memory that this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def command_line() -> str:
    """The command as typed, with the program's name alone."""
    run = getattr(sys.modules.get("__main__"), "__spec__", None)  # of a module that was started with -m
    return " ".join([f"python -m {run.name}" if run else Path(sys.argv[0]).name, *sys.argv[1:]])


def write_speedup(folder: Path, content: Mapping[str, Any]) -> list[Path]:
    """Write the speed-up report, and its plot where matplotlib is installed."""
    scale = "" if content["settings"]["scale"] == "full" else "-tiny"
    stem = f"speedup-{content['backbone']}-{content['device']['kind']}{scale}"
    written = [*write_report(folder, stem, content, speedup_markdown(content))]
    from bench.plots import plot_speedup

    plot = plot_speedup(content, folder / f"{stem}.png")
    return [*written, plot] if plot else written


def speedup_markdown(content: Mapping[str, Any]) -> str:
    """The tables of a speed-up report."""
    teacher, settings = content["teacher"], content["settings"]
    lines = [
        f"# Speed of {content['backbone']} cascades",
        "",
        _provenance(content),
        "",
        f"Weights: {content['weights']}; {settings['dtype']}; teacher {teacher['steps']} steps with guidance "
        f"{teacher['guidance_scale']:g} (two rows a picture). Medians of interleaved repeats in one run. *Over the "
        "teacher* divides the eager teacher's time by the row's; *same variant* by that of the teacher run in the "
        "row's own way. End to end is text encoding, denoising and decoding.",
    ]
    if content.get("small_decoder"):
        lines += [
            "",
            f"Two decoders: the autoencoder's own, and a small one ({content['small_decoder']}). *With the small one* "
            "is the row decoded by it, over the eager teacher with its full decoder; what that costs in quality is in "
            "the small decoder's card.",
        ]
    if settings["scale"] == "tiny":
        lines += ["", "**A rehearsal with tiny networks: the figures say nothing of the real model.**"]
    for batch in sorted({row["batch"] for row in content["schedules"]}):
        lines += ["", f"## Batch {batch}", "", *_schedule_table(content, batch)]
        ratios = content["cascade_over_single_size"].get(str(batch), {})
        if ratios:
            shown = ", ".join(f"{variant} {ratio:.2f}" for variant, ratio in ratios.items())
            lines += ["", f"Two sizes over as many steps at the full size alone (denoising): {shown}."]
        peak = content["peak_bytes"].get(str(batch))
        if peak:
            lines += ["", f"Peak device memory, all variants loaded: {peak / 2**30:.1f} GiB."]
    lines += ["", "## Steps", "", *_step_table(content)]
    paper = content.get("paper")
    if paper:
        lines += [
            "",
            f"The paper's figures (A100, base {paper['base']}): {paper['schedule']} {paper['cascade']} x, one size "
            f"{paper['single_size']} x over the guided base model.",
        ]
    for variant, reason in content["unavailable"].items():
        lines += ["", f"Not run: {variant} ({reason})."]
    for entry in content["failures"]:
        lines += ["", f"Failed: {entry['variant']}, batch {entry['batch']}, {entry['what']}: {entry['reason']}."]
    lines += [line for note in content["notes"] for line in ("", note + ".")]
    return "\n".join(lines) + "\n"


def _schedule_table(content: Mapping[str, Any], batch: int) -> list[str]:
    small = content.get("end_to_end_small_speedup", {}).get(str(batch), {})
    lines = [
        "| run by | schedule | denoising, ms | over the teacher | same variant | end to end, ms | over the teacher | "
        "same variant | decoder's share | denoiser's, of all with PNG | pictures/s |"
        + (" end to end with the small one, ms | over the teacher |" if small else ""),
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|" + ("---:|---:|" if small else ""),
    ]
    for row in content["schedules"]:
        if row["batch"] != batch:
            continue
        ratios = [
            content[name][str(batch)][row["schedule"]][row["variant"]]
            for name in ("denoising_speedup", "end_to_end_speedup")
        ]
        denoising, whole = (
            [_times(ratio.get(label)) for label in ("over_eager_teacher", "over_same_variant_teacher")]
            for ratio in ratios
        )
        share = "" if row["decoder_share"] is None else f"{100 * row['decoder_share']:.0f} %"
        estimated = "" if row["how"] == "measured" else " *"
        lines.append(
            f"| {row['variant']} | {row['schedule']} | {1000 * row['denoise_s']:.1f}{estimated} | {denoising[0]} | "
            f"{denoising[1]} | {1000 * row['end_to_end_s']:.1f} | {whole[0]} | {whole[1]} | {share} | "
            f"{100 * row['denoiser_share']:.0f} % | "
            f"{row['pictures_per_second']:.2f} |" + (_small_cells(row, small) if small else "")
        )
    if any(row["how"] != "measured" for row in content["schedules"] if row["batch"] == batch):
        lines += ["", "\\* the sum of its measured steps: the whole schedule would take too long to run."]
    return lines


def _small_cells(row: Mapping[str, Any], ratios: Mapping[str, Any]) -> str:
    seconds = row.get("end_to_end_small_s")
    if seconds is None:
        return "  |  |"
    ratio = ratios.get(row["schedule"], {}).get(row["variant"], {})
    return f" {1000 * seconds:.1f} | {_times(ratio.get('over_eager_teacher'))} |"


def _step_table(content: Mapping[str, Any]) -> list[str]:
    """Milliseconds of single calls: rows are variants and calls, columns batches."""
    batches = sorted({timing["batch"] for timing in content["timings"]})
    table: dict[tuple[str, str], dict[int, float]] = {}
    for timing in content["timings"]:
        if timing["what"] in ("text", "decode", DECODE_SMALL, PACKAGE) or timing["what"].startswith("step "):
            table.setdefault((timing["variant"], timing["what"]), {})[timing["batch"]] = timing["median_s"]
    lines = [
        "| run by | call | " + " | ".join(f"batch {batch}, ms" for batch in batches) + " | throughput gain |",
        "|---|---|" + "---:|" * (len(batches) + 1),
    ]
    for (variant, what), cells in table.items():
        shown = [f"{1000 * cells[batch]:.2f}" if batch in cells else "" for batch in batches]
        known = sorted(cells)
        gain = ""
        if len(known) > 1:
            gain = f"{(known[-1] / cells[known[-1]]) / (known[0] / cells[known[0]]):.2f} x at {known[-1]}"
        lines.append(f"| {variant} | {what} | " + " | ".join(shown) + f" | {gain} |")
    return lines


def engines_markdown(content: Mapping[str, Any]) -> str:
    """The tables of an engine report."""
    lines = [
        f"# Engines of {content['checkpoint']}",
        "",
        _provenance(content),
        "",
        "Medians of interleaved repeats in one run; *over eager* above 1 means faster. *Own* is what an engine holds",
        "for itself once loaded, *weights* what it reads and shares with the other engines of its component.",
        "",
        "| component | size | batch | backend | ms | rows/s | over eager | files, MiB | own, MiB "
        "| weights, MiB | relative L2 |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in content["engines"]:
        over = _times(row["over_eager"])
        sizes = [row.get(name) for name in ("file_bytes", "private_bytes", "shared_bytes")]
        files = " | ".join("" if size is None else f"{size / 2**20:.1f}" for size in sizes)
        error = "" if row["relative_l2"] is None else f"{row['relative_l2']:.1e}"
        lines.append(
            f"| {row['component']} | {row['size'] or ''} | {row['batch']} | {row['backend']} | "
            f"{1000 * row['median_s']:.2f} | {row['rows_per_second']:.1f} | {over} | {files} | {error} |"
        )
    gains = ", ".join(f"{name} {gain:.2f}" for name, gain in content["batching_gain"].items())
    lines += ["", f"Rows a second of the largest bucket over the smallest: {gains}."]
    lines += ["", "## Whole schedules", "", "| run by | schedule | batch | ms | over the diffusers loop |"]
    lines.append("|---|---|---:|---:|---:|")
    for row in content["loops"]:
        lines.append(
            f"| {row['backend']} | {row['schedule']} | {row['batch']} | {1000 * row['median_s']:.1f} | "
            f"{_times(row['over_diffusers'])} |"
        )
    lines += [
        "",
        "## Pictures",
        "",
        "Eight prompts through the student's schedule: differences in 8-bit levels from eager float32 at batch 1, and",
        "from the same backend at batch 1, which is what travelling in company changes.",
        "",
        "| run by | batch | against | mean | largest | more than 8 levels apart |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for row in content["pictures"]:
        lines.append(
            f"| {row['backend']} | {row['batch']} | {row['against']} | {row['mean_levels']:.2f} | "
            f"{row['max_levels']:.1f} | {100 * row['share_above_8']:.2f} % |"
        )
    lines += ["", "## Memory", ""]
    for backend, held in content["memory"].items():
        parts = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in held.items())
        lines.append(f"- {backend}: {sum(held.values()) / 2**20:.1f} MiB, each copy of weights counted once ({parts})")
    return "\n".join(lines) + "\n"


def _provenance(content: Mapping[str, Any]) -> str:
    device = content["device"]
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    return f"Written by `{content['command']}` on {device['name']}, {device['threads']} CPU threads. {versions}."


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f} x"
