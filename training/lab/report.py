"""`docs/results.md` with its plots and its sheet, from the committed results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean

from training.lab.grid import Expectation, Grid, Table
from training.lab.job import STRIPS
from training.lab.plots import draw_plots, draw_sheet
from training.lab.results import Results
from training.lab.statistics import Difference, spread
from training.runtime.files import write_text

_READING = """\
A pair of sizes that two CPU cores can train: {low} to {full}, the shipped picture model at half its sides. Every row is
a distillation of the same teacher, {updates} generator updates of batch {batch} from a start that all rows of its
schedule and training seed share. What is measured: {limit} held-out pictures of each set ({sets}), each drawn with
{samplings} sampling seeds; metrics as in [evaluation.md](evaluation.md), over all sets together. **Log rank** is the
mean of log2(1 + rank) of the picture's own concept by text, lower is better: it tells rows apart whose recalls differ
by chance. *Difference* is of log rank to the table's reference row, paired by picture, sampling seed and training seed;
the interval is 95 % of a bootstrap over training seeds and concepts. One that holds zero is a null: no difference was
seen. With one training seed the interval is over concepts alone and says nothing of another run; with two or three it
is still narrow, since so few runs can hardly show their own spread. ± is the standard deviation over training seeds.

*Equal updates* are {updates}; at *equal compute* a student is measured when it has cost as many network passes as
`{reference}` at {updates} updates. Passes are counted in tokens, text's included, not timed: seconds would compare how
busy the machines were. Rates are constant and snapshots averaged, so that a row does not gain from when its run ends.
Speed is counted likewise: one picture's passes over the guided teacher's, denoising alone.

