"""LoRA out: what distillation changed in a denoiser, as factors in a file that other tools read.

Of a run that trained adapters (``lora_rank``), its checkpoint holds them in :data:`ADAPTERS`, and they are written as
they are. Otherwise the whole difference against a base is cut to a rank, layer by layer.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rmd.backbones.family import DiffusersBackbone
from rmd.backbones.folder import DiffusersFolder
from rmd.backbones.random_weights import build_random
from rmd.backbones.registry import get_backbone
from rmd.checkpoint import CheckpointFolder
from rmd.published.factors import Factors, best_factors, smallest_rank, squared_singular_values
from rmd.published.files import ImportRefused, WeightFiles, finite, refuse_other_formats
from rmd.published.lora import DIFFUSERS_CONFIG, PEFT_CONFIG, PEFT_WEIGHTS, Lora
from rmd.published.lora_names import LoraFormat, check_format, default_format, named
from rmd.published.past import imports_of, parts_of
from rmd.published.place import readable, whole_folder
from rmd.published.source import Base, licence_of, open_base

ADAPTERS = "pytorch_lora_weights.safetensors"
"""In a checkpoint folder, what was trained; the name that diffusers looks for in a folder."""
_SHOWN = 6


@dataclass(frozen=True)
class Denoiser:
    """A checkpoint's denoiser, by its configuration.

    Attributes:
        family, component: the backbone's profile, and the denoiser's sub-folder.
        config: of the denoiser.
        layers: its modules that a LoRA can change: linear ones and convolutions.
    """

    family: str
    component: str
    config: Mapping[str, Any]
    layers: tuple[str, ...]

    @classmethod
    def of(cls, backbone: str, folder: Path) -> Denoiser:
        """The denoiser of a backbone of the registry, in a folder with its configuration.

        Raises:
            ValueError: the backbone is of no diffusers family.
        """
        kind = get_backbone(backbone)
        if not issubclass(kind, DiffusersBackbone):
            raise ValueError(f"backbone {backbone!r} is no network of diffusers")
        component = kind.denoiser_folder
        config = DiffusersFolder.open(folder).config(component, kind.components[component])
        network = build_random(kind.components[component], config, torch.float32, torch.device("meta"))
        return cls(kind.profile, component, config, layers_of(network))


def layers_of(network: nn.Module) -> tuple[str, ...]:
    """The modules that a LoRA can change: every linear layer and every convolution that mixes all channels."""
    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
    return tuple(
        name
        for name, module in network.named_modules()
        if isinstance(module, kinds) and getattr(module, "groups", 1) == 1
    )


@dataclass(frozen=True)
class ExportedLora:
    """What was written.

    Attributes:
        path: the file or the PEFT folder.
        modules: the factors as stored, by the denoiser's own module names.
        errors: of each, what the factors lack of the layer's change, relative (Frobenius); empty of adapters.
        layers_error: the same of those layers together.
        error: the same of all parameters together, with those that a LoRA cannot hold.
        left_out: changed parameters that a LoRA cannot hold: biases, norms, tables.
        elsewhere: other networks than the denoiser that differ from the base's, and in how many weights.
        base: what the LoRA is to be added to; None of adapters.
    """

    path: Path
    modules: Mapping[str, Factors]
    errors: Mapping[str, float] = field(default_factory=dict)
    layers_error: float = 0.0
    error: float = 0.0
    left_out: Sequence[str] = ()
    elsewhere: Mapping[str, int] = field(default_factory=dict)
    base: Base | None = None


def export_adapters(
    checkpoint: CheckpointFolder, out: Path, layout: LoraFormat | None = None, dtype: torch.dtype | None = None
) -> ExportedLora:
    """Write the adapters that a checkpoint's distillation trained.

    Args:
        layout: the names; the family's default when None.
        dtype: of the stored factors; as trained when None.

    Raises:
        ValueError: nobody reads that format, or ``out`` does not fit it.
        ImportRefused: adapters that are not finite, as trained or in that dtype.
    """
    denoiser, lora = Denoiser.of(checkpoint.backbone_name, checkpoint.path), Lora.open(checkpoint.path / ADAPTERS)
    modules: dict[str, Factors] = {}
    for name, parts in lora.modules.items():
        down, up = (lora.files[parts[part]] for part in ("down", "up"))
        factors = Factors(down, lora.scale(name) * up)
        factors = factors if dtype is None else factors.to(dtype)
        for part in (factors.down, factors.up):
            finite(part, name, lora.path)
        modules[name.removeprefix(f"{denoiser.component}.")] = factors
    check_target(out, layout or default_format(denoiser.family), denoiser.family, checkpoint.path)
    origin = {key: value for key, value in lora.files.metadata.items() if key.startswith(("rmd.", "modelspec."))}
    return ExportedLora(write_lora(out, modules, denoiser, layout, describe(checkpoint) | origin), modules)


def keep_adapters(folder: Path, backbone: str, modules: Mapping[str, Factors], base: Path) -> None:
    """Put trained adapters into a checkpoint folder, with what they are to be added to: a teacher's or student's."""
    denoiser = Denoiser.of(backbone, folder)
    header = _header(modules, "diffusers", denoiser) | describe_base(
        base.resolve().name, WeightFiles.open(base / denoiser.component), _licence(base)
    )
    save_file(
        named(modules, "diffusers", denoiser.family, denoiser.component, {}, ()), folder / ADAPTERS, metadata=header
    )


def export_difference(
    checkpoint: CheckpointFolder,
    out: Path,
    base: Path | str,
    *,
    rank: int = 64,
    error: float | None = None,
    layout: LoraFormat | None = None,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
) -> ExportedLora:
    """Write the difference between a checkpoint's denoiser and a base's, cut to a rank.

    Args:
        base: a diffusers folder, or owner/name@revision.
        rank: of every layer's factors.
        error: instead of it the smallest rank whose relative error over all layers is at most this.
        layout, dtype: see :func:`export_adapters`.
        device: where the decompositions run.
        progress: called with what is being done, layers done and layers in all.

    Raises:
        ValueError: the base is of another shape, nothing differs, the error needs the full rank, or ``out`` or the
            format does not fit.
        ImportRefused: weights that are not finite or not safetensors, or a base that is a single file.
    """
    denoiser = Denoiser.of(checkpoint.backbone_name, checkpoint.path)
    layout = layout or default_format(denoiser.family)
    check_target(out, layout, denoiser.family, checkpoint.path)
    if Path(base).is_file():
        refuse_other_formats(Path(base))
        raise ImportRefused(
            f"--base {base} is a single file, and a difference is taken from a diffusers folder: make one of it (rmd "
            f"import --base FILE --config FOLDER --preset {denoiser.family} --out BASE), and give that"
        )
    opened = open_base(str(base), None, (denoiser.component,))
    check_target(out, layout, denoiser.family, opened.folder.path)
    changes = Changes.between(checkpoint.path, opened, denoiser.component, torch.device(device))
    report = progress or (lambda _what, _done, _total: None)
    if error is not None:
        spectra = []
        for number, layer in enumerate(denoiser.layers):
            spectra.append(squared_singular_values(changes[f"{layer}.weight"]).cpu())
            report("singular values", number + 1, len(denoiser.layers))
        rank = smallest_rank(spectra, error)
    modules, errors = {}, {}
    whole = lost = 0.0
    for number, layer in enumerate(denoiser.layers):
        change = changes[f"{layer}.weight"]
        if square := _square(change):
            factors = best_factors(change, rank).to(dtype)
            modules[layer] = Factors(*(finite(part.cpu(), layer, out) for part in (factors.down, factors.up)))
            missing = _square(change - factors.change())
            errors[layer] = math.sqrt(missing / square)
            whole, lost = whole + square, lost + missing
        report("factors", number + 1, len(denoiser.layers))
    if not modules:
        raise ValueError(f"{checkpoint.path}: no layer differs from {opened.name}")
    held = {f"{layer}.weight" for layer in denoiser.layers}
    others = {name: square for name in changes.student if name not in held and (square := _square(changes[name]))}
    beyond = sum(others.values())
    origin = describe_base(opened.name, changes.base, _licence(opened.folder.path))
    written = write_lora(out, modules, denoiser, layout, origin | describe(checkpoint))
    total = math.sqrt((lost + beyond) / (whole + beyond))
    elsewhere = _elsewhere(checkpoint, opened, denoiser.component)
    return ExportedLora(written, modules, errors, math.sqrt(lost / whole), total, tuple(others), elsewhere, opened)


def _elsewhere(checkpoint: CheckpointFolder, base: Base, denoiser: str) -> dict[str, int]:
    """Networks beside the denoiser that both have, with how many weights differ; of a hub's base nothing is there."""
    found: dict[str, int] = {}
    for component in getattr(get_backbone(checkpoint.backbone_name), "components", ()):
        folders = [folder / component for folder in (checkpoint.path, base.folder.path)]
        if component == denoiser or not all(any(folder.glob("*.safetensors")) for folder in folders):
            continue
        ours, theirs = (WeightFiles.open(folder) for folder in folders)
        if sorted(ours.digests().values()) == sorted(theirs.digests().values()):
            continue
        # In the dtype that the checkpoint has: a network that was only rounded is the same one.
        differing = [
            name
            for name in ours
            if name not in theirs or not torch.equal(ours[name], theirs[name].to(ours.entries[name].dtype))
        ]
        if differing:
            found[component] = len(differing)
    return found


