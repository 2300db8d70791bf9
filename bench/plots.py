"""The plots of the reports; skipped where matplotlib is not installed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860")


def plot_speedup(content: Mapping[str, Any], path: Path) -> Path | None:
    """Bars: end-to-end speed-up over the eager teacher, by schedule and variant, one panel a batch.

    Returns:
        ``path``, or None where matplotlib is missing or there is nothing to show.
    """
    table = content["end_to_end_speedup"]
    if importlib.util.find_spec("matplotlib") is None or not table:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(table), figsize=(1.2 + 4.6 * len(table), 3.6), squeeze=False, sharey=True)
    for panel, (batch, schedules) in zip(panels[0], table.items(), strict=True):
        names = [name for name in schedules if name != "teacher"]
        variants = list(dict.fromkeys(variant for name in names for variant in schedules[name]))
        width = 0.8 / max(1, len(variants))
        for number, variant in enumerate(variants):
            heights = [schedules[name].get(variant, {}).get("over_eager_teacher", 0.0) for name in names]
            places = [place + (number - (len(variants) - 1) / 2) * width for place in range(len(names))]
            colour = _COLOURS[number % len(_COLOURS)]
            bars = panel.bar(places, heights, width, label=variant, color=colour)
            panel.bar_label(bars, fmt="%.1f", fontsize=7, padding=1)
        panel.set_xticks(range(len(names)), names)
        panel.set_title(f"batch {batch}", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("speed-up over the eager teacher, end to end", fontsize=9)
    panels[0][0].legend(frameon=False, fontsize=8)
    title = f"{content['backbone']}, {content['device']['name']}, weights: {content['weights']}"
    figure.suptitle(title, fontsize=10)
    return _saved(figure, path)


def plot_engines(content: Mapping[str, Any], path: Path) -> Path | None:
    """Lines: rows a second by batch and backend, one panel a component and size.

    Returns:
        ``path``, or None where matplotlib is missing or there is nothing to show.
    """
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in content["engines"]:
        title = " ".join(part for part in (row["component"], row["size"]) if part)
        lines = panels.setdefault(title, {})
        lines.setdefault(row["backend"], []).append((row["batch"], row["rows_per_second"]))
    if importlib.util.find_spec("matplotlib") is None or not panels:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(3.0 * len(panels), 3.2), squeeze=False)
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for number, (backend, points) in enumerate(lines.items()):
            batches, rates = zip(*sorted(points), strict=True)
            axis.plot(batches, rates, marker="o", label=backend, color=_COLOURS[number % len(_COLOURS)])
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("batch")
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("rows a second")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{content['checkpoint']}, {content['device']['name']}", fontsize=10)
    return _saved(figure, path)


def _saved(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.partial")
    figure.savefig(scratch, dpi=120, format="png")
    pyplot.close(figure)
    os.replace(scratch, path)
    return path
