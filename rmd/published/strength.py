"""At which strength each LoRA of an import is merged, and which of them is the student's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmd.checkpoint import CASCADE_FILE
from rmd.published.files import ImportRefused
from rmd.published.lora import Lora
from rmd.published.past import imports_of, recorded
from rmd.students import STEP_LISTS


@dataclass(frozen=True)
class Strength:
    """A LoRA's factor, and who says it: the "option", the "preset" (its publication), or nobody ("default")."""

    value: float
    said_by: str


def published_strength(preset: str) -> float:
    """The strength at which a preset's own instructions merge its LoRA; 1 where they name none."""
    entry = STEP_LISTS.get(preset)
    return 1.0 if entry is None else entry.lora_strength


def strengths(
    preset: str, loras: Sequence[tuple[Path, float | None]], network: Path | None, in_base: bool
) -> list[Strength]:
    """The strength of each LoRA: as asked for, else the published one of the student's, and 1 of any other.

    Where the published one is not 1, the student's LoRA is known by the name that its publication gives the file. All
    others are styles where it is among those given, or in the base already.

    Args:
        preset: whose student it is.
        loras: each with what is asked for.
        network: the student's, where it is no LoRA.
        in_base: whether the denoiser that they are added to is the student already.

    Raises:
        ImportRefused: none is asked for, and whether the LoRA is the student's cannot be told.
    """
    own = published_strength(preset)
    if own == 1:
        return [Strength(1.0, "default") if asked is None else Strength(asked, "option") for _, asked in loras]
    students = [path for path, _ in loras if network is None and path.name == _published_file(preset)]
    found = []
    for path, asked in loras:
        if asked is not None:
            found.append(Strength(asked, "option"))
        elif path in students and not in_base:
            found.append(Strength(own, "preset"))
        elif path not in students and (students or in_base):
            found.append(Strength(1.0, "default"))
        else:
            raise ImportRefused(
                f"--lora {path}: preset {preset!r} is published with its LoRA {_published_file(preset)} at {own:g}, "
                f"and whether this one is the student's is not known here: give it a strength, --lora FILE:{own:g} for "
                f"the student's, --lora FILE:1 for a style"
            )
    return found


def holds_student(base: Path, preset: str) -> bool:
    """Whether a base is a checkpoint of the preset's student: of an import that merged it, or named so since."""
    if imports := imports_of(base):
        return bool(imports[0]["imported"].get("student")) and imports[0]["preset"] == preset
    schedules = recorded(base).get("schedules")
    known = schedules.values() if isinstance(schedules, dict) else ()
    return any(isinstance(schedule, dict) and schedule.get("name") == preset for schedule in known)


def refuse_twice(loras: Sequence[Lora], given: Sequence[Strength], base: Path, onto_base: Sequence[bool]) -> None:
    """Refuse a LoRA that would be added to the same weights twice.

    Args:
        loras, given: with their strengths.
        base: the base's diffusers folder.
        onto_base: of each, whether it changes a network of that folder, not only what is given in its place.

    Raises:
        ImportRefused: the same weights are given twice, or, without a strength, are in the base already.
    """
    merged = [
        sorted(map(str, lora["sha256"].values())) for record in imports_of(base) for lora in record["imported"]["loras"]
    ]
    if len(loras) < 2 and not merged:
        return  # nothing to compare a digest with
    seen: dict[tuple[str, ...], tuple[Lora, Strength]] = {}
    for lora, strength, onto in zip(loras, given, onto_base, strict=True):
        digests = sorted(lora.files.digests().values())
        other = seen.setdefault(tuple(digests), (lora, strength))
        if other[0] is not lora:
            raise ImportRefused(
                f"--lora {lora.path} holds the same weights as {other[0].path} and would be added twice: give it once, "
                f"with the strength that you want, --lora {lora.path}:{strength.value + other[1].value:g} for both"
            )
        if onto and digests in merged and strength.said_by != "option":
            raise ImportRefused(
                f"--lora {lora.path} is in {base} already, as its {CASCADE_FILE} says: leave it out, or say how much "
                f"is to be added to it, --lora {lora.path}:1"
            )


def strength_of(lora: Mapping[str, Any], preset: str) -> str:
    """A recorded LoRA's strength in words, with where it comes from."""
    told, own = f"{lora['strength']:g}", published_strength(preset)
    if own == 1:
        return told
    if lora.get("strength_from") == "preset":
        return f"{told}, as {preset} is published"
    if lora.get("strength_from") == "default":
        return f"{told}, since it is not {preset}'s own"
    return told if lora["strength"] == own else f"{told}, while {preset} is published at {own:g}"


def _published_file(preset: str) -> str:
    return STEP_LISTS[preset].files
