"""Runs cases one after the other, each in a process with its own deadline, and writes the report after every row.

    python -m bench.gpu.harness --part 1 --device cuda --out benchmarks/gpu

Torch-free: a case that crashes the interpreter, hangs in a driver or eats all memory costs its own later rows alone.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.files import write_report
from bench.gpu.cases import CASES, Case, find

_LOOK_SECONDS = 0.2
_LEAST_SECONDS = 10.0  # no case says anything in less
_SAID_LINES = 15


@dataclass(frozen=True)
class Settings:
    """How a part is run.

    Attributes:
        device: "cuda" or "cpu".
        scale: "full", or "tiny" for a rehearsal.
        out: folder of the report, of the cases' rows and of what they said.
        minutes: for all cases together; one for which too little is left is not begun.
        patience: factor on the cases' own deadlines, for a slow machine.
    """

    device: str
    scale: str
    out: Path
    minutes: float = 8.0
    patience: float = 1.0


def run_cases(
    cases: Sequence[Case],
    settings: Settings,
    command: Callable[[Case, Path], Sequence[str]] | None = None,
    progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run cases and write ``gpu-<parts>.json`` and ``.md`` after every row.

    Args:
        cases: in this order.
        settings: see :class:`Settings`.
        command: of a case that writes its rows into a file; None: :mod:`bench.gpu.case`.
        progress: told of every end.

    Returns:
        the content of the JSON file.
    """
    until = time.monotonic() + 60 * settings.minutes
    content: dict[str, Any] = {
        "format": 1,
        "kind": "gpu",
        "command": f"python -m bench.gpu.harness {' '.join(sys.argv[1:])}".strip(),
        "device": settings.device,
        "scale": settings.scale,
        "cases": [],
    }
    stem = "gpu-" + "".join(str(part) for part in sorted({case.part for case in cases}))
    for case in cases:
        entry: dict[str, Any] = {"case": case.name, "decides": case.decides, "rows": [], "ended": "running"}
        content["cases"].append(entry)
        left = until - time.monotonic()
        if left < _LEAST_SECONDS:
            entry["ended"] = "not begun: out of time"
        else:
            rows = settings.out / "rows" / f"{case.name}.jsonl"
            words = (command or _command(settings))(case, rows)
            limit = min(case.seconds * settings.patience, left)

            def written(entry: dict[str, Any] = entry) -> None:
                write_report(settings.out, stem, content, markdown(content))

            _run(case, words, rows, limit, settings.out, entry, written)
        write_report(settings.out, stem, content, markdown(content))
        progress(f"{case.name}: {len(entry['rows'])} rows, {entry['ended']}")
    return content


def _command(settings: Settings) -> Callable[[Case, Path], Sequence[str]]:
    def words(case: Case, rows: Path) -> Sequence[str]:
        given = [
            "--device",
            settings.device,
            "--scale",
            settings.scale,
            "--rows",
            str(rows),
            "--out",
            str(settings.out),
        ]
        return [sys.executable, "-X", "faulthandler", "-m", "bench.gpu.case", case.name, *given]

    return words


