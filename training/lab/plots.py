"""The report's plots and its sheet of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from training.lab.grid import Grid
from training.lab.results import Results

_LABEL = 190
_PASSES = (2, 3, 4, 6, 10, 20, 40)
"""Named on the axis of passes."""


def draw_plots(grid: Grid, results: Results, path: Path) -> Path | None:
    """Quality over speed, and over the intensity of noise at inference; a PNG. None where there is nothing to plot."""
    if not results.files:
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    _quality_over_speed(left, grid, results)
    _quality_over_intensity(right, grid, results)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return path


def _quality_over_speed(axes: Any, grid: Grid, results: Results) -> None:
    tabled = [key for table in grid.tables[:4] for key in table.rows]
    for key in dict.fromkeys(tabled):
        if key not in results.files:
            continue
        means = [float(values.mean()) for values in results.log_ranks(key).values()]
        cost, mean = results.sampling_cost(key), sum(means) / len(means)
        student = grid.row(key).weights == "student"
        axes.errorbar(
            cost,
            mean,
            yerr=[[mean - min(means)], [max(means) - mean]],
            fmt="o" if student else "s",
            color="tab:blue" if student else "tab:gray",
            capsize=3,
        )
        axes.annotate(key, (cost, mean), textcoords="offset points", xytext=(6, 4), fontsize=8)
    axes.set_xscale("log")
    axes.margins(x=0.12)  # room for the last row's name
    axes.minorticks_off()
    axes.set_xticks(_PASSES, [f"{passes}" for passes in _PASSES])
    axes.set_xlabel("passes a picture, at the teacher's side (log)")
    axes.set_ylabel("log rank, text (lower is better); bars: range over training seeds")
    axes.set_title("Quality over speed")


def _quality_over_intensity(axes: Any, grid: Grid, results: Results) -> None:
    drawn = False
    for row in grid.rows:
        own = float(row.sample.get("transition_noise_intensity", 1.0))
        points = []
        for a in sorted({*row.intensities, own}):
            values = results.log_ranks(row.key, intensity="" if a == own else f"{a:g}")
            if values:
                points.append((a, sum(float(v.mean()) for v in values.values()) / len(values)))
        if len(points) > 1:
            axes.plot(*zip(*points, strict=True), marker="o", label=row.key)
            drawn = True
    axes.set_xlabel("a at inference (0: fresh noise alone, 1: predicted noise alone)")
    axes.set_ylabel("log rank, text")
    axes.set_title("Noise intensity at the change of size")
    if drawn:
        axes.legend(fontsize=8)


def draw_sheet(grid: Grid, results: Results, strips: Path, path: Path) -> Path | None:
    """The rows' strips under each other, named, the prompts above: a WebP. None where no strip is there."""
    found = [(row, strips / f"{row.key}.webp") for row in grid.rows if row.key in results.files]
    found = [(row, file) for row, file in found if file.is_file()]
    if not found:
        return None
    pictures = []
    for _, file in found:
        with Image.open(file) as image:
            pictures.append(image.convert("RGB"))
    width, height = pictures[0].size
    prompts = results.common["strip"]
    font = ImageFont.load_default(11)
    head = 44
    sheet = Image.new("RGB", (_LABEL + width, head + sum(p.height + 4 for p in pictures)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, prompt in enumerate(prompts):
        pen.multiline_text((_LABEL + column * height + 2, 2), _wrapped(prompt, 20), fill="black", font=font)
    top = head
    for (row, _), picture in zip(found, pictures, strict=True):
        pen.multiline_text((4, top + 8), _wrapped(row.title, 30), fill="black", font=font)
        sheet.paste(picture, (_LABEL, top))
        top += picture.height + 4
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="WEBP", quality=82)
    return path


def _wrapped(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width)[:6])
