"""What an import reads: base, network and LoRAs, opened by their headers and held against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rmd.backbones.base import BackboneError
from rmd.backbones.config_types import check_config
from rmd.backbones.family import DiffusersBackbone
from rmd.backbones.folder import read_object
from rmd.backbones.guidance_fold import FOLDED_WEIGHT, GUIDANCE_INPUT
from rmd.backbones.registry import BACKBONES, get_backbone
from rmd.backbones.student_fit import SAME_CLASS, FolderFacts, check_family, contradictions, fitting_family
from rmd.cascade import Cascade
from rmd.presets import preset, preset_backbone
from rmd.published.files import ImportRefused, WeightFiles
from rmd.published.lora import Lora
from rmd.published.merge import Plan, plan_merge
from rmd.published.naming import Names
from rmd.published.networks import (
    Expected,
    Network,
    check_text_encoder,
    is_table,
    read_network,
    with_guidance_folded,
)
from rmd.published.originals import DENOISER_PREFIX, PARTS
from rmd.published.source import Base, open_base
from rmd.published.strength import Strength, holds_student, refuse_twice, strengths
from rmd.published.writing import LARGEST_FILE
from rmd.students import STEP_LISTS

_SHOWN = 12


@dataclass(frozen=True)
class ImportRequest:
    """What is to be imported.

    Attributes:
        base: a diffusers folder, a single .safetensors file, or a hub name with its revision.
        preset: the cascade that the student is sampled with.
        out: the checkpoint folder to write.
        network: the student's network (file, index or folder) in place of the base's.
        loras: files or PEFT folders, each with its strength; of None see :func:`rmd.published.strength.strengths`.
        config: with a single file: the diffusers folder that has what the file has not.
        backbone: of those that share the preset's family, which one; by default the preset's own.
        dtype: of the weights that are written anew; by default as published (eight bits become bfloat16).
        allow_unmatched: leave keys without a place out instead of refusing.
        fold_guidance: of a UNet that takes its guidance as an input, the one that is folded into it; 1 is none.
        largest: bytes of one weight file.
    """

    base: str
    preset: str
    out: Path
    network: Path | None = None
    loras: Sequence[tuple[Path, float | None]] = ()
    config: Path | None = None
    backbone: str | None = None
    dtype: torch.dtype | None = None
    allow_unmatched: bool = False
    fold_guidance: float | None = None
    largest: int = LARGEST_FILE


@dataclass
class Work:
    """An import under way.

    Attributes:
        kind: the backbone's class.
        networks: components that are written anew; the others are copied.
        configs: of the components and the scheduler, as they are written.
        unfolded: the denoiser's, where its guidance input is folded away.
        network_files: of the request's network, if it has one.
        strengths: of the LoRAs, in their order.
        plan: what the LoRAs add, and where.
        left_out: keys without a place, with their file's name.
    """

    request: ImportRequest
    kind: type[DiffusersBackbone]
    base: Base
    cascade: Cascade
    networks: dict[str, Network] = field(default_factory=dict)
    configs: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    unfolded: Mapping[str, Any] | None = None
    network_files: WeightFiles | None = None
    loras: list[Lora] = field(default_factory=list)
    strengths: list[Strength] = field(default_factory=list)
    plan: Plan = field(default_factory=lambda: Plan({}, ()))
    left_out: list[str] = field(default_factory=list)


def gather(request: ImportRequest) -> Work:
    """Open everything that an import reads and give every key its place. Reads headers only, and what is converted.

    Raises: see :func:`rmd.published.importing.import_model`.
    """
    work = _open(request)
    folder = work.base.folder.path
    in_base = request.network is None and _holds_student(work)
    work.strengths = strengths(request.preset, request.loras, request.network, in_base)
    work.loras = [
        Lora.open(path, strength.value) for (path, _), strength in zip(request.loras, work.strengths, strict=True)
    ]
    _read_networks(work)
    _check_texts(work)
    _place_loras(work)
    refuse_twice(work.loras, work.strengths, folder, [_changes_base(work, lora) for lora in work.loras])
    return work


def _open(request: ImportRequest) -> Work:
    own = preset_backbone(request.preset)
    name = request.backbone or own
    kind = get_backbone(name)
    if not issubclass(kind, DiffusersBackbone):
        raise ValueError(f"preset {request.preset!r} is for {own}, whose weights are not published elsewhere")
    if kind.profile != get_backbone(own).profile:
        family = [known for known in BACKBONES if get_backbone(known).profile == get_backbone(own).profile]
        raise ValueError(f"--backbone {name}: preset {request.preset!r} is for {', '.join(family)}")
    base = open_base(request.base, request.config, (*kind.components, *kind.tokenizers, "scheduler"))
    work = Work(request, kind, base, preset(request.preset))
    base.folder.require(kind.denoiser_folder, "scheduler")
    check_family(request.preset, name, base.folder.index, request.base)
    for component in kind.components:
        if base.folder.has(component):
            work.configs[component] = base.folder.config(component, kind.components[component])
    work.configs["scheduler"] = base.folder.config("scheduler")
    _take_networks_config(work)
    work.kind = kind = fitting_family(request.preset, request.backbone, work.configs[kind.denoiser_folder])
    if request.fold_guidance is not None:
        work.unfolded = config = work.configs[kind.denoiser_folder]
        if config.get(GUIDANCE_INPUT) is None:
            raise ImportRefused(
                f"--fold-guidance: the configuration of this network has no {GUIDANCE_INPUT}, so it takes no guidance "
                f"as an input; give the student's whole folder as --network"
            )
        work.configs[kind.denoiser_folder] = {**config, GUIDANCE_INPUT: None}
    entry = STEP_LISTS.get(request.preset)
    if entry is not None and entry.prediction == "sample":  # how a network that gives x0 itself is recognised later
        work.configs["scheduler"] = {**work.configs["scheduler"], "prediction_type": "sample"}
    facts = FolderFacts(base.folder.index, work.configs[kind.denoiser_folder], work.configs["scheduler"])
    if against := contradictions(request.preset, facts):
        raise ImportRefused(f"preset {request.preset!r} does not fit {request.base}: {'; '.join(against)}")
    # Refuses a velocity network's scheduler, a guidance input and the like, before anything is read.
    _try_configs(work)
    for tokenizer in tokenizers_of(work):
        base.folder.require(tokenizer)
        base.folder.tokenizer(tokenizer)
    return work


def _try_configs(work: Work) -> None:
    denoiser = work.kind.denoiser_folder
    try:
        work.kind.from_config({name: work.configs[name] for name in (denoiser, "scheduler")}, device="meta")
    except BackboneError:
        raise
    except Exception as error:  # whatever the class makes of an odd value, or of another class's configuration
        folder, network = work.base.folder.path, work.request.network
        own = network is not None and (network / "config.json").is_file()
        read = network if own else folder / denoiser
        raise ImportRefused(
            f"{read}/config.json, with {folder / 'scheduler'}/scheduler_config.json, describes no "
            f"{work.kind.components[denoiser].split(':')[1]} ({type(error).__name__}: {error}); "
            f"{'give the folder of the denoiser as --network' if own else 'copy them again'}"
        ) from error


def networks_of(work: Work) -> list[str]:
    """The networks that the result has: those of the family, but for optional ones that the base leaves out."""
    kind = work.kind
    return [name for name in kind.components if name not in kind.optional or work.base.folder.has(name)]


def tokenizers_of(work: Work) -> list[str]:
    """Those of the result's text encoders."""
    networks = networks_of(work)
    return [name for name in work.kind.tokenizers if name.replace("tokenizer", "text_encoder") in networks]


