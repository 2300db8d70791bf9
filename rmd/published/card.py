"""The README and NOTICE of an imported checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rmd.cascade import Cascade
from rmd.published.place import finished_file
from rmd.published.strength import strength_of

_NOTICES = ("NOTICE", "NOTICE.md", "LICENSE", "LICENSE.md", "LICENSE.txt")


def model_card(name: str, cascade: Cascade, record: Mapping[str, Any]) -> str:
    """The README of an imported checkpoint folder: what was merged, from which files, under which licences."""
    imported = record["imported"]
    rows = _rows(record)
    steps = "\n".join(f"| {index} | {step.size} | {step.timestep} |" for index, step in enumerate(cascade.steps))
    left = imported["left_out"]
    out = (
        f"\nLeft out, since the network has no place for it: {len(left)} keys, listed in `cascade.json`.\n"
        if left
        else ""
    )
    student = imported.get("student")
    licence = (student and student["licence"]) or "not confirmed"
    note = f"\n{note_line(cascade)}\n" if cascade.note else ""
    whose = f", which is of `{student['source']}` (licence, as it was read: {licence})" if student else ""
    return f"""# {name}

Published weights, merged in float32 and rounded once, sampled as the preset `{record["preset"]}` says{whose}.

| part | name | licence | files (sha256) |
|---|---|---|---|
{chr(10).join(rows)}
{out}
Schedule **{cascade.schedule_name}** ({cascade.num_steps} steps, guidance {cascade.guidance_scale:g}):

| step | size | timestep |
|---:|---|---:|
{steps}
{note}
```
rmd generate --checkpoint path/to/{name} "a prompt"
rmd serve --checkpoint path/to/{name}
```
"""


def note_line(cascade: Cascade) -> str:
    """A schedule's note in a README."""
    return f"**Schedule {cascade.schedule_name}: {cascade.note}.**"


def add_note(folder: Path, cascade: Cascade) -> None:
    """Say a schedule's note in a folder's README too, which stays otherwise as it is; a folder without one gets one.

    A README that is a link (a hub's cache has such) is replaced, and what it leads to stays.
    """
    if not cascade.note:
        return
    path, line = folder / "README.md", note_line(cascade).encode()
    before = path.read_bytes() if path.is_file() else f"# {folder.resolve().name}\n".encode()
    if line in before:
        return
    with finished_file(path) as partial:
        partial.write_bytes(before + (b"" if before.endswith(b"\n") else b"\n") + b"\n" + line + b"\n")


def _rows(record: Mapping[str, Any], within: str = "") -> list[str]:
    """A row of each part, and of what a base that was imported itself was made of."""
    imported = record["imported"]
    base = imported["base"]
    rows = [_row(f"{within}base", base)]
    if imported.get("network"):
        rows.append(_row(f"{within}network", imported["network"]))
    for lora in imported["loras"]:
        scales = ", ".join(f"{scale:g}" for scale in lora["scales"][:4]) + (", ..." if len(lora["scales"]) > 4 else "")
        rows.append(_row(f"{within}LoRA at {strength_of(lora, record['preset'])} (factors {scales or 'none'})", lora))
    before = base.get("distillation")
    return rows + (_rows(before, f"in {base['name']}: ") if before else [])


def _row(part: str, entry: Mapping[str, Any]) -> str:
    name = entry["name"] + (f" at {entry['revision']}" if entry.get("revision") else "")
    files = "<br>".join(f"{file} `{digest[:16]}`" for file, digest in entry["sha256"].items())
    return f"| {part} | {name} | {entry['licence'] or 'not said in the file'} | {files} |"


def notice(base: Path, record: Mapping[str, Any]) -> str:
    """The base's own notice and licence texts, behind a line on each part's licence."""
    imported = record["imported"]
    parts = [imported["base"], *([imported["network"]] if imported["network"] else []), *imported["loras"]]
    lines = [f"{part['name']}: {part['licence'] or 'licence not said in the file; see its page'}" for part in parts]
    head = "These weights were made from the following, whose licences and credits apply to them.\n"
    files = [base / name for name in _NOTICES if (base / name).is_file()]
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    return "\n\n----\n\n".join(["\n".join([head, *lines]), *texts]) + "\n"