```
rmd data
rmd lab teacher                  # only for a teacher of your own; models/embedded-lab-teacher is the one measured here
rmd lab plan                     # the grid, its cost, what is expected
rmd lab run --jobs 2 --minutes 60   # any number of these share the queue; the same command goes on
rmd lab report                   # this page, from benchmarks/lab
```"""


def write_results(grid: Grid, folder: Path, out: Path) -> list[Path]:
    """Write the page and, beside it, ``<name>.png`` (plots) and ``<name>-sheet.webp`` (pictures, seed 0).

    Returns:
        the written files.

    Raises:
        ValueError: see :meth:`Results.read`.
    """
    results = Results.read(grid, folder)
    plots = draw_plots(grid, results, out.with_suffix(".png"))
    sheet = draw_sheet(grid, results, folder / STRIPS, out.with_name(f"{out.stem}-sheet.webp"))
    write_text(out, page(grid, results, [path.name for path in (plots, sheet) if path is not None]))
    return [path for path in (out, plots, sheet) if path is not None]


def page(grid: Grid, results: Results, pictures: Iterable[str] = ()) -> str:
    """The text of the page."""
    lines = ["# Results of the lab", "", "Written by `rmd lab report`; `rmd lab plan` prints the grid.", ""]
    lines += [_reading(grid), "", *_standing(grid, results), "", *_variance(grid, results)]
    lines += ["", "## What was expected, and what came out", "", *_expectations(grid, results)]
    for table in grid.tables:
        if shown := [key for key in table.rows if key in results.files]:
            lines += ["", f"## {table.title}", "", *_table(grid, results, table, shown)]
    lines += ["", *_intensities(grid, results)]
    lines += [line for name in pictures for line in ("", f"![{name}]({name})")]
    return "\n".join(lines).rstrip() + "\n"


def _reading(grid: Grid) -> str:
    sides = sorted({side for schedule in grid.schedules.values() for side in schedule.sides})
    return _READING.format(
        low=f"{sides[0]} px",
        full=f"{sides[-1]} px",
        updates=grid.updates,
        batch=grid.base.get("batch_size", 32),
        limit=grid.evaluation.limit,
        sets=", ".join(f"{name.replace('_', ' ')}s" for name in grid.evaluation.sets),
        samplings=len(grid.evaluation.seeds),
        reference=grid.reference,
    )


def _standing(grid: Grid, results: Results) -> list[str]:
    jobs = grid.jobs()
    done = sum(job.seed in results.files.get(job.row.key, {}) for job in jobs)
    waiting = {row.key: grid.unavailable(row) for row in grid.rows if grid.unavailable(row)}
    lines = [f"{done} of {len(jobs)} runs are done."]
    if done < len(jobs):
        lines = [f"**Preliminary**: {lines[0]}"]
    if others := results.of_other_settings():
        lines += [
            "",
            "**Made by several versions of the settings or in several dtypes**, not to be compared: "
            + "; ".join(others)
            + ".",
        ]
    machines = sorted({content["device"]["name"] for seeds in results.files.values() for content in seeds.values()})
    if machines:
        lines += ["", f"Trained and measured on: {', '.join(machines)}."]
    if waiting:
        lines += ["", "Not yet available with this version: " + ", ".join(f"`{key}`" for key in waiting) + "."]
    return lines


def _variance(grid: Grid, results: Results) -> list[str]:
    """How far runs of one recipe are apart that differ by the training seed alone."""
    key = grid.reference
    title = ["## Training seeds", ""]
    ranks = {seed: float(values.mean()) for seed, values in results.log_ranks(key).items()}
    if not ranks:
        return [*title, f"`{key}` is not yet run."]
    shown = [
        f"| {seed} | {rank:.2f} | {results.recalls(key)[seed]:.3f} | {results.kids(key)[seed]:.0f} |"
        for seed, rank in sorted(ranks.items())
    ]
    deviation = spread(list(ranks.values()))
    said = (
        "One seed as yet: nothing is known of the spread."
        if deviation is None
        else f"Log rank differs by {deviation:.3f} (standard deviation) between training seeds."
    )
    return [*title, f"`{key}`, seeds that differ in noise, prompts' order and start:", "",
            "| seed | log rank | text R@5 | KID x 1e3 |", "|---:|---:|---:|---:|", *shown, "", said]  # fmt: skip


def _expectations(grid: Grid, results: Results) -> list[str]:
    lines = ["| expected | because | difference in log rank | |", "|---|---|---|---|"]
    for expected in grid.expectations:
        first, second = expected.rows
        relation = "better than" if expected.claim == "better" else "no different from"
        difference = results.difference(first, second)
        lines.append(
            f"| {first} {relation} {second} | {expected.why} | {difference_cell(difference)} "
            f"| {verdict(expected, difference)} |"
        )
    return lines


def verdict(expected: Expectation, difference: Difference | None) -> str:
    """Whether it came out as expected."""
    if difference is None:
        return "not yet run"
    if expected.claim == "alike":
        outcome = "a difference, not expected" if difference.seen else "as expected: none seen"
    elif not difference.seen:
        outcome = "no difference seen"
    else:
        outcome = "as expected" if difference.value < 0 else "the opposite"
    return outcome if difference.seeds > 1 else f"{outcome} (one training seed)"


def difference_cell(difference: Difference | None) -> str:
    """A difference as it stands in a table."""
    if difference is None:
        return ""
    return f"{difference.value:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"


def _table(grid: Grid, results: Results, table: Table, shown: list[str]) -> list[str]:
    lines = [f"The paper: {table.paper}", ""] if table.paper else []
    lines += [
        "| | seeds | speed | log rank | difference | text R@5 | picture R@5 | KID x 1e3 | at equal compute: log rank "
        "| difference |",
        "|---|---:|---:|---:|---|---:|---:|---:|---:|---|",
    ]
    base = results.sampling_cost("teacher") if "teacher" in results.files else None
    for key in shown:
        ranks = {seed: float(values.mean()) for seed, values in results.log_ranks(key).items()}
        cells = [
            grid.row(key).title,
            str(len(ranks)),
            f"{base / results.sampling_cost(key):.1f}" if base else "",
            _mean(ranks, 2),
            difference_cell(results.difference(key, table.against)) if key != table.against else "",
            _mean(results.recalls(key), 3),
            _mean(results.recalls(key, kind="picture"), 3),
            _mean(results.kids(key), 0),
        ]
        if grid.row(key).weights == "student":
            compute = {seed: float(values.mean()) for seed, values in results.log_ranks(key, "compute").items()}
            cells += [_mean(compute, 2)]
            cells += [
                difference_cell(results.difference(key, table.against, "compute")) if key != table.against else ""
            ]
        else:
            cells += ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    absent = [key for key in table.rows if key not in shown]
    return [*lines, "", "Not yet run: " + ", ".join(f"`{key}`" for key in absent) + "."] if absent else lines


def _mean(values: Mapping[int, float], digits: int) -> str:
    if not values:
        return ""
    numbers = list(values.values())
    deviation = spread(numbers)
    return f"{fmean(numbers):.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def _intensities(grid: Grid, results: Results) -> list[str]:
    """Eq. 10's `a` at inference, where finished students were sampled with several."""
    lines: list[str] = []
    for row in grid.rows:
        own = row.sample.get("transition_noise_intensity", 1.0)
        for a in (*row.intensities, own):
            intensity = "" if a == own else f"{a:g}"
            ranks = {seed: float(v.mean()) for seed, v in results.log_ranks(row.key, intensity=intensity).items()}
            if ranks and row.intensities:
                kid = _mean(results.kids(row.key, intensity=intensity), 0)
                lines.append(f"| {row.title} | {a:g} | {_mean(ranks, 2)} | {kid} |")
    if not lines:
        return []
    head = ["## Noise intensity at inference", "", "| | a | log rank | KID x 1e3 |", "|---|---:|---:|---:|"]
    return [*head, *lines]