def _square(tensor: Tensor) -> float:
    return float(tensor.square().sum(dtype=torch.float64))


@dataclass(frozen=True)
class Changes:
    """Student minus base, a parameter at a time, float32."""

    student: WeightFiles
    base: WeightFiles
    device: torch.device

    @classmethod
    def between(cls, checkpoint: Path, base: Base, component: str, device: torch.device) -> Changes:
        """Opens both.

        Raises:
            ValueError: they are no networks of one shape.
        """
        base.folder.require(component)
        student, other = (WeightFiles.open(folder / component) for folder in (checkpoint, base.folder.path))
        shapes, others = student.shapes, other.shapes
        odd = [name for name in sorted(shapes | others) if shapes.get(name) != others.get(name)]
        if odd:
            raise ValueError(
                f"{checkpoint} is no student of {base.name}: {len(odd)} weights differ in shape, such as "
                f"{', '.join(odd[:_SHOWN])}; give its teacher as --base"
            )
        return cls(student, other, device)

    def __getitem__(self, name: str) -> Tensor:
        ours, theirs = (
            finite(files[name].to(self.device, torch.float32), name, files.path) for files in (self.student, self.base)
        )
        return ours - theirs


def describe(checkpoint: CheckpointFolder) -> dict[str, str]:
    """What a LoRA's header says of the checkpoint that it is of, and how it is sampled; no paths of this machine."""
    cascade = checkpoint.default_cascade
    licence = _licence(checkpoint.path)
    return {
        "rmd.backbone": checkpoint.backbone_name,
        "rmd.checkpoint": checkpoint.path.resolve().name,
        "rmd.checkpoint_sha256": checkpoint.digest("denoiser"),
        "rmd.method": str(checkpoint.distillation.get("method", "")),
        "rmd.preset": str(checkpoint.distillation.get("preset", cascade.name)),
        "rmd.schedule": checkpoint.default,
        "rmd.steps": ", ".join(f"{step.timestep:g} at {step.size}" for step in cascade.steps),
        **({"modelspec.license": licence} if licence else {}),
    }


