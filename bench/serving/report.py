"""Reports of the serving bench: everything as JSON, what matters as Markdown, each written whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.serving.plots import plot_loads


def write_report(content: Mapping[str, Any], markdown: str, folder: Path, name: str) -> list[Path]:
    """Write ``name.json`` and ``name.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(content), indent=1, allow_nan=False)
    paths = [folder / f"{name}.json", folder / f"{name}.md"]
    for path, what in zip(paths, (text, markdown), strict=True):
        scratch = path.with_name(f".{path.name}.partial")
        scratch.write_text(what.rstrip() + "\n")
        os.replace(scratch, path)
    return paths


def write_study(content: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the simulator's report, and its plot where matplotlib is installed."""
    written = write_report(content, study_markdown(content), folder, "simulated")
    policy = content["settings"]["policy"]
    shown = {}
    for part in content["parts"]:
        others = [name for name in shown_policies(part, policy) if name != policy]
        shown[part["machine"], part["mix"]] = [policy, *others]
    plot = plot_loads(content, folder / "simulated.png", shown)
    return [*written, plot] if plot else written


def study_markdown(content: Mapping[str, Any]) -> str:
    """Return the simulator's report."""
    settings = content["settings"]
    lines = [
        "# Serving policies on a virtual clock",
        "",
        f"Written by `rmd bench simulate`. Arrivals: {settings['arrivals']}, seeds {settings['seeds'][0]} to "
        f"{settings['seeds'][-1]}, {settings['count']} requests each, the same for every policy. Saturation: 64 "
        "requests always on their way. Loads are shares of the best baseline's saturation. *Served well*: 99 % of "
        f"requests take at most {content['slowest']:g} times what they take alone. Latencies count from the intended "
        "send time. In brackets: 95 % intervals, bootstrap over seeds.",
        "",
        "## The rule over the best baseline",
        "",
    ]
    loads = [f"{load:g}" for load in settings["loads"]]
    head = ["machine", "mix", "saturated", "served well", *(f"p50 / p99 at {float(load):.0%}" for load in loads)]
    lines += markdown_table(head, [_claim_row(part, loads) for part in content["parts"]], left=2)
    for part in content["parts"]:
        lines += ["", f"## {part['machine']}, {part['mix']}", "", f"{part['about']}. Latencies in ms.", ""]
        rows = []
        for policy in shown_policies(part, settings["policy"]):
            limits = part["limits"][policy]
            row = [f"`{policy}`", f"{limits['saturated']:.2f}", f"{limits['served_well']:.2f}"]
            row += [_ms(part["loads"][load][policy], "p50", "p99") for load in loads]
            rows.append(row)
        lines += markdown_table(
            ["policy", "saturated, /s", "served well, /s", *(f"at {float(load):.0%}" for load in loads)], rows
        )
    return "\n".join(lines)


def live_markdown(content: Mapping[str, Any]) -> str:
    """Return the report of a live run."""
    settings = content["settings"]
    lines = [
        f"# Serving policies over the engines of {content['model']}",
        "",
        f"Written by `rmd bench serve`: one engine process, the same traces for every policy, interleaved. Arrivals: "
        f"{settings['arrivals']}, {len(settings['seeds'])} seeds, {settings['count']} requests each. Saturation: 64 "
        f"requests always on their way. *Served well*: 99 % of requests take at most {content['slowest']:g} times what "
        "they take alone; between measured loads on a straight line. Latencies count from the intended send time. In "
        "brackets: 95 % intervals, bootstrap over seeds.",
        "",
    ]
    loads = [f"{load:g}" for load in settings["loads"]]
    head = ["mix", "saturated", "served well", *(f"p50 / p99 at {float(load):.0%}" for load in loads)]
    rows = []
    for part in content["parts"]:
        claims = part["claims"]
        row = [part["mix"], _claim(claims["saturated"]), _claim(claims["served_well"])]
        rows.append(row + [f"{claims[f'p50 at {load}'][0]:.2f} / {claims[f'p99 at {load}'][0]:.2f}" for load in loads])
    lines += [f"`{settings['policy']}` over the best baseline of each column:", "", *markdown_table(head, rows)]
    for part in content["parts"]:
        lines += ["", f"## {part['mix']}", "", "Latencies in ms: p50 / p95 / p99.", ""]
        head = ["policy", "saturated, /s", "served well, /s", "busy", "gap, ms"]
        head += [f"at {float(load):.0%}" for load in loads]
        rows = []
        for policy, limits in part["limits"].items():
            row = [f"`{policy}`", f"{limits['saturated']:.2f}", f"{limits['served_well']:.2f}"]
            row += [f"{limits['busy']:.1%}", _ms(limits, "gap_p50")]
            rows.append(row + [_ms(part["loads"][load][policy], "p50", "p95", "p99") for load in loads])
        lines += markdown_table(head, rows)
    lines += [
        "",
        "## The simulator beside it",
        "",
        "Measured / simulated, each line from the means and the scatter of its own batches.",
        "",
    ]
    head = ["mix", "policy", "load", "pictures/s", "p50, ms", "p99, ms"]
    lines += markdown_table(head, [_validation_row(line) for line in content["validation"]], left=3)
    return "\n".join(lines)


def _workers(settings: Mapping[str, Any]) -> str:
    count = settings.get("workers", 1)
    return "" if count == 1 else f", by {count} processes, each with its part of the threads"


def rivals_markdown(content: Mapping[str, Any]) -> str:
    """Return the report of a run against an outside server."""
    settings = content["settings"]
    lines = [
        "# rmd serve beside LitServe",
        "",
        f"Written by `rmd bench serve --against litserve`: the same engines, {settings['mix']}, whole HTTP servers "
        f"turn about, {settings['rounds']} rounds, for each of which both are started anew, whichever is not measured "
        f"is stopped. The rival gathers whole "
        f"requests: its best of the sweep, size and window {content['rival']} (s; the shortest of those that saturate "
        f"within 2 % of the best){_workers(settings)}. Loads are shares of its saturation, which "
        f"{settings['clients']} clients in a closed loop make. Latencies count from the intended send time. In "
        "brackets: 95 % intervals, bootstrap over rounds.",
        "",
    ]
    head = ["load", "", "rmd serve", "LitServe", "ratio"]
    rows = []
    for load, figures in content["loads"].items():
        title = load if load == "saturated" else f"{float(load):.0%}"
        for name, row in figures.items():
            shown = [f"{row[server]:.2f}" for server in ("rmd serve", "litserve")]
            ratio = "{:.2f} ({:.2f} to {:.2f})".format(*row["ratio"]) if row["ratio"] else ""
            rows.append([title, "pictures/s" if name == "rate" else f"{name}, s", *shown, ratio])
            title = ""
    lines += markdown_table(head, rows, left=2)
    sweep = ", ".join(f"{name}: {rate:.2f}" for name, rate in content["sweep"].items())
    return "\n".join([*lines, "", f"The rival's saturation by size and window, pictures/s: {sweep}."])


def _validation_row(line: Mapping[str, Any]) -> list[str]:
    real, told = line["rate"]
    row = [line["mix"], f"`{line['policy']}`", line["load"], f"{real:.2f} / {told:.2f}"]
    told_of = [line.get(name, ()) for name in ("p50", "p99")]
    return row + [" / ".join(f"{value * 1e3:.0f}" for value in values) for values in told_of]


def _claim(claim: Sequence[Any]) -> str:
    ratio, low, high, best = claim
    return f"**{ratio:.2f} x** ({low:.2f} to {high:.2f}; {best})"


def _claim_row(part: Mapping[str, Any], loads: Sequence[str]) -> list[str]:
    claims = part["claims"]
    row = [part["machine"], part["mix"], *(_claim(claims[measure]) for measure in ("saturated", "served_well"))]
    row += [f"{claims[f'p50 at {load}'][0]:.2f} / {claims[f'p99 at {load}'][0]:.2f}" for load in loads]
    return row


def shown_policies(part: Mapping[str, Any], policy: str) -> list[str]:
    """Return the rule, the baselines that are best at something, and of each family its best at saturation."""
    limits, chosen = part["limits"], {policy}
    chosen |= {claim[3] for claim in part["claims"].values()}
    for family in ("fifo", "dynamic", "continuous"):
        own = [name for name in limits if name.startswith(family) and name != policy]
        if own:
            chosen.add(max(own, key=lambda name: limits[name]["saturated"]))
    return [name for name in limits if name in chosen]


def _ms(figures: Mapping[str, Any], *names: str) -> str:
    values = [figures[name] for name in names]
    return " / ".join(f"{value * 1e3:.0f}" if math.isfinite(value) else "-" for value in values)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Return the lines of a table whose first ``left`` columns are words."""
    rule = ["---" if column < left else "---:" for column in range(len(head))]
    return ["| " + " | ".join(row) + " |" for row in (head, rule, *rows)]


def _finite(value: Any) -> Any:
    """Copy, with null in place of what JSON has no number for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
