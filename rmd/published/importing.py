"""Published weights into a checkpoint folder: base, network and LoRAs, merged, recorded and reloaded before they count.

At most one network is in memory: weights are read, merged in float32, rounded and written a part at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rmd.backbones.folder import DiffusersFolder
from rmd.backbones.random_weights import resolve
from rmd.cascade_file import write_cascade_json
from rmd.published.card import model_card, notice
from rmd.published.files import WeightFiles, finite, folder_weights, refuse_other_formats
from rmd.published.gathering import ImportRequest, Work, gather, lacks_student, networks_of, sources, tokenizers_of
from rmd.published.lora import PEFT_CONFIG
from rmd.published.networks import refuse_scaled
from rmd.published.place import check_out, finished_file, whole_folder
from rmd.published.record import import_record
from rmd.published.writing import Progress, stored_dtype, write_network
from rmd.students import STEP_LISTS
from rmd.weight_files import PICKLE_SUFFIXES

_COPIED = (".json", ".safetensors", ".txt", ".model", ".jinja")


@dataclass(frozen=True)
class Imported:
    """What an import wrote: the folder, the record in its ``cascade.json``, and the keys that it left out."""

    folder: Path
    record: Mapping[str, Any]
    left_out: Sequence[str]


def import_model(
    request: ImportRequest,
    progress: Callable[[str, int, int], None] | None = None,
    say: Callable[[str], None] = lambda _text: None,
) -> Imported:
    """Write a checkpoint folder from published weights, in one rename.

    A run that was killed or interrupted is gone on with, file by file, if it was made of the same files and settings.

    Args:
        request: what to import.
        progress: called with what is being written, the bytes done and the bytes in all.
        say: told whether a stopped run is gone on with, and where nothing makes the base the preset's student.

    Raises:
        ImportRefused: a file is not taken or does not fit; the message says which, why, and the way out.
        BackboneError: the base is not of the preset's family, or the result cannot be loaded.
        ValueError: an unknown preset or backbone, or ``out`` would be lost.
        FileNotFoundError: a file is missing.
    """
    work = gather(request)
    if lacks_student(work):
        entry = STEP_LISTS[request.preset]
        say(
            f"nothing is merged: {work.base.name}'s own weights will be sampled as {request.preset!r}, which is right "
            f"only if they are that student's; it is published as {entry.source} ({entry.files}): --lora or --network"
        )
    check_out(request.out, *sources(work))
    present = _present(work)
    total = _bytes(work, present)
    done = 0

    def report(what: str, size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(what, done, total)

    _load_copied(work)
    with whole_folder(request.out, _identity(work), say) as scratch:
        # What is copied is read through on the way: its faults are told before the long merge.
        for component in sorted(present, key=work.networks.__contains__):
            _write_component(work, component, scratch, report)
        _write_json(scratch / "scheduler" / "scheduler_config.json", work.configs["scheduler"])
        index = {
            name: value if not isinstance(value, list) or name in present else [None, None]
            for name, value in work.base.folder.index.items()
        }
        _write_json(scratch / "model_index.json", index)
        record = import_record(work)
        (scratch / "README.md").write_text(model_card(request.out.name, work.cascade, record), encoding="utf-8")
        (scratch / "NOTICE").write_text(notice(work.base.folder.path, record), encoding="utf-8")
        _reload(work, scratch)
        write_cascade_json(
            scratch,
            backbone=work.kind.name,
            cascades={work.cascade.schedule_name: work.cascade},
            default=work.cascade.schedule_name,
            distillation=record,
        )
        scratch.chmod(0o755)
    return Imported(request.out, record, tuple(work.left_out))


def _identity(work: Work) -> str:
    """What an import's files are made of: every file that is read, as it is now, and what is done with them."""
    request = work.request
    read = [file for path in sources(work) for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    # Where an index was named, or the weights of a PEFT folder, whose settings scale them.
    read += [] if work.network_files is None else work.network_files.files
    read += [file for lora in work.loras for file in (*lora.files.files, lora.files.files[0].parent / PEFT_CONFIG)]
    states = [
        (str(file.resolve()), (state := file.stat()).st_size, state.st_mtime_ns) for file in read if file.is_file()
    ]
    chosen = {item.name: str(getattr(request, item.name)) for item in fields(request) if item.name != "out"}
    return json.dumps([version("rmd"), chosen, states])


def _load_copied(work: Work) -> None:
    """Load what is copied and small, as a user would: a decoder of another class or shape is told before the merge.

    Text encoders are large, and were held against their class by their headers.
    """
    folder, kind = work.base.folder, work.kind
    for component, target in kind.components.items():
        if component in work.networks or component.startswith("text_encoder") or not folder.has(component):
            continue
        refuse_scaled(WeightFiles.open(folder.path / component))
        folder.load(component, target, torch.bfloat16, torch.device("cpu"), weights=True)


def _present(work: Work) -> list[str]:
    """Sub-folders of the result: components with their tokenizers, and the scheduler."""
    networks = networks_of(work)
    work.base.folder.require(*(name for name in networks if name not in work.networks))
    return [*networks, *tokenizers_of(work), "scheduler"]


def _target_dtypes(work: Work, component: str) -> dict[str, torch.dtype]:
    network, wanted = work.networks[component], work.request.dtype
    kept = set(getattr(resolve(work.kind.components[component]), "_keep_in_fp32_modules", None) or ())
    return {
        name: stored_dtype(dtype, None if kept & set(name.split(".")) else wanted)
        for name, dtype in network.dtypes.items()
    }


def _bytes(work: Work, present: Sequence[str]) -> int:
    written = 0
    for component, network in work.networks.items():
        dtypes = _target_dtypes(work, component)
        written += sum(torch.Size(shape).numel() * dtypes[name].itemsize for name, shape in network.shapes.items())
    copied = [file for name in present if name not in work.networks for file in _files_of(work.base.folder, name)]
    return written + sum(file.stat().st_size for file in copied)


def _files_of(folder: DiffusersFolder, component: str) -> list[Path]:
    """The files of a component that are read when it is loaded."""
    place = folder.path / component
    files = sorted(file for file in place.iterdir() if file.is_file() and file.suffix in _COPIED)
    if not any(file.suffix == ".safetensors" for file in files):
        pickles = sorted(file for file in place.iterdir() if file.suffix.lower() in PICKLE_SUFFIXES)
        if pickles:
            refuse_other_formats(pickles[0])
        return files
    weights = set(folder_weights(place))
    return [file for file in files if file.suffix != ".safetensors" or file in weights]


def _write_component(work: Work, component: str, scratch: Path, report: Progress) -> None:
    folder = scratch / component
    if component in work.networks:
        network = work.networks[component]
        stem = "model" if work.kind.components[component].startswith("transformers:") else "diffusion_pytorch_model"
        write_network(
            folder,
            stem,
            network,
            _target_dtypes(work, component),
            work.plan.changes.get(component, {}),
            report,
            source=network.files.path,
            largest=work.request.largest,
        )
        _write_json(folder / "config.json", work.configs[component])
        return
    folder.mkdir(exist_ok=True)
    for file in _files_of(work.base.folder, component):
        if not (folder / file.name).is_file():
            if file.suffix == ".safetensors":
                weights = WeightFiles.open(file)
                refuse_scaled(weights)
                for name, tensor in weights.items():
                    finite(tensor, name, file)
            with finished_file(folder / file.name) as partial:
                try:
                    shutil.copyfile(file, partial)
                except OSError as error:  # a full disk, for one
                    raise OSError(f"{folder / file.name} could not be written: {error}") from error
        report(component, file.stat().st_size)


def _reload(work: Work, scratch: Path) -> None:
    """Load the result as a user would, one network after the other."""
    written = DiffusersFolder.open(scratch)
    for component, target in work.kind.components.items():
        if written.has(component):
            written.load(component, target, torch.bfloat16, torch.device("cpu"), weights=True)
    for tokenizer in work.kind.tokenizers:
        if written.has(tokenizer):
            written.tokenizer(tokenizer)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
