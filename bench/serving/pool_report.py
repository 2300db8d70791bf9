"""The report of whole replicas against pools."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean, stdev
from typing import Any

from bench.serving.pools import LAYOUTS
from bench.serving.report import markdown_table


def pool_markdown(content: Mapping[str, Any]) -> str:
    """Return the report."""
    settings = content["settings"]
    lines = [
        "# Whole replicas or pools",
        "",
        f"Written by `rmd bench pools`, on a virtual clock: policy `{settings['policy']}` on each device, "
        f"{settings['count']} requests a run or 20 a device where that is more, seeds "
        f"{', '.join(map(str, settings['seeds']))} (the first alone beyond {settings['saturated_to']} devices). Link "
        f"between pools: {settings['bytes_per_second'] / 1e9:g} GB/s and {1e3 * settings['seconds']:g} ms a message. "
        "Devices are those of the ratio with the highest bound. *Bound*: pictures/s that the slowest pool makes in "
        "batches of the best width, over whole replicas'. *Saturated*: simulated, "
        f"24 requests a device always on their way, 100 a device in all, filling and emptying counted. *Served well*: "
        f"the most pictures/s with the 99th percentile at most {content['slowest']:g} times a lone picture, between "
        "simulated loads on a straight line, and no more than the highest of them. Ratios of rates are mean ± standard "
        "deviation over seeds. Rates are over whole replicas'; latencies are **simulated** milliseconds, "
        "p50 / p95 / p99, at shares of whole replicas' bound (`:bursts`: 0.3 of these on average, five times that for "
        "2 s of every 10 s).",
        "",
        "The simulator's own check against a server (`benchmarks/serving/live.md`): throughput within 5 % in 47 of 48 "
        "comparisons; p99 within 10 % in 39 % of them, mostly too low. Its latencies are not validated. Against "
        "pools, on two real engines: `live.md` beside this.",
        "",
        "## What travels, and what a device holds",
        "",
    ]
    head = ["machine", "encoded text, kB", "latents, kB", *(f"weights of `{name}`, GB" for name in LAYOUTS)]
    lines += markdown_table(head, [_held(content, name) for name in content["about"]])
    for name, about in content["about"].items():
        lines += ["", f"## {name}", "", f"{about}.", ""]
        loads = [f"{load:g}" for load in settings["loads"]]
        head = ["mix", "GPUs", "layout", "devices", "bound", "saturated", "served well", "saturated, one device off"]
        head += [f"at {float(load):.0%}" for load in loads]
        rows = [row for part in content["parts"] if part["machine"] == name for row in _rows(part, loads)]
        lines += markdown_table(head, rows, left=3)
    lines += ["", "## Ratios, by arithmetic", "", "Bounds over whole replicas'.", ""]
    head = ["machine", "mix", "GPUs", "layout", "best ratio", "bound", "one device off", "ratio of the other mix"]
    lines += markdown_table(head, [_bound(row) for row in content["bounds"]], left=4)
    return "\n".join(lines)


def _held(content: Mapping[str, Any], name: str) -> list[str]:
    sent, weights = content["carried"][name], content["weights"][name]
    row = [name, f"{sent['text'] / 1e3:.0f}", ", ".join(f"{v / 1e3:.0f} ({k})" for k, v in sent["latents"].items())]
    for layout in LAYOUTS.values():
        pools = []
        for pool in layout:
            held = dict(weights)
            if "low" in pool and "high" in pool:  # one network
                held["high"] = 0
            pools.append(f"{sum(held[stage] for stage in pool) / 1e9:.2f}")
        row.append(" + ".join(pools))
    return row


def _rows(part: Mapping[str, Any], loads: list[str]) -> list[list[str]]:
    rows, whole = [], part["layouts"]["whole"]
    for title, row in part["layouts"].items():
        if title == "whole":
            cells = [f"{row['bound']:.1f}/s", *(_rate(row, name) for name in ("saturated", "served_well")), ""]
        else:
            cells = [f"{row['bound'] / whole['bound']:.2f}"]
            cells += [_over(row, whole, name) for name in ("saturated", "served_well")] + [_one_off(row, whole)]
        for load in loads:
            figures = row["loads"][load]
            cells.append(" / ".join(f"{1e3 * figures[name][0]:.0f}" for name in ("p50", "p95", "p99")))
        rows.append([part["mix"], str(part["gpus"]), title, ":".join(map(str, row["devices"])), *cells])
    return rows


def _rate(row: Mapping[str, Any], name: str) -> str:
    return f"{fmean(row[name]):.1f}/s" if name in row else ""


def _over(row: Mapping[str, Any], whole: Mapping[str, Any], name: str) -> str:
    """Ratio to whole replicas: mean over seeds, each on its own trace, and standard deviation."""
    if name not in row:
        return ""
    ratios = [ours / theirs for ours, theirs in zip(row[name], whole[name], strict=True)]
    return f"{fmean(ratios):.2f}" + (f" ± {stdev(ratios):.2f}" if len(ratios) > 1 else "")


def _one_off(row: Mapping[str, Any], whole: Mapping[str, Any]) -> str:
    ratios = [rate / whole["saturated"][0] for _, rate in row.get("one_off", ())]
    return "" if not ratios else f"{min(ratios):.2f} to {max(ratios):.2f}"


def _bound(row: Mapping[str, Any]) -> list[str]:
    off = "" if row["one_off"] is None else " to ".join(f"{value:.2f}" for value in row["one_off"])
    cells = [row["machine"], row["mix"], str(row["gpus"]), row["layout"], ":".join(map(str, row["devices"]))]
    return [*cells, f"{row['best']:.2f}", off, ", ".join(f"{value:.2f}" for value in row["other_mix"])]
