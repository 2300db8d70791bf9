"""Reading a diffusers folder: safetensors only, no remote code, one clear error for what is missing.

A hub repository is fetched only where it is asked for in so many words, ``hub:<owner>/<name>[@<revision>]``; a plain
``owner/name`` is a relative path like any other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from rmd.backbones.base import BackboneError
from rmd.backbones.config_types import check_config, check_flag, check_scheduler, check_tokenizer
from rmd.backbones.random_weights import build_random, resolve
from rmd.checkpoint import CASCADE_FILE
from rmd.fields import read_json
from rmd.published.hub import HUB_PREFIX, HubError, fetch_snapshot
from rmd.weight_files import PICKLE_SUFFIXES, check_index, check_safetensors, is_index

_HUB_PATTERNS = ("*.json", "*.safetensors", "merges.txt", "*.model")
# What an import's record and NOTICE tell of the licence.
_TEXTS = ("README.md", "NOTICE", "NOTICE.md", "LICENSE", "LICENSE.md", "LICENSE.txt")
_VARIANTS = ("*.fp16.*", "*.fp16-*")  # whole, and in parts
# The forms of a vocabulary: CLIP's, T5's, BERT's and everyone's.
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",), ("vocab.txt",))

# As they build a network, the libraries change torch for the whole process: two at once find their weights on meta.
_LOADING = Lock()


class DiffusersFolder:
    """A folder with a ``model_index.json`` and one sub-folder a component."""

    def __init__(self, path: Path, index: dict[str, Any]) -> None:
        self.path = path
        self.index = index

    @classmethod
    def open(cls, source: Path | str, components: Sequence[str] = ()) -> DiffusersFolder:
        """Opens a folder, or fetches ``hub:<owner>/<name>[@<revision>]`` first.

        Args:
            source: the folder, or the hub's name for it.
            components: the sub-folders to fetch from the hub.

        Raises:
            BackboneError: there is no such folder, it is not a diffusers folder, its index holds a word for a switch,
                or the hub cannot be reached.
        """
        path = _fetch(str(source), components) if str(source).startswith(HUB_PREFIX) else Path(source)
        index_file = path / "model_index.json"
        if not path.is_dir():
            raise BackboneError(f"{path} is not a folder; to fetch from the hub write {HUB_PREFIX}<owner>/<name>")
        if not index_file.is_file():
            raise BackboneError(
                f"{path} is not a diffusers folder: it has no model_index.json; give what save_pretrained wrote"
            )
        index = read_object(index_file)
        check_flag(index_file, index, "force_zeros_for_empty_prompt")
        return cls(path, index)

    def has(self, component: str) -> bool:
        """Whether the index names the component (entries of ``[null, null]`` are absent ones)."""
        entry = self.index.get(component)
        return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None

    def require(self, *components: str) -> None:
        """Raises :class:`BackboneError` naming the first of ``components`` that is absent."""
        for component in components:
            if not self.has(component) or not (self.path / component).is_dir():
                raise BackboneError(
                    f"{self.path} lacks the component {component!r} (folder and model_index.json entry); copy the "
                    f"whole diffusers folder again"
                )

    def config(self, component: str, target: str = "") -> dict[str, Any]:
        """The component's ``config.json`` (``scheduler_config.json`` for schedulers).

        Args:
            component: its sub-folder.
            target: the class, as ``module:Class``, whose signature the values are held against.

        Raises:
            BackboneError: there is none, or a value is none that the class takes; of schedulers too.
        """
        folder = self.path / component
        for name in ("config.json", "scheduler_config.json"):
            if (folder / name).is_file():
                config = read_object(folder / name)
                if target:
                    check_config(folder / name, config, target)
                elif name.startswith("scheduler"):
                    check_scheduler(folder / name, config)
                return config
        raise BackboneError(f"{folder} has no config.json")

    def load(self, component: str, target: str, dtype: torch.dtype, device: torch.device, weights: bool) -> Any:
        """Loads one model.

        Args:
            component: its sub-folder.
            target: its class as ``module:Class``.
            dtype: dtype of its parameters, but for those that the class keeps in float32.
            device: where it goes.
            weights: False builds it on the meta device from its configuration alone.

        Raises:
            BackboneError: its configuration describes no such network; see :func:`load_network` for its weights.
        """
        if weights:
            return load_network(self.path / component, target, dtype, device)
        config = self.config(component, target)
        try:
            return build_random(target, config, dtype, torch.device("meta"))
        except Exception as error:  # whatever the class makes of an odd value
            raise BackboneError(
                f"{self.path / component / 'config.json'} builds no {target.split(':')[1]} "
                f"({type(error).__name__}: {error}); copy it again"
            ) from error

    def tokenizer(self, component: str) -> Any:
        """The tokenizer in a sub-folder; code from the folder is never run.

        Raises:
            BackboneError: its settings are no JSON, ask for code or hold a value of another kind, or the tokenizer
                cannot be read, or does not take a prompt.
        """
        # The library takes the name of a tokenizer's class from either file.
        for name in ("tokenizer_config.json", "config.json"):
            file = self.path / component / name
            settings = read_object(file) if file.is_file() else {}
            if "auto_map" in settings:
                raise BackboneError(f"{file} asks for code of its own (auto_map), and code from a folder is never run")
            if name == "tokenizer_config.json":
                check_tokenizer(file, settings)
        # From its settings alone the library makes a tokenizer that knows no word, and says nothing.
        if not any(all((self.path / component / name).is_file() for name in names) for names in _VOCABULARIES):
            raise BackboneError(
                f"{self.path / component} has no vocabulary ({', '.join(names[0] for names in _VOCABULARIES)}): copy "
                f"the whole folder again"
            )
        transformers = import_module("transformers")
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(self.path / component), local_files_only=True)
            # As prompts are: without a token for padding, say, it fails here and not at the first of them.
            tokenizer(["a"], padding="max_length", max_length=8, truncation=True, return_tensors="pt")
        except Exception as error:  # whatever the class makes of an odd setting
            reason = str(error) or type(error).__name__
            raise BackboneError(f"no tokenizer could be read from {self.path / component}: {reason}") from error
        return tokenizer


def load_network(folder: Path, target: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Loads one model from a folder of its own.

    Args:
        folder: with its configuration and weights.
        target, dtype, device: see :meth:`DiffusersFolder.load`.

    Raises:
        BackboneError: its weights are missing, broken or no safetensors, or are not that class's; or its configuration
            is not.
    """
    variant = _variant(folder)
    try:
        for file in sorted(folder.glob("*.safetensors")):
            check_safetensors(file)
        for file in filter(is_index, sorted(folder.iterdir())):
            check_index(file)
    except (ValueError, FileNotFoundError) as error:
        raise BackboneError(str(error)) from None
    if (folder / "config.json").is_file():
        check_config(folder / "config.json", read_object(folder / "config.json"), target)
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "variant": variant}
    from_transformers = target.startswith("transformers:")
    options["dtype" if from_transformers else "torch_dtype"] = dtype
    if from_transformers:
        import_module("transformers.utils.logging").disable_progress_bar()
    try:
        with _LOADING:
            model, found = resolve(target).from_pretrained(str(folder), output_loading_info=True, **options)
    except Exception as error:  # whatever the class makes of an odd configuration
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BackboneError(f"{folder} could not be loaded as {target.split(':')[1]}: {reason}") from error
    # The libraries only warn, and draw what is missing at random.
    if missing := sorted(found["missing_keys"]):
        kind = target.split(":")[1]
        raise BackboneError(f"{folder} lacks {len(missing)} weights of {kind}, such as {missing[0]!r}: copy it again")
    # A network of diffusers that has more weights than its class computes with draws other pictures than it was
    # trained to. Text models are often stored with parts that only their training used.
    if not from_transformers and (over := sorted(found["unexpected_keys"])):
        raise BackboneError(
            f"{folder} holds {len(over)} weights that {target.split(':')[1]} has no place for, such as "
            f"{over[0]!r}: it was made for another network"
        )
    return model.to(device)


