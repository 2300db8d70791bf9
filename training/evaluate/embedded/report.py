"""``quality.json`` and ``quality.md``: the numbers, and everything needed to read and repeat them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.evaluate.embedded.measure import RowResult
from training.evaluate.embedded.sets import TITLES
from training.evaluate.shared.metrics import Estimate, recall_ratio
from training.evaluate.shared.provenance import versions_line
from training.runtime.files import write_json, write_text

FORMAT = 1
_COLUMNS = (
    ("text_r1", "text R@1", 3),
    ("text_r5", "text R@5", 3),
    ("picture_r1", "picture R@1", 3),
    ("picture_r5", "picture R@5", 3),
    ("kid", "KID x 1e3", 1),
    ("frechet", "Frechet", 1),
    ("nearest_training_cosine", "nearest training picture", 3),
)
_READING = (
    "The distances are **KID and Frechet distance on EfficientNet-Lite0 features**, not FID; lower is better, and "
    "the floor compares real with real pictures. *Text R@k*: the share of pictures whose own concept is among the "
    "k nearest texts of the set's concepts (projection fitted on training concepts only). *Picture R@k*: the same "
    "by the nearest real picture of each concept in the set, so it also rewards the right style, and the "
    "autoencoder's ceiling is near 1. *Nearest training picture*: mean cosine; a row far above the originals' "
    "would be copying. ± is the larger of the standard error over concepts (for KID the spread over subsets) and "
    "the standard deviation over sampling seeds."
)


def ratios(rows: Sequence[RowResult], reference: str = "teacher") -> dict[str, dict[str, dict[str, Any]]]:
    """Recall of every generated row over the reference's, with a bootstrap over concepts: row -> metric -> estimate."""
    base = next((row for row in rows if row.key == reference), None)
    if base is None:
        return {}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row is base or row.evaluations is None:
            continue
        for name, concepts in base.concepts.items():
            k = 1 if name == "motion" else 5
            estimate = recall_ratio(row.ranks[name], base.ranks[name], k, concepts)
            if estimate is not None:
                found.setdefault(row.key, {})["motion" if k == 1 else f"{name}_r{k}"] = estimate.to_dict()
    return found


def set_report(
    name: str,
    styles: Mapping[str, int],
    gallery: int,
    chance: Mapping[str, float],
    floor: Mapping[str, Estimate],
    rows: Sequence[RowResult],
) -> dict[str, Any]:
    """One test set's part of ``quality.json``."""
    return {
        "set": name,
        "title": TITLES[name],
        "pictures": sum(styles.values()),
        "styles": dict(styles),
        "gallery": gallery,
        "chance": dict(chance),
        "floor": {key: value.to_dict() for key, value in floor.items()},
        "rows": [row.to_dict() for row in rows],
        "over_teacher": ratios(rows),
    }


def write_report(folder: Path, report: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write ``quality.json`` and ``quality.md`` into ``folder``; returns their paths."""
    paths = folder / "quality.json", folder / "quality.md"
    write_json(paths[0], {"format": FORMAT, **report})
    write_text(paths[1], markdown(report))
    return paths


def markdown(report: Mapping[str, Any]) -> str:
    """The tables of ``quality.md``."""
    lines = [
        *heading("Quality on the held-out sets", report),
        f"Features are EfficientNet-Lite0's, computed in {report['features']['dtype']}. {_READING}",
    ]
    for entry in report["sets"]:
        lines += ["", f"## {entry['title']}", "", *_set_lines(entry)]
    notes = sorted({row["note"] for entry in report["sets"] for row in entry["rows"] if row["note"]})
    if notes:
        lines += ["", *notes]
    return "\n".join(lines) + "\n"


def _set_lines(entry: Mapping[str, Any]) -> list[str]:
    styles = ", ".join(f"{count} {style}" for style, count in sorted(entry["styles"].items()))
    lines = [
        f"{entry['pictures']} pictures ({styles}); gallery of {entry['gallery']} concepts; chance is "
        f"{entry['chance']['r1']:.3f} at 1 and {entry['chance']['r5']:.3f} at 5.",
        "",
        "| row | passes | " + " | ".join(title for _, title, _ in _COLUMNS) + " |",
        "|---|---:|" + "---:|" * len(_COLUMNS),
    ]
    for row in entry["rows"]:
        cells = [cell(row["metrics"].get(name), digits) for name, _, digits in _COLUMNS]
        lines.append(f"| {row['title']} | {row['evaluations'] or ''} | " + " | ".join(cells) + " |")
    floor = [cell(entry["floor"].get(name), digits) for name, _, digits in _COLUMNS]
    lines.append("| real against real (as many training pictures of the same styles) | | " + " | ".join(floor) + " |")
    return [*lines, *over_teacher_lines(entry)]


def over_teacher_lines(entry: Mapping[str, Any]) -> list[str]:
    """A sentence a row on what it keeps of the teacher."""
    lines: list[str] = []
    for key, values in entry["over_teacher"].items():
        shown = ", ".join(
            f"{name.replace('_r5', ' R@5')} {value['value']:.2f} ± {value['deviation']:.2f}"
            for name, value in values.items()
        )
        lines += ["", f"{key} over the teacher: {shown}."]
    return lines


def cell(estimate: Mapping[str, Any] | None, digits: int) -> str:
    """An estimate as it stands in a table."""
    if estimate is None:
        return ""
    value = f"{estimate['value']:.{digits}f}"
    if estimate["deviation"] == 0 or "spread" in estimate["over"]:
        return value
    return f"{value} ± {estimate['deviation']:.{digits}f}"


def heading(title: str, report: Mapping[str, Any], size: str = "") -> list[str]:
    """The title, and by what command, where and with what the report was made."""
    settings, device = report["settings"], report["device"]
    return [
        f"# {title}",
        "",
        f"Written by `{report['command']}` on {device['name']} ({device['cpus']} CPUs){size}. Sampling seeds "
        f"{', '.join(map(str, settings['seeds']))}; the teacher once. {versions_line(report)}",
        "",
    ]
