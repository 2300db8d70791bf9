"""The grid as text: what runs in which order, what it costs, what stands, what is expected."""

from __future__ import annotations

from pathlib import Path

from training.lab.cost import PASSES_A_SECOND, row_cost, sampling_cost, snapshots, teacher_size, training_passes
from training.lab.grid import Grid, Row


def plan_text(grid: Grid, root: Path, results: Path) -> str:
    """The plan.

    Args:
        root: whose runs are looked at.
        results: whose files say what is done.
    """
    able = [row for row in grid.rows if not grid.unavailable(row)]
    jobs = grid.jobs()
    done = {job.name for job in jobs if (results / f"{job.name}.json").is_file()}
    hours = sum(training_passes(grid, job.row) for job in jobs if job.name not in done) / PASSES_A_SECOND / 3600
    lines = [
        f"{len(jobs)} jobs: {len(able)} rows, training seeds {', '.join(map(str, grid.seeds))} ({grid.reference} "
        f"first, with all of them); {len(done)} done. What is left trains for {hours:.1f} hours of two AMX cores, "
        f"{PASSES_A_SECOND} passes a second; common starts and measuring come on top.",
        "",
        "cost: an update, in forward passes of a sample at the teacher's side; sampling: a picture, likewise.",
        "updates: generator updates to be measured after, at equal updates and at equal compute.",
        "",
        f"{'row':18} {'schedule':14} {'cost':>5} {'sampling':>8} {'updates':>12} {'min':>5}  state",
    ]
    lines += [_row_line(grid, row, root, results) for row in grid.rows]
    lines += ["", "Expected beforehand:"]
    for expected in grid.expectations:
        first, second = expected.rows
        relation = "better than" if expected.claim == "better" else "no different from"
        lines.append(f"- {first} {relation} {second}: {expected.why}")
    return "\n".join(lines)


def _row_line(grid: Grid, row: Row, root: Path, results: Path) -> str:
    cascade = grid.cascade(row)
    sampling = sampling_cost(cascade, teacher_size(grid)) * (2 if row.weights == "teacher" else 1)
    head = f"{row.key:18} {row.schedule:14}"
    if reason := grid.unavailable(row):
        return f"{head} {'':5} {sampling:8.2f} {'':12} {'':5}  not yet available: {reason.split(';')[0]}"
    if row.weights != "student":
        cost, updates, minutes = "", "", ""
    else:
        cost = f"{row_cost(grid, row):.1f}"
        updates = " / ".join(map(str, snapshots(grid, row).values()))
        minutes = f"{training_passes(grid, row) / PASSES_A_SECOND / 60:.0f}"
    return f"{head} {cost:>5} {sampling:8.2f} {updates:>12} {minutes:>5}  {_state(grid, row, root, results)}"


def _state(grid: Grid, row: Row, root: Path, results: Path) -> str:
    names = [job.name for job in grid.jobs() if job.row.key == row.key]
    done = [name for name in names if (results / f"{name}.json").is_file()]
    begun = [name for name in names if name not in done and (root / "runs" / name / "checkpoints").is_dir()]
    parts = [f"{len(done)} of {len(names)} done"] if done or not begun else []
    return ", ".join([*parts, *(f"{name} begun" for name in begun)])
