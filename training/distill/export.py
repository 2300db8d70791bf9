"""A distilled network to a checkpoint folder (diffusers and `cascade.json`), which counts once it was reloaded."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rmd.backbones.base import Backbone
from rmd.backbones.family import DiffusersBackbone
from rmd.backbones.folder import DiffusersFolder
from rmd.backbones.registry import get_backbone
from rmd.cascade import Cascade
from rmd.cascade_file import write_cascade_json
from rmd.checkpoint import CheckpointFolder, TeacherSpec
from rmd.published.exporting import keep_adapters
from rmd.published.factors import Factors
from rmd.published.place import check_out as check_place
from rmd.published.place import put_back, replace_folder
from rmd.sampler import initial_noise
from training.runtime.files import load_tensors, save_model

SHARED = (
    "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3", "scheduler",
)  # fmt: skip


class ExportError(ValueError):
    """The written folder does not give back what was trained."""


@dataclass(frozen=True)
class Export:
    """What goes into a checkpoint folder besides the weights.

    Attributes:
        backbone: key of the backbone registry.
        component: the denoiser's sub-folder.
        teacher_folder: where the shared components come from.
        cascades: by schedule name.
        default: the schedule that was trained.
        teacher_steps, teacher_guidance, flow_shift: the teacher's own sampling.
        record: of the distillation: settings, iterations, time.
        share: "copy" the shared components, or "link" them relatively.
        notice: text of NOTICE; the teacher's own by default.
        adapters: what a LoRA has learnt, by layer, if it was one; kept beside the merged weights.
        adapted: the folder whose denoiser they are to be added to; the teacher's by default.
    """

    backbone: str
    component: str
    teacher_folder: Path
    cascades: Mapping[str, Cascade]
    default: str
    teacher_steps: int
    teacher_guidance: float
    flow_shift: float = 1.0
    record: Mapping[str, Any] = field(default_factory=dict)
    share: Literal["copy", "link"] = "copy"
    notice: str | None = None
    adapters: Mapping[str, Factors] = field(default_factory=dict)
    adapted: Path | None = None


def check_out(out: Path, teacher_folder: Path) -> None:
    """Refuse to write where something else than a former export would be lost.

    Raises:
        ValueError: `out` is the teacher, or see :func:`rmd.published.place.check_out`.
    """
    if out.resolve() == teacher_folder.resolve():
        raise ValueError(f"--out {out} is the teacher's own folder, which the export would replace; give another --out")
    check_place(out, teacher_folder)


@torch.no_grad()
def export_checkpoint(network: Any, out: Path, export: Export, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a checkpoint folder in one rename, after it was loaded again and compared tensor by tensor.

    Args:
        network: the diffusers model of the denoiser, LoRA merged; it is left as it was.
        out: the folder; an older one of that name is replaced.
        export: everything else.
        dtype: of the stored weights.

    Returns:
        `out`.

    Raises:
        ExportError: a reloaded tensor differs, or the reloaded model gives values that are not finite.
        ValueError: see :func:`check_out`.
        FileNotFoundError: the teacher's folder lacks a component.
    """
    check_out(out, export.teacher_folder)
    out = out.resolve()  # of a link, what it leads to
    out.parent.mkdir(parents=True, exist_ok=True)
    put_back(out)
    scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        expected = _write_network(network, scratch / export.component, dtype)
        _write_shared(scratch, out, export)
        if export.adapters:
            keep_adapters(scratch, export.backbone, export.adapters, export.adapted or export.teacher_folder)
        write_cascade_json(
            scratch,
            backbone=export.backbone,
            cascades=export.cascades,
            default=export.default,
            teacher=TeacherSpec(
                export.teacher_steps,
                export.teacher_guidance,
                export.flow_shift,
                folder=os.path.relpath(_physical(export.teacher_folder), out),
            ),
            distillation=export.record,
        )
        (scratch / "README.md").write_text(model_card(out.name, export), encoding="utf-8")
        (scratch / "NOTICE").write_text(_notice(export), encoding="utf-8")
        verify(scratch, export, expected, dtype)
        replace_folder(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return out


def _physical(path: Path) -> Path:
    """The path without links or dots before its last part: relative paths from it mean what they say."""
    path = Path.cwd() / path
    return path.parent.resolve() / path.name


def _write_network(network: Any, folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Save the network in `dtype`; returns what was stored."""
    state = {
        name: (value.to(dtype) if value.is_floating_point() else value).detach().contiguous().cpu()
        for name, value in network.state_dict().items()
    }
    save_model(network, folder, dtype)
    return state


def _write_shared(scratch: Path, out: Path, export: Export) -> None:
    teacher = export.teacher_folder
    index = teacher / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"{index} does not exist; --teacher must be a diffusers folder")
    shutil.copy2(index, scratch / index.name)
    for name in SHARED:
        source = teacher / name
        if not source.is_dir():
            continue
        # A teacher may itself link into the folder that is being replaced: that must become a real copy.
        if export.share == "link" and out not in source.resolve().parents:
            # The scratch folder stands beside the final one, so the relative path is the same.
            (scratch / name).symlink_to(os.path.relpath(source.resolve(), scratch), target_is_directory=True)
        else:
            shutil.copytree(source, scratch / name, symlinks=False)


def _notice(export: Export) -> str:
    if export.notice is not None:
        return export.notice
    for name in ("NOTICE", "NOTICE.md", "LICENSE", "LICENSE.md"):
        path = export.teacher_folder / name
        if path.is_file():
            return path.read_text(encoding="utf-8")
    return f"Distilled from {export.teacher_folder.name}. The teacher's licence and credits apply to these weights.\n"


def model_card(name: str, export: Export) -> str:
    """The README of a checkpoint folder."""
    cascade = export.cascades[export.default]
    record = dict(export.record)
    steps = "\n".join(
        f"| {index} | {step.size} | {step.timestep} | {step.teacher_timestep} |"
        for index, step in enumerate(cascade.steps)
    )
    lines = [f"- {key.replace('_', ' ')}: {value}" for key, value in record.items() if not isinstance(value, dict)]
    before = record.get("initial")
    while before:
        lines.append(
            f"- before that: {before.get('iterations')} iterations of batch size {before.get('batch_size')} with "
            f"guidance scale {before.get('guidance_scale')} in {before.get('seconds')} seconds, on "
            f"{before.get('device')}"
        )
        before = before.get("initial")
    facts = "\n".join(lines)
    return f"""# {name}

A few-step student of the backbone `{export.backbone}`, distilled with {record.get("method", "rmd").upper()} from
`{export.teacher_folder.name}` ({export.teacher_steps} steps, guidance {export.teacher_guidance:g}). The student itself
needs no guidance.

Schedule **{export.default}** ({cascade.num_steps} network passes):

| step | size | timestep | teacher's timestep |
|---:|---|---:|---:|
{steps}

{facts}

`cascade.json` holds the schedules ({", ".join(export.cascades)}; trained for {export.default}), the intensity of noise
re-injection at inference ({cascade.transition_noise_intensity:g}) and the settings of the distillation. The weights are
bfloat16 safetensors.

```
rmd generate --checkpoint path/to/{name} "a prompt"
rmd serve --checkpoint path/to/{name}
```

Credits and licences: see NOTICE.
"""


@torch.no_grad()
def verify(folder: Path, export: Export, expected: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Load the written network as a user would, compare every tensor, and run the default schedule's first step.

    Text encoders and decoder are the teacher's own files. One step at the low size, of a film one frame: on a CPU more
    would take hours for a large model, and the comparison has shown that the weights are the trained ones.

    Raises:
        ExportError: something differs or is not finite.
    """
    stored: dict[str, Tensor] = {}
    for file in sorted((folder / export.component).glob("*.safetensors")):
        stored |= load_tensors(file)
    missing = sorted(set(expected) ^ set(stored))
    if missing:
        raise ExportError(f"the export has other weights than the network: {len(missing)}, such as {missing[0]!r}")
    for name, value in expected.items():
        if not torch.equal(stored[name], value):
            raise ExportError(f"the exported weight {name!r} differs from the trained one")
    backbone = _network_alone(folder, export, dtype)
    denoiser = backbone.component_modules()["denoiser"]
    reloaded = dict(denoiser.named_parameters())
    prefix = next(iter(dict(denoiser.named_children()))) + "."
    for name, parameter in reloaded.items():
        plain = name.removeprefix(prefix)
        if plain not in expected or not torch.equal(parameter.cpu(), expected[plain].to(parameter.dtype)):
            raise ExportError(f"the reloaded parameter {plain!r} differs from the trained one")
    first = CheckpointFolder.read(folder).default_cascade.steps[0]
    size = replace(first.size, num_frames=1)
    noise, t = initial_noise(backbone.latent_shape(size), [0]), torch.tensor([first.t], dtype=torch.float64)
    x0 = backbone.predict_x0(noise, t, backbone.random_conditioning(1), size)
    if not bool(torch.isfinite(x0).all()):
        raise ExportError("the reloaded model gives values that are not finite")


def _network_alone(folder: Path, export: Export, dtype: torch.dtype) -> Backbone:
    """The backbone over its denoiser, without text encoders (11 GB of Wan's) and decoder."""
    kind = get_backbone(export.backbone)
    assert issubclass(kind, DiffusersBackbone)
    source, cpu = DiffusersFolder.open(folder), torch.device("cpu")
    configs = {name: source.config(name) for name in (export.component, "scheduler")}
    stored = kind.component_dtype(export.component, configs[export.component], dtype)
    network = source.load(export.component, kind.components[export.component], stored, cpu, weights=True)
    return kind({export.component: network}, configs=configs, tokenizers={}, dtype=dtype, device=cpu)
