"""``films.json`` and ``films.md``: the figures of a film checkpoint, and how to read and repeat them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.evaluate.embedded.films import FILM_TITLES, FilmSet
from training.evaluate.embedded.measure import RowResult
from training.evaluate.embedded.report import FORMAT, cell, heading, over_teacher_lines, ratios
from training.runtime.files import write_json, write_text

_COLUMNS = (
    ("motion", "motion right", 3),
    ("way_off", "way off, px", 1),
    ("text_r1", "text R@1", 3),
    ("text_r5", "text R@5", 3),
    ("kid", "KID x 1e3", 1),
    ("identity", "identity", 3),
    ("flicker", "flicker", 2),
)
_READING = (
    "*Motion right*: the motion read off the pixels (centre, area, strength and angle of what differs from the ground, "
    "frame by frame; nothing is fitted) is the one asked for. *Way off*: how far the thing ends from where its way "
    "should have taken it, median over the films whose things move along. *Text R@k*: the middle frame's own concept "
    "is among the k nearest texts of the set's concepts; the projection from EfficientNet-Lite0 features is fitted on "
    "training films' middle frames only; films of two things are left out. *KID*: middle frames against the "
    "originals', on EfficientNet-Lite0 features; not FID. *Identity*: cosine of those features of the thing, cut out "
    "of the first and of the last frame (films that fade are left out). *Flicker*: mean change of the frames' "
    "outermost pixels from frame to frame, of 255, median over films. ± is the larger of the standard error over "
    "concepts (for KID the spread over subsets) and the standard deviation over sampling seeds."
)


def film_set_report(test: FilmSet, chance: Mapping[str, float], rows: Sequence[RowResult]) -> dict[str, Any]:
    """One test set's part of ``films.json``."""
    return {
        "set": test.split,
        "title": FILM_TITLES[test.split],
        "films": len(test.specs),
        "readable": test.readable,
        "gallery": len(test.concepts),
        "motions": [spec.motion for spec in test.specs],
        "chance": dict(chance),
        "rows": [row.to_dict() for row in rows],
        "over_teacher": ratios(rows),
    }


def write_film_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write ``films.json`` and ``films.md`` into ``folder``."""
    write_json(folder / "films.json", {"format": FORMAT, **report})
    write_text(folder / "films.md", film_markdown(report))


def film_markdown(report: Mapping[str, Any]) -> str:
    """The tables of ``films.md``."""
    lines = [
        *heading("Films of the held-out sets", report, f", {report['size']}"),
        f"The films are synthetic: pictures moved by rule. {_READING}",
    ]
    for entry in report["sets"]:
        lines += ["", f"## {entry['title']}", "", *_set_lines(entry)]
    return "\n".join(lines) + "\n"


def _set_lines(entry: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{entry['films']} films; {entry['readable']:.1%} of the originals drawn are read right, and only those are "
        f"asked for; gallery of {entry['gallery']} concepts.",
        "",
        "| row | passes | " + " | ".join(title for _, title, _ in _COLUMNS) + " |",
        "|---|---:|" + "---:|" * len(_COLUMNS),
    ]
    for row in entry["rows"]:
        cells = [cell(row["metrics"].get(name), digits) for name, _, digits in _COLUMNS]
        lines.append(f"| {row['title']} | {row['evaluations'] or ''} | " + " | ".join(cells) + " |")
    chance = [f"{entry['chance'][name]:.{digits}f}" if name in entry["chance"] else "" for name, _, digits in _COLUMNS]
    lines.append("| chance | | " + " | ".join(chance) + " |")
    return [*lines, *over_teacher_lines(entry)]
