"""Whether a folder's files contradict a preset: another base, parametrisation, attention or a guidance input.

Only what the files say plainly counts. A network that is none of the known bases (a tiny one, a pruned one) contradicts
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from rmd.backbones.family import DiffusersBackbone
from rmd.backbones.folder import DiffusersFolder
from rmd.backbones.registry import BACKBONES, get_backbone
from rmd.presets import preset_backbone
from rmd.students import STEP_LISTS

Config = Mapping[str, Any]


@dataclass(frozen=True)
class FolderFacts:
    """What is looked at of a diffusers folder; whatever is not known is left out.

    Attributes:
        index: of ``model_index.json``.
        denoiser: the UNet's or transformer's configuration.
        scheduler: the scheduler's.
        weight_names: of the denoiser's tensors.
    """

    index: Config = field(default_factory=dict)
    denoiser: Config = field(default_factory=dict)
    scheduler: Config = field(default_factory=dict)
    weight_names: frozenset[str] = frozenset()


def _sdxl_base(config: Config) -> str | None:
    widths = {2048: "sdxl", 1280: "sdxl-refiner", 1024: "sd2", 768: "sd1"}
    width = config.get("cross_attention_dim")
    return widths.get(width) if isinstance(width, int) else None


def _pixart_base(config: Config) -> str | None:
    side = config.get("sample_size")
    return {128: "pixart-1024", 64: "pixart-512"}.get(side) if isinstance(side, int) else None


def _sd3_base(config: Config) -> str | None:
    layers = config.get("num_layers")
    if layers == 24:
        return "sd3.5-medium" if config.get("dual_attention_layers") else "sd3-medium"
    return "sd3.5-large" if layers == 38 else None


def _wan_base(config: Config) -> str | None:
    heads, width = config.get("num_attention_heads"), config.get("attention_head_dim")
    if not isinstance(heads, int) or not isinstance(width, int):
        return None
    return {1536: "wan-1.3b", 5120: "wan-14b"}.get(heads * width)


BASES: Mapping[str, Callable[[Config], str | None]] = {
    "sdxl": _sdxl_base,
    "pixart": _pixart_base,
    "sd3": _sd3_base,
    "wan-1.3b": _wan_base,
    "wan-14b": _wan_base,
}
"""Backbone -> which published base a denoiser's configuration is; None where it is none of them."""

SAME_CLASS = {"Transformer2DModel": "PixArtTransformer2DModel"}
"""diffusers loads the one's folders as the other."""


def contradictions(preset: str, facts: FolderFacts) -> list[str]:
    """What the files say against a preset; empty where nothing does.

    Raises:
        ValueError: an unknown preset, or one that is not supported.
    """
    name = preset_backbone(preset)
    entry = STEP_LISTS.get(preset)
    if (other := _other_class(name, facts.index)) is not None:
        return [other]
    found = list(_of_network(name, facts))
    base = BASES[name](facts.denoiser) if name in BASES else None
    # The backbones' own cascades have no base: they fit whatever is of the family.
    if entry is not None and entry.base is not None and base not in (None, entry.base):
        found.append(f"it was distilled from {entry.base}, and the network is {base}'s")
    expected = get_backbone(name).prediction if entry is None else entry.prediction
    says = facts.scheduler.get("prediction_type", "epsilon" if expected == "sample" else expected)
    if expected != "velocity" and says != expected:
        found.append(f'its network predicts {expected!r}, and the scheduler says "prediction_type": {says!r}')
    return found


def _family(name: str) -> type[DiffusersBackbone]:
    family = get_backbone(name)
    assert issubclass(family, DiffusersBackbone)
    return family


def _other_class(name: str, index: Config) -> str | None:
    component = _family(name).denoiser_folder
    wanted = _family(name).components[component].split(":")[1]
    entry = index.get(component) or [None, None]
    found = SAME_CLASS.get(str(entry[1]), entry[1])
    if not index or found == wanted:
        return None
    return f"it needs a {wanted} ({component}/), and model_index.json names {found or 'none'}"


def _of_network(name: str, facts: FolderFacts) -> Iterable[str]:
    expected = _family(name).latent_channels
    if facts.index.get("_class_name") == "PixArtSigmaPipeline":
        yield "it is PixArt-alpha's, and model_index.json names PixArt-Sigma, which has another autoencoder"
    if (facts.index.get("transformer_2") or [None, None])[1] is not None:
        yield "it needs one transformer, and model_index.json names two (Wan2.2)"
    channels = facts.denoiser.get("in_channels", expected)
    if channels != expected:
        yield f"it works on {expected} channels, and the network takes {channels}"
    if facts.denoiser.get("time_cond_proj_dim") is not None:
        yield (
            "the network takes its guidance as an input (time_cond_proj_dim): fold one guidance in first "
            "(rmd import --fold-guidance)"
        )
    if facts.scheduler.get("rescale_betas_zero_snr"):
        yield "the scheduler rescales its table to zero terminal SNR, which is not supported"
    if any("to_gate_compress" in weight for weight in facts.weight_names):
        yield "the network has another attention (video sparse attention, to_gate_compress), which is not supported"


def read_facts(folder: Path | str, preset: str) -> FolderFacts:
    """Read what :func:`contradictions` looks at; weights are not loaded, only their names.

    Raises:
        BackboneError: not a diffusers folder, or a file of it is no JSON.
        ValueError: an unknown preset, or one that is not supported.
    """
    source = DiffusersFolder.open(folder)
    component = _family(preset_backbone(preset)).denoiser_folder
    names: set[str] = set()
    for file in sorted((source.path / component).glob("*.safetensors")):
        with import_module("safetensors").safe_open(str(file), framework="pt") as weights:
            names.update(weights.keys())

    def config(part: str) -> Config:
        return source.config(part) if (source.path / part).is_dir() else {}

    return FolderFacts(source.index, config(component), config("scheduler"), frozenset(names))


def check_family(preset: str, name: str, index: Config, folder: str) -> None:
    """Refuse another family's folder, before its configurations are held against the classes of this one.

    They are not wrong, and none of their fields should be called so.

    Args:
        preset: its name, for the message.
        name: the backbone.
        index: the folder's ``model_index.json``.
        folder: what was given, for the message.

    Raises:
        ValueError: the index names another class of denoiser.
    """
    if (other := _other_class(name, index)) is not None:
        raise ValueError(f"preset {preset!r} does not fit {folder}: {other}")


def fitting_family(preset: str, asked: str | None, denoiser: Config) -> type[DiffusersBackbone]:
    """The backbone of a preset's profile that a network is of: a preset for both of Wan's sizes is of neither.

    Args:
        preset: its name.
        asked: a backbone of that profile; None takes the one that the network is, or the preset's where it is no known
            base.
        denoiser: the network's configuration.

    Raises:
        ValueError: the network is another one than the one that was asked for.
    """
    own = preset_backbone(preset)
    base = BASES[own](denoiser) if own in BASES else None
    known = base in BACKBONES and base is not None and _family(base).profile == _family(own).profile
    if asked is not None and known and base != asked:
        raise ValueError(f"--backbone {asked}: the network is {base}'s; leave it out, or say --backbone {base}")
    return _family(asked or (base if known and base is not None else own))


def check_student(preset: str, folder: Path | str) -> None:
    """Refuse a preset that a folder's files contradict, in one error.

    Raises:
        ValueError: they do; the message lists everything that speaks against it.
    """
    found = contradictions(preset, read_facts(folder, preset))
    if found:
        raise ValueError(f"preset {preset!r} does not fit {folder}: {'; '.join(found)}")