def _take_networks_config(work: Work) -> None:
    """A student's folder may describe another network than the base's (an added input)."""
    network = work.request.network
    if network is None or not network.is_dir():
        return
    if (network / "model_index.json").is_file():
        raise ImportRefused(f"--network {network} is a whole diffusers folder: give it as --base, or its sub-folder")
    if not (network / "config.json").is_file():
        return
    config = read_object(network / "config.json")
    wanted = work.kind.components[work.kind.denoiser_folder].split(":")[1]
    named = config.get("_class_name", wanted)
    if SAME_CLASS.get(str(named), named) != wanted:
        raise ImportRefused(f"{network / 'config.json'} describes no {wanted}, which the preset's family has")
    check_config(network / "config.json", config, work.kind.components[work.kind.denoiser_folder])
    work.configs[work.kind.denoiser_folder] = {**config, "_class_name": wanted}


def sources(work: Work) -> list[Path]:
    """Every file and folder that the import reads."""
    request, base = work.request, work.base
    given = [base.folder.path, *(path for path, _ in request.loras)]
    single = None if base.single is None else base.single.path
    return given + [path for path in (request.network, single) if path is not None]


def _read_networks(work: Work) -> None:
    """The networks that are written anew: the denoiser always, and what a single file holds."""
    request, kind, base = work.request, work.kind, work.base
    parts = PARTS.get(kind.profile, {}) if base.single is not None else {}
    denoiser = kind.denoiser_folder
    if base.single is not None:
        held = {
            prefix: component
            for prefix, component in parts.items()
            if component in kind.components and any(key.startswith(prefix) for key in base.single)
        }
        if DENOISER_PREFIX not in held:
            _read_one(work, denoiser, base.single, "")
        else:
            _refuse_over(work, base.single, tuple(held))
            for prefix, component in held.items():
                if component in work.configs:
                    _read_one(work, component, base.single, prefix)
                else:
                    raise ImportRefused(f"{base.single.path} holds a {component}, which {base.folder.path} has not")
    if request.network is not None:
        work.network_files = files = WeightFiles.open(request.network)
        whole = any(key.startswith(DENOISER_PREFIX) for key in files)
        if whole:
            _refuse_over(work, files, (DENOISER_PREFIX,))
        _read_one(work, denoiser, files, DENOISER_PREFIX if whole else "")
    elif denoiser not in work.networks:
        _read_one(work, denoiser, WeightFiles.open(base.folder.path / denoiser), "")


