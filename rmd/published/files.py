"""Published weight files: opened by their headers, read one tensor at a time, refused in one sentence.

Only safetensors. A pickle runs code when it is read, so the refusal names the way out instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from rmd.backbones.folder import variant_of
from rmd.fields import field_of, mapping, read_json
from rmd.weight_files import PICKLE_SUFFIXES, check_index, check_safetensors, file_digest, is_index

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
EIGHT_BIT = (torch.float8_e4m3fn, torch.float8_e5m2)
_ROWS = 1024
SCALED = re.compile(
    r"(^|\.)(scale_weight|scale_input|weight_scale|weight_scale_inv|input_scale|scaled_fp8|comfy_quant|SCB)(\.|$)"
)
"""Keys of quantised files: without these scales their values mean nothing."""


class ImportRefused(ValueError):  # noqa: N818 - named for what happened, as the sentence that it carries reads
    """A published file that is not taken; the message names it, the reason and the way out."""


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies, its shape and its dtype as stored."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class WeightFiles(Mapping[str, Tensor]):
    """The tensors of one or several safetensors files by name; ``files[name]`` reads that one alone.

    Attributes:
        path: what the user named: a file, an index or a folder.
        files: the safetensors files.
        entries: every tensor's place, shape and dtype, from the headers.
        metadata: text fields of the headers, the later file's winning.
    """

    path: Path
    files: tuple[Path, ...]
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> WeightFiles:
        """Read the headers of a safetensors file, of all parts of an index, or of all weights in a folder.

        Raises:
            ImportRefused: a pickle, an archive, a file that is cut short, two files with the same tensor, no weights.
            FileNotFoundError: there is no such file, or a part is missing.
        """
        files = _safetensors_of(path)
        entries: dict[str, Entry] = {}
        metadata: dict[str, str] = {}
        for file in files:
            refuse_other_formats(file)
            try:
                check_safetensors(file)
            except ValueError as error:
                raise ImportRefused(str(error)) from None
            with safe_open(file, framework="pt") as opened:
                metadata |= opened.metadata() or {}
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    if name in entries:
                        raise ImportRefused(f"{path}: {entries[name].file.name} and {file.name} both hold {name!r}")
                    part = opened.get_slice(name)
                    kind = str(part.get_dtype())
                    if kind not in _DTYPES:
                        raise ImportRefused(f"{file}: tensor {name!r} is stored as {kind}, which is not supported")
                    entries[name] = Entry(file, tuple(part.get_shape()), _DTYPES[kind])
        if not entries:
            raise ImportRefused(f"{path} holds no tensors")
        return cls(path, files, entries, metadata)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.entries[name].file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape by name."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def same(self, name: str, other: str) -> bool:
        """Whether two tensors hold the same values; read by rows, since a table of words takes gigabytes."""
        if self.entries[name].shape != self.entries[other].shape:
            return False
        if not self.entries[name].shape:
            return torch.equal(self[name].double(), self[other].double())
        with (
            safe_open(self.entries[name].file, framework="pt") as first,
            safe_open(self.entries[other].file, framework="pt") as second,
        ):
            ours, theirs = first.get_slice(name), second.get_slice(other)
            return all(
                torch.equal(ours[row : row + _ROWS].double(), theirs[row : row + _ROWS].double())
                for row in range(0, self.entries[name].shape[0], _ROWS)
            )

    def digests(self) -> dict[str, str]:
        """sha256 of every file by its name."""
        return {file.name: file_digest(file) for file in self.files}


def refuse_other_formats(path: Path) -> None:
    """Refuse what is not safetensors, by name and by the first bytes.

    Raises:
        ImportRefused: a pickle, a zip archive, a GGUF file or any other format.
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise ImportRefused(
            f"{path} is a pickled file, which can run code when it is read, so it is never read here: convert it where "
            f"nothing can be harmed, with torch.load(path, weights_only=True) and safetensors.torch.save_file, and "
            f"give the .safetensors file"
        )
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"PK\x03\x04":
        raise ImportRefused(
            f"{path} is a zip archive: unpack it and give the folder or the .safetensors file in it (a file that "
            f"torch.save wrote is such an archive too, with pickles inside: convert it to safetensors)"
        )
    if start == b"GGUF" or path.suffix.lower() == ".gguf":
        raise ImportRefused(f"{path} is a GGUF file with quantised weights; give the safetensors release of the model")
    if path.suffix.lower() != ".safetensors":
        raise ImportRefused(f"{path} is not a .safetensors file, and only those are read")


def _safetensors_of(path: Path) -> tuple[Path, ...]:
    if path.is_dir():
        return folder_weights(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a .safetensors file, its index or a folder")
    if is_index(path):
        return _parts(path)
    return (path,)


def _parts(index: Path) -> tuple[Path, ...]:
    try:
        check_index(index)
        listed = field_of(mapping(read_json(index)), "weight_map", mapping)
    except ValueError as error:
        raise ImportRefused(f"{index}: {error}" if str(index) not in str(error) else str(error)) from None
    if not listed:
        raise ImportRefused(f"{index}: field 'weight_map' lists no file; fetch or copy it again")
    return tuple(index.parent / name for name in sorted({str(name) for name in listed.values()}))


def folder_weights(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of one network's folder: the plain ones, or else those of its one variant.

    Raises:
        ImportRefused: pickles alone, several variants, or no weights.
        FileNotFoundError: a part that an index lists is missing.
    """
    names = sorted(file.name for file in folder.iterdir() if file.name.endswith(".safetensors"))
    if not names:
        pickles = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICKLE_SUFFIXES)
        if pickles:
            refuse_other_formats(pickles[0])
        raise ImportRefused(f"{folder} holds no .safetensors weights")
    by_variant: dict[str, list[str]] = {}
    for name in names:
        by_variant.setdefault(variant_of(name), []).append(name)
    if "" not in by_variant and len(by_variant) > 1:
        raise ImportRefused(f"{folder} holds several variants ({', '.join(sorted(by_variant))}); keep one")
    variant = "" if "" in by_variant else next(iter(by_variant))
    chosen = by_variant[variant]
    for index in (file for file in folder.iterdir() if is_index(file)):
        parts = _parts(index)
        if parts[0].name in chosen:
            return parts  # also where stale files of another split lie beside the listed ones
    return tuple(folder / name for name in chosen)


def finite(tensor: Tensor, name: str, file: Path) -> Tensor:
    """The tensor, checked.

    Raises:
        ImportRefused: it holds values that are not finite.
    """
    # float8 knows no isfinite.
    wide = tensor.float() if tensor.dtype in EIGHT_BIT else tensor
    if wide.is_floating_point() and not bool(torch.isfinite(wide).all()):
        raise ImportRefused(f"{file}: tensor {name!r} holds values that are not finite (NaN or infinity)")
    return tensor
