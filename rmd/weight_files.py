"""The files of a model: which are read, whether they are whole, and their digests.

Only safetensors are read. A pickled weight file anywhere in the folder is refused, since loading one runs code.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from rmd.fields import field_of, mapping, read_json

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_LONGEST_HEADER = 100_000_000
# What loading reads besides weights: configurations, and every form in which a tokenizer's vocabulary is kept.
_LOADED_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja")


def check_weights(folder: Path) -> None:
    """Refuse pickled weights anywhere in the folder; check that every safetensors file is there and complete.

    Raises:
        ValueError: a pickled or broken weight file, or no weights at all.
        FileNotFoundError: an index lists a weight file that is not there.
    """
    found = False
    for path in _files(folder):
        if path.suffix.lower() in PICKLE_SUFFIXES:
            raise ValueError(
                f"{path} is a pickled file, which can run code when it is loaded; only safetensors are read: "
                f"convert it (save_pretrained with safe_serialization=True) or remove it"
            )
        if path.suffix == ".safetensors":
            check_safetensors(path)
            found = True
        elif is_index(path):
            check_index(path)
    if not found:
        raise ValueError(f"{folder} holds no safetensors weights; give a diffusers folder with a cascade.json")


def is_index(path: Path) -> bool:
    """Whether the file lists the parts of a model's weights; its name may hold a variant, such as fp16."""
    return ".safetensors.index." in path.name and path.suffix == ".json"


def check_index(path: Path) -> None:
    """Check that the parts which an index lists are safetensors files beside it: loaders take them as they come.

    Raises:
        ValueError: it lists a file of another kind, or one elsewhere.
        FileNotFoundError: a part is not there.
    """
    for part in sorted({str(name) for name in field_of(mapping(read_json(path)), "weight_map", mapping).values()}):
        if Path(part).name != part or not part.endswith(".safetensors"):
            raise ValueError(f"{path} lists {part!r}; only safetensors files beside it are read")
        if not (path.parent / part).is_file():
            raise FileNotFoundError(f"{path} lists {part}, which is not there; fetch or copy it again")


def check_safetensors(path: Path) -> None:
    """Check that a safetensors file is as long as its header says, without reading the weights.

    Raises:
        ValueError: it is cut short or is no safetensors file; the message names the way out.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise ValueError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull`")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if len(start) == 8 and 8 + length > size and length <= _LONGEST_HEADER:
            raise ValueError(f"{path} is cut short inside its header; fetch or copy it again")
        try:
            if not 2 <= length <= _LONGEST_HEADER:
                raise ValueError
            header = json.loads(file.read(length))
            end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
            expected = 8 + length + int(end)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            raise ValueError(f"{path} is not a safetensors file; fetch or copy it again") from None
    if size < expected:
        raise ValueError(f"{path} is cut short: {size} of {expected} bytes are there; fetch or copy it again")
    if size > expected:
        raise ValueError(f"{path} has {size - expected} bytes too many; fetch or copy it again")


def _files(folder: Path) -> Iterator[Path]:
    """Every file below a folder. Linked folders are followed (teacher and student share components), loops are not."""
    seen: set[str] = set()
    for root, directories, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            directories.clear()
            continue
        seen.add(real)
        directories.sort()
        for name in sorted(names):
            yield Path(root) / name


def folder_digest(folder: Path) -> str | None:
    """sha256 of the weight file in a folder, over names and digests where there are several; None without any."""
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return file_digest(files[0])
    lines = "".join(f"{file.name} {file_digest(file)}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest() if files else None


def loaded_digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder that loading reads, by its relative path.

    Those are the index and what lies in the components' folders: weights, configurations and tokenizers. A changed
    configuration draws other pictures as surely as changed weights do.
    """
    relative = {path.relative_to(folder): path for path in _files(folder)}
    return {
        name.as_posix(): file_digest(path)
        for name, path in relative.items()
        if path.suffix in _LOADED_SUFFIXES
        and (path.suffix == ".safetensors" or name.name == "model_index.json" or len(name.parts) > 1)
    }


def decoder_digests(folder: Path) -> dict[str, str]:
    """sha256 of what is read of a small decoder's folder, by name; empty where it is not there yet."""
    return {
        path.name: file_digest(path) for path in (*folder.glob("config.json"), *sorted(folder.glob("*.safetensors")))
    }


def file_digest(path: Path) -> str:
    """sha256 of a file, computed once a process for each (path, size, time of change)."""
    stat = path.stat()
    return _digest_of(str(path.resolve()), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _digest_of(path: str, size: int, modified_ns: int) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
