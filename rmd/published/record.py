"""The record of an import, for ``cascade.json`` and the card."""

from __future__ import annotations

from typing import Any

from rmd.published.files import WeightFiles
from rmd.published.gathering import Work, is_bases_own, lacks_student
from rmd.published.lora import Lora
from rmd.published.past import imports_of
from rmd.published.source import licence_of
from rmd.published.strength import Strength
from rmd.students import STEP_LISTS


def import_record(work: Work) -> dict[str, Any]:
    """What was merged: names, sha256 digests, factors and licences; no paths of this machine.

    Of a base that was imported itself, its own record is kept: what is in it is in the result.
    """
    base, request = work.base, work.request
    folder = base.folder.path
    taken = [name for name in work.kind.components if is_bases_own(work, name)]
    files = {
        f"{name}/{file}": digest
        for name in taken
        if base.folder.has(name)
        for file, digest in WeightFiles.open(folder / name).digests().items()
    }
    if base.single is not None:
        files |= base.single.digests()
    imported: dict[str, Any] = {
        "base": {
            "name": base.name,
            "revision": base.revision,
            "licence": licence_of(base.single, folder if base.single is None else None),
            "sha256": files,
        },
        "network": None,
        "loras": [
            _lora_record(work, lora, strength) for lora, strength in zip(work.loras, work.strengths, strict=True)
        ],
        "left_out": list(work.left_out),
    }
    if base.single is None and (before := imports_of(folder)):
        imported["base"]["distillation"] = before[0]
    student = work.network_files
    if student is not None:
        imported["network"] = {
            "name": student.path.name,
            "licence": licence_of(student, student.path if student.path.is_dir() else None),
            "sha256": student.digests(),
        }
    entry = STEP_LISTS.get(request.preset)
    if entry is not None and entry.source and not lacks_student(work):  # many a file says nothing of itself
        imported["student"] = {"source": entry.source, "licence": entry.licence or None}
    if request.fold_guidance is not None:
        imported["folded_guidance"] = request.fold_guidance
    return {"method": "import", "preset": request.preset, "imported": imported}


def _lora_record(work: Work, lora: Lora, strength: Strength) -> dict[str, Any]:
    scales = {
        round(change.scale, 6)
        for parameters in work.plan.changes.values()
        for changes in parameters.values()
        for change in changes
        if change.lora is lora and len(change.parts) == 2
    }
    return {
        "name": lora.path.name,
        "strength": lora.strength,
        "strength_from": strength.said_by,
        "scales": sorted(scales),
        "parameters": work.plan.modules(lora),
        "licence": licence_of(lora.files, lora.path if lora.path.is_dir() else None),
        "sha256": lora.files.digests(),
    }