def _refuse_over(work: Work, files: WeightFiles, prefixes: tuple[str, ...]) -> None:
    """Keys of a file that belong to none of its known parts."""
    over = [key for key in files if not key.startswith(prefixes)]
    tables = [key for key in over if is_table(key)]
    over = [key for key in over if not is_table(key)]
    if over and not work.request.allow_unmatched:
        raise ImportRefused(
            f"{files.path} holds {len(over)} keys of other parts, such as {_some(over)}: give a whole checkpoint as "
            f"--base with --config; --allow-unmatched leaves them out"
        )
    work.left_out += [f"{files.path.name}: {key}" for key in (*over, *tables)]


def _read_one(work: Work, component: str, files: WeightFiles, prefix: str) -> None:
    unfolded = work.unfolded if component == work.kind.denoiser_folder else None
    target, config = work.kind.components[component], unfolded or work.configs[component]
    network = read_network(
        files,
        _expected(work, component, config),
        target,
        config,
        prefix=prefix,
        allow_unmatched=work.request.allow_unmatched,
    )
    if unfolded and work.request.fold_guidance is not None:
        network = with_guidance_folded(network, config, work.request.fold_guidance)
    work.networks[component] = network
    work.left_out += [f"{files.path.name}: {key}" for key in network.left_out]


def _expected(work: Work, component: str, config: Mapping[str, Any]) -> Expected:
    target = work.kind.components[component]
    try:
        return Expected.of(target, config)
    except Exception as error:  # whatever the class makes of an odd value
        raise ImportRefused(
            f"{work.base.name}: {component}/config.json builds no {target.split(':')[1]} ({type(error).__name__}: "
            f"{error}); copy it again"
        ) from error


def _check_texts(work: Work) -> None:
    """The base's own text encoders, which are copied or a LoRA changes: a loader would only warn of their odd keys."""
    folder = work.base.folder
    for component in _text_encoders(work):
        if not (folder.path / component).is_dir():
            continue  # told with the other folders that are not there
        files, target = WeightFiles.open(folder.path / component), work.kind.components[component]
        expected = _expected(work, component, work.configs[component])
        left = check_text_encoder(files, expected, target, allow_unmatched=work.request.allow_unmatched)
        work.left_out += [f"{component}: {key}" for key in left]