def describe_base(name: str, files: WeightFiles, licence: str | None) -> dict[str, str]:
    """What it says of the model that it is to be added to."""
    described = {"rmd.base": name, "rmd.base_sha256": json.dumps(files.digests())}
    return described | ({"modelspec.license": licence} if licence else {})


def _licence(folder: Path) -> str | None:
    """What a folder says of its weights' licence; of an imported checkpoint, what each of its parts said."""
    said = licence_of(folder=folder)
    licences = (part["licence"] for record in imports_of(folder) for part in parts_of(record))
    return said or ", ".join(dict.fromkeys(str(licence) for licence in licences if licence)) or None


# ---- the file ---------------------------------------------------------------------------------------------------


def check_target(out: Path, layout: LoraFormat, family: str, model: Path | None = None) -> None:
    """Refuse a name that does not fit the format, or would cost something else than a former LoRA, before any work.

    Args:
        model: a folder that nothing is to be written into.

    Raises:
        ValueError: it does not fit, or something else would be lost, or nobody reads the format.
    """
    check_format(layout, family)
    if model is not None and out.resolve().is_relative_to(model.resolve()):
        raise ValueError(f"--lora {out} lies in {model}, whose own files it could replace; give another folder")
    if layout == "peft":
        if out.suffix == ".safetensors":
            raise ValueError(f"--lora {out}: the peft format is a folder; give a name without .safetensors")
        if out.exists() and not (out / PEFT_CONFIG).is_file():
            raise ValueError(f"--lora {out} exists and is no PEFT folder: it would be lost; give another name")
        foreign = sorted({path.name for path in out.glob("*")} - {PEFT_CONFIG, PEFT_WEIGHTS, "README.md"})
        if foreign:
            raise ValueError(f"--lora {out} holds {foreign[0]} too, which would be lost; give another name")
    elif out.suffix != ".safetensors":
        raise ValueError(f"--lora {out}: the {layout} format is one file; give a name that ends in .safetensors")
    elif out.is_dir():
        raise ValueError(f"--lora {out} is a folder; give another name")
    elif out.exists() and not _is_lora(out):
        raise ValueError(f"--lora {out} exists and is no LoRA: it would be lost; give another name")


