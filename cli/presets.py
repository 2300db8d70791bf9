"""`rmd presets`: every named cascade, a public student's with its source and licence, and what is not supported."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def command(
    backbone: Annotated[str | None, typer.Option(help="Only those of one backbone, such as sdxl.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the presets. No model is loaded.

    `rmd cascade show --preset NAME` shows one's steps; `rmd cascade write --preset NAME FOLDER` makes a folder of its
    weights a checkpoint.
    """
    from rmd.presets import PRESETS, preset_backbone
    from rmd.students import NOT_SUPPORTED

    names = [name for name in PRESETS if backbone in (None, preset_backbone(name))]
    if not names:
        known = ", ".join(dict.fromkeys(map(preset_backbone, PRESETS)))
        raise ValueError(f"--backbone {backbone!r} has no presets; the backbones with some are {known}")
    rows = [describe(name) for name in names]
    if json:
        import json as json_module

        typer.echo(json_module.dumps({"presets": rows, "not_supported": dict(NOT_SUPPORTED)}, indent=2))
        return
    for row in rows:
        guided = "" if row["guidance_scale"] == 1 else f", guidance {row['guidance_scale']:g}"
        typer.echo(f"{row['name']}: {row['backbone']}, {row['schedule']} at {_sizes(row['sizes'])}{guided}")
        for key in ("source", "files", "lora_strength", "licence", "note"):
            if row.get(key):
                typer.echo(f"    {key}: {row[key]}")
    if backbone is None:
        typer.echo("\nnot supported:")
        for name, reason in NOT_SUPPORTED.items():
            typer.echo(f"{name}: {reason}")


def describe(name: str) -> dict[str, Any]:
    """One preset's facts, ready for JSON."""
    from rmd.presets import preset, preset_backbone

    cascade = preset(name)
    return {
        "name": name,
        "backbone": preset_backbone(name),
        "schedule": cascade.schedule_name,
        "timesteps": [step.timestep for step in cascade.steps],
        "sizes": [str(step.size) for step in cascade.steps],
        "guidance_scale": cascade.guidance_scale,
        **origin(name),
    }


def origin(name: str) -> dict[str, Any]:
    """Where a public student's weights come from: source, files, licence and note, those that there are; and the
    strength of its LoRA where that is not 1."""
    from rmd.students import STEP_LISTS

    entry = STEP_LISTS.get(name)
    if entry is None:
        return {}
    licence = entry.licence or ("see the repository" if entry.source else "")
    found = {
        "source": entry.source,
        "files": entry.files,
        "lora_strength": None if entry.lora_strength == 1 else entry.lora_strength,
        "licence": licence,
        "note": entry.note,
    }
    return {key: value for key, value in found.items() if value}


def _sizes(sizes: list[str]) -> str:
    return ", ".join(dict.fromkeys(sizes))