def _run(
    case: Case,
    words: Sequence[str],
    rows: Path,
    limit: float,
    out: Path,
    entry: dict[str, Any],
    written: Callable[[], None],
) -> None:
    """One case: its rows into ``entry`` as they come, how it ended, and its last words where it did not end well."""
    rows.parent.mkdir(parents=True, exist_ok=True)
    rows.unlink(missing_ok=True)
    log = out / "logs" / f"{case.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    # Compiled kernels are kept for the cases after, and for a second try.
    caches = {"TORCHINDUCTOR_CACHE_DIR": out / "cache" / "inductor", "TRITON_CACHE_DIR": out / "cache" / "triton"}
    environment = {**os.environ, **{name: str(path.absolute()) for name, path in caches.items()}, **case.environment}
    began = time.monotonic()
    with log.open("wb") as said:
        process = subprocess.Popen(
            words, stdout=said, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            stopped = False
            while process.poll() is None:
                if time.monotonic() - began > limit:
                    stopped = True
                    break
                time.sleep(_LOOK_SECONDS)
                if _take_rows(rows, entry):
                    written()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its compilers too
            code = process.wait()
    _take_rows(rows, entry)
    entry["seconds"] = round(time.monotonic() - began, 1)
    if stopped:
        entry["ended"] = f"stopped after {limit:.0f} s"
    elif code < 0:
        entry["ended"] = f"died: {signal.Signals(-code).name}"
    else:
        entry["ended"] = "done" if code == 0 else f"failed with exit code {code}"
    if entry["ended"] != "done":
        entry["said"] = log.read_text(errors="replace").strip().splitlines()[-_SAID_LINES:]


def _take_rows(path: Path, entry: dict[str, Any]) -> bool:
    """Whether rows have come since; the last line may be half-written."""
    if not path.is_file():
        return False
    whole = path.read_text().rpartition("\n")[0].splitlines()
    new = [json.loads(line) for line in whole[len(entry["rows"]) :]]
    entry["rows"] += new
    return bool(new)


def markdown(content: Mapping[str, Any]) -> str:
    """The rows as a table, and what AOTInductor's stages say."""
    lines = ["# On a lent GPU", "", f"Written by `{content['command']}`.", ""]
    if content["scale"] == "tiny":
        lines += ["**A rehearsal with tiny networks: the figures say nothing of the real models.**", ""]
    lines += ["| case | what | ms | |", "|---|---|---:|---|"]
    for entry in content["cases"]:
        for row in entry["rows"]:
            rest = ", ".join(f"{name} {value}" for name, value in row.items() if name not in ("what", "ms"))
            lines.append(f"| {entry['case']} | {row['what']} | {row.get('ms', '')} | {rest} |")
        if entry["ended"] != "done":
            last = next(iter(reversed(entry.get("said", []))), "")
            lines.append(f"| {entry['case']} | *{entry['ended']}* | | {last[:200].replace('|', '/')} |")
    said = verdict({entry["case"]: entry["ended"] for entry in content["cases"]})
    return "\n".join([*lines, *(["", said] if said else [])]) + "\n"


def verdict(ended: Mapping[str, str]) -> str:
    """Which suspect AOTInductor's stages leave, from how each ended; "" while they have not all."""
    stages = ("aoti-compile", "aoti-load", "aoti-run", "aoti-inside", "aoti-replay")
    if any(ended.get(stage, "running").startswith(("running", "not begun")) for stage in stages):
        return ""
    well = {stage.removeprefix("aoti-"): ended[stage] == "done" for stage in stages}
    if not well["compile"]:
        return "AOTInductor does not compile here: see its log."
    if all(well.values()):
        return "AOTInductor works here in every stage."
    if well["run"]:
        return (
            "AOTInductor runs, and cannot be recorded as a CUDA graph."
            if not well["replay"]
            else "Only stage " + ("inside" if not well["inside"] else "load") + " of AOTInductor fails."
        )
    if well["inside"]:
        return "AOTInductor runs with its weights inside and not with ours outside: the fault is in how they are given."
    return (
        "AOTInductor dies with its weights inside too, as in pytorch issue 166415: it is the version's own fault; keep "
        "torch.compile or graphs of eager there."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a part, or the cases that are named."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.harness", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", type=int, choices=(1, 2), help="of the list; the first is the more valuable")
    parser.add_argument("--cases", help="named ones instead, comma-separated")
    parser.add_argument("--list", action="store_true", help="the cases, with their seconds and what they decide")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", default="full", choices=("full", "tiny"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--patience", type=float, default=1.0, help="factor on every case's own deadline")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/gpu"))
    given = parser.parse_args(arguments)
    if given.list:
        for case in CASES:
            print(f"{case.part}  {case.name:<18} {case.seconds:4.0f} s  {case.decides}")
        return 0
    named = [find(name) for name in given.cases.split(",")] if given.cases else []
    cases = named or [case for case in CASES if case.part == given.part]
    if not cases:
        parser.error("give --part 1, --part 2 or --cases")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the case at hand too; its rows are written
    settings = Settings(given.device, given.scale, given.out, given.minutes, given.patience)
    content = run_cases(cases, settings, progress=lambda said: print(said, flush=True))
    return 0 if all(entry["ended"] == "done" for entry in content["cases"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