def _is_lora(path: Path) -> bool:
    try:
        return bool(Lora.open(path).modules)
    except (OSError, ValueError):
        return False


def write_lora(
    out: Path,
    modules: Mapping[str, Factors],
    denoiser: Denoiser,
    layout: LoraFormat | None,
    described: Mapping[str, str],
) -> Path:
    """Write factors under one of the namings; the file (or folder) appears in one rename.

    Raises:
        ValueError: see :func:`check_target`.
    """
    layout = layout or default_format(denoiser.family)
    check_target(out, layout, denoiser.family)
    state = named(modules, layout, denoiser.family, denoiser.component, denoiser.config, denoiser.layers)
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    header = _header(modules, layout, denoiser) | dict(described)
    if layout == "peft":
        with whole_folder(out) as scratch:
            save_file(state, scratch / PEFT_WEIGHTS, metadata=header)
            settings = {"peft_type": "LORA", **_settings(modules)}
            (scratch / PEFT_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    try:
        save_file(state, partial, metadata=header)
        readable(partial)
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return out


def _settings(modules: Mapping[str, Factors]) -> dict[str, Any]:
    rank = next(iter(modules.values())).rank
    return {"r": rank, "lora_alpha": rank, "target_modules": list(modules)}


def _header(modules: Mapping[str, Factors], layout: LoraFormat, denoiser: Denoiser) -> dict[str, str]:
    """The header's fields by which readers of that format know rank and alpha."""
    settings = _settings(modules)
    if layout == "diffusers":
        own = {f"{denoiser.component}.{key}": value for key, value in settings.items()}
        return {"format": "pt", DIFFUSERS_CONFIG: json.dumps(own, indent=2, sort_keys=True)}
    if layout == "kohya":
        dim = str(settings["r"])
        return {"format": "pt", "ss_network_module": "networks.lora", "ss_network_dim": dim, "ss_network_alpha": dim}
    return {"format": "pt"}
