"""``pictures.json`` and ``pictures.md``: the figures of any model's pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.evaluate.shared.provenance import versions_line
from training.runtime.files import write_json, write_text

FORMAT = 1
_READING = (
    "Means over prompts and sampling seeds; in brackets the 95 % interval of a bootstrap over prompts (a prompt's "
    "seeds stay together). *Difference*: paired by prompt and seed; *better*: the share of pairs in which the row "
    "scores above the reference, ties counted half. Training seeds are in no interval."
)


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write ``pictures.json`` and ``pictures.md`` into `folder`."""
    write_json(folder / "pictures.json", {"format": FORMAT, **report})
    write_text(folder / "pictures.md", markdown(report))


def markdown(report: Mapping[str, Any]) -> str:
    """The tables of ``pictures.md``."""
    metrics, device = report["metrics"], report["device"]
    seeds = ", ".join(map(str, report["seeds"]))
    titles = [metric["title"] for metric in metrics.values()]
    lines = [
        "# Pictures",
        "",
        f"Written by `{report['command']}` on {device['name']}. {report['prompts']['count']} prompts "
        f"(sha256 {report['prompts']['sha256'][:12]}), sampling seeds {seeds}. {versions_line(report)}",
        "",
        _READING,
        "",
        f"| | {' | '.join(titles)} |",
        f"|---|{'---:|' * len(titles)}",
        *(f"| {row['row']} | {' | '.join(_cell(row['metrics'][key]) for key in metrics)} |" for row in report["rows"]),
    ]
    if report["differences"]:
        lines += ["", f"| over {report['rows'][0]['row']} | {' | '.join(titles)} |", f"|---|{'---:|' * len(titles)}"]
    for row in report["differences"]:
        cells = (f"{_cell(value, '+')}, better {value['better']:.0%}" for value in row["metrics"].values())
        lines.append(f"| {row['row']} | {' | '.join(cells)} |")
    lines.append("")
    for metric in metrics.values():
        lines.append(f"- {metric['title']}: {metric['network']}, weights {metric['weights'][:12]}.{_warning(metric)}")
    lines += [f"- Not measured for want of {absent}" for absent in report["absent"].values()]
    return "\n".join(lines) + "\n"


def _cell(value: Mapping[str, float], sign: str = "") -> str:
    return f"{value['value']:{sign}.2f} ({value['low']:{sign}.2f} to {value['high']:{sign}.2f})"


def _warning(metric: Mapping[str, Any]) -> str:
    return (
        ""
        if metric["published"]
        else " **No published network of this metric has this size: its figure means nothing.**"
    )
