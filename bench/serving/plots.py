"""Latency by load, one panel a machine and mix; skipped where matplotlib is not installed."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_COLOURS = ("#c44e52", "#4c72b0", "#dd8452", "#55a868", "#8172b3", "#937860", "#7f7f7f", "#64b5cd")


def plot_loads(content: Mapping[str, Any], path: Path, shown: Mapping[tuple[str, str], list[str]]) -> Path | None:
    """Draw p99 over load.

    Args:
        shown: by (machine, mix), the policies to draw; the first is the rule under test.

    Returns:
        ``path``, or None where matplotlib is missing or there is nothing to show.
    """
    parts = content["parts"]
    if importlib.util.find_spec("matplotlib") is None or not parts:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(len(parts), 2)
    rows = math.ceil(len(parts) / columns)
    figure, panels = pyplot.subplots(rows, columns, figsize=(5.2 * columns, 3.4 * rows), squeeze=False)
    for panel, part in zip(panels.flat, parts, strict=False):
        for number, policy in enumerate(shown[part["machine"], part["mix"]]):
            points = [(float(load), figures[policy]["p99"]) for load, figures in part["loads"].items()]
            points = [(load, seconds) for load, seconds in points if seconds is not None and math.isfinite(seconds)]
            if points:
                loads, seconds = zip(*points, strict=True)
                colour = _COLOURS[number % len(_COLOURS)]
                panel.plot(loads, seconds, marker="o", label=policy, color=colour, linewidth=1.0 + (number == 0))
        panel.set_yscale("log")
        panel.set_title(f"{part['machine']}, {part['mix']}", fontsize=10)
        panel.set_xlabel("load over the best baseline's saturation", fontsize=9)
        panel.set_ylabel("p99, s", fontsize=9)
        panel.legend(frameon=False, fontsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in list(panels.flat)[len(parts) :]:
        panel.set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.partial")
    figure.savefig(scratch, dpi=110, format="png")
    pyplot.close(figure)
    os.replace(scratch, path)
    return path