def _text_encoders(work: Work) -> list[str]:
    """Those that the base's folder has, and no single file brings."""
    return [
        component
        for component in work.kind.components
        if component.startswith("text_encoder") and component not in work.networks and work.base.folder.has(component)
    ]


# ---- LoRAs ------------------------------------------------------------------------------------------------------


def lacks_student(work: Work) -> bool:
    """Whether nothing says that the weights are the preset's student: no LoRA, no network, no folder of it."""
    entry = STEP_LISTS.get(work.request.preset)
    if entry is None or not entry.source or work.loras or work.network_files is not None:
        return False
    if _holds_student(work):
        return False
    return (not entry.whole or work.base.revision is not None) and work.base.name != entry.source


def _holds_student(work: Work) -> bool:
    """Whether the base is a checkpoint of the student; one that lends a single file its configuration is no base."""
    return work.base.single is None and holds_student(work.base.folder.path, work.request.preset)


def is_bases_own(work: Work, component: str) -> bool:
    """Whether a network is the one in the base's folder, copied or changed, and nothing was given in its place."""
    given = work.networks.get(component)
    return given is None or given.files.path == work.base.folder.path / component


def _changes_base(work: Work, lora: Lora) -> bool:
    return any(
        is_bases_own(work, component) and any(change.lora is lora for change in changes)
        for component, parameters in work.plan.changes.items()
        for changes in parameters.values()
    )


def _refuse_folded(work: Work) -> None:
    """The bias was folded with the weight as it is without LoRAs."""
    if work.request.fold_guidance is None:
        return
    for change in work.plan.changes.get(work.kind.denoiser_folder, {}).get(FOLDED_WEIGHT, ()):
        raise ImportRefused(
            f"{change.lora.path} changes {FOLDED_WEIGHT!r}, through which --fold-guidance folds the guidance: leave "
            f"that module out of the LoRA, or merge it into the network first and give that as --network"
        )


def _place_loras(work: Work) -> None:
    kind, folder = work.kind, work.base.folder
    if not work.loras:
        return
    shapes: dict[str, Mapping[str, tuple[int, ...]]] = {
        component: network.shapes for component, network in work.networks.items()
    }
    texts: dict[str, WeightFiles] = {}
    for component in _text_encoders(work):
        texts[component] = WeightFiles.open(folder.path / component)
        shapes[component] = texts[component].shapes
    names = Names(
        kind.denoiser_folder,
        {component: tuple(parameters) for component, parameters in shapes.items()},
        kind.profile,
        work.configs[kind.denoiser_folder],
    )
    work.plan = plan_merge(work.loras, names, shapes)
    _refuse_folded(work)
    _judge(work)
    for component in work.plan.changes:
        if component in texts:
            files = texts[component]
            entries = files.entries
            dtypes = {name: entry.dtype for name, entry in entries.items()}
            work.networks[component] = Network(files, files.shapes, dtypes, (), _renamed={name: name for name in files})


def _judge(work: Work) -> None:
    """Refuse keys without a place; with --allow-unmatched, a LoRA of which nothing fits."""
    for lora in work.loras:
        unmatched = [(key, item.reason) for item in work.plan.unmatched if item.lora is lora for key in item.keys]
        if not unmatched:
            continue
        fitting = work.plan.modules(lora)
        if not fitting or not work.request.allow_unmatched:
            told = _some([f"{key} ({reason})" for key, reason in unmatched])
            way = (
                "leaving them out (--allow-unmatched) makes another model than was published"
                if fitting
                else f"it is for another model than {work.base.name}, or under names that are not known"
            )
            raise ImportRefused(f"{lora.path}: {len(unmatched)} of {len(lora.files)} keys find no place: {told}; {way}")
        work.left_out += [f"{lora.path.name}: {key}" for key, _ in unmatched]


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
