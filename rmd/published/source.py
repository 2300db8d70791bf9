"""Where a base comes from: a diffusers folder, a hub's repository at a revision, or a single file with a folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rmd.backbones.folder import DiffusersFolder
from rmd.published.files import ImportRefused, WeightFiles, refuse_other_formats
from rmd.published.hub import HUB_PREFIX, commit_of, is_hub_name, split_hub_name

_LICENCE_FIELDS = ("license", "modelspec.license", "ss_license")


@dataclass(frozen=True)
class Base:
    """A base model, opened.

    Attributes:
        name: how records call it: a folder's or file's name, or the hub's.
        folder: its diffusers folder; of a single file, the one with configurations and tokenizers.
        single: the single file, if it is one.
        revision: the hub's resolved commit, if it came from there.
    """

    name: str
    folder: DiffusersFolder
    single: WeightFiles | None = None
    revision: str | None = None


def open_base(source: str, config: Path | None, components: Sequence[str]) -> Base:
    """Open a base.

    Args:
        source: a folder, a .safetensors file or a hub name (see :func:`rmd.published.hub.is_hub_name`).
        config: for a single file: a diffusers folder that has what the file has not (tokenizers, configurations).
        components: the sub-folders to fetch from the hub.

    Raises:
        ImportRefused: no revision, a pickle or archive, a folder without model_index.json, a file without ``config``.
        BackboneError: the hub's repository cannot be had.
        FileNotFoundError: there is no such file.
    """
    if is_hub_name(source):
        return _from_hub(source, components)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(
            f"--base {source} does not exist; give a diffusers folder, a .safetensors file, or owner/name@revision"
        )
    if path.is_dir():
        if config is not None:
            raise ImportRefused(f"--config goes with a single file, and --base {source} is a folder: leave it out")
        _require_index(path, "--base")
        return Base(path.resolve().name, DiffusersFolder.open(path))
    refuse_other_formats(path)
    if config is None:
        raise ImportRefused(
            f"{path} is a single file, which holds no tokenizer and no configuration: give --config FOLDER, a "
            f"diffusers folder of its family (weights that the file has are not read from it)"
        )
    _require_index(config, "--config")
    return Base(path.name, DiffusersFolder.open(config), single=WeightFiles.open(path))


def _require_index(folder: Path, option: str) -> None:
    if (folder / "model_index.json").is_file():
        return
    parent = folder.parent / "model_index.json"
    hint = f"; give {folder.parent}, whose component this is" if parent.is_file() else ""
    raise ImportRefused(f"{option} {folder} has no model_index.json, so it is no diffusers folder{hint}")


def _from_hub(source: str, components: Sequence[str]) -> Base:
    name, revision = split_hub_name(source)
    if not revision:
        raise ImportRefused(f"--base {source}: name a revision (owner/name@revision), so that it stays the same model")
    folder = DiffusersFolder.open(f"{HUB_PREFIX}{name}@{revision}", components)
    return Base(name, folder, revision=commit_of(folder.path) or revision)


def licence_of(files: WeightFiles | None = None, folder: Path | None = None) -> str | None:
    """What a weight file's header or a folder's README says of the licence, as it says it; None where none does."""
    for key in _LICENCE_FIELDS:
        if files is not None and files.metadata.get(key):
            return str(files.metadata[key])
    readme = folder / "README.md" if folder is not None else None
    if readme is None or not readme.is_file():
        return None
    text = readme.read_text(encoding="utf-8", errors="replace")
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    # On the field's own line, or the first of a list below it; never the next field.
    rule = r"^(license(?:_name)?):[ \t]*(?:\n[ \t]*-[ \t]+)?(\S.*?)[ \t]*$"
    found = re.findall(rule, front[1] if front else "", re.MULTILINE)
    named = {key: value.strip("\"'") for key, value in found}
    return named.get("license_name") or named.get("license")