def _variant(folder: Path) -> str | None:
    """None for plain weight files, or the one variant (such as fp16) that is there; refuses pickled weights."""
    files = sorted(f.name for f in folder.iterdir() if f.name.endswith(".safetensors"))
    if not files:
        pickles = sorted(f.name for f in folder.iterdir() if f.suffix.lower() in PICKLE_SUFFIXES)
        if pickles:
            raise BackboneError(
                f"{folder} holds pickled weights ({pickles[0]}), which are never loaded; convert to safetensors"
            )
        raise BackboneError(f"{folder.parent}: the component {folder.name!r} has no *.safetensors weights")
    stems = {variant_of(name) for name in files}
    if "" in stems:
        return None
    if len(stems) > 1:
        raise BackboneError(f"{folder} holds several weight variants ({', '.join(sorted(stems))}); keep one")
    return stems.pop()


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        BackboneError: it is no JSON, or holds something else.
    """
    try:
        data = read_json(path)
    except ValueError as error:
        raise BackboneError(str(error)) from None
    if not isinstance(data, dict):
        raise BackboneError(f"{path} must hold an object")
    return data


def variant_of(file_name: str) -> str:
    """``model.fp16-00001-of-00002.safetensors`` -> ``fp16``; the empty string for plain names."""
    stem = re.sub(r"-\d+-of-\d+$", "", file_name.removesuffix(".safetensors"))
    return stem.partition(".")[2]


def _fetch(source: str, components: Sequence[str]) -> Path:
    repository, _, revision = source.removeprefix(HUB_PREFIX).partition("@")
    if repository.count("/") != 1:
        raise BackboneError(f"{source!r} is not {HUB_PREFIX}<owner>/<name>[@<revision>]")

    def fetch(names: Sequence[str], ignored: Sequence[str]) -> Path:
        patterns = [
            "model_index.json",
            CASCADE_FILE,
            *_TEXTS,
            *(f"{name}/{pattern}" for name in names for pattern in _HUB_PATTERNS),
        ]
        try:
            return fetch_snapshot(repository, revision or None, patterns, ignored)
        except HubError as error:
            raise BackboneError(str(error)) from error

    path = fetch(components, _VARIANTS)
    # Some repositories hold the smaller variant of a network's weights alone.
    folders = [path / name for name in components]
    bare = [f.name for f in folders if (f / "config.json").is_file() and not any(f.glob("*.safetensors"))]
    return fetch(bare, ()) if bare else path
