"""Writes one network's safetensors, merged in float32 and rounded once, a part at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rmd.published.files import EIGHT_BIT, ImportRefused, finite
from rmd.published.merge import Change
from rmd.published.place import finished_file

LARGEST_FILE = 5 * 10**9
_WIDER = {torch.float16: "--dtype bfloat16 or float32", torch.bfloat16: "--dtype float32"}
"""What holds values that a dtype does not."""
Progress = Callable[[str, int], None]
"""Called with what is being written and how many further bytes of it are done."""


def stored_dtype(dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype that a tensor of ``dtype`` is stored in: ``wanted``, else its own; eight bits become bfloat16."""
    if not dtype.is_floating_point:
        return dtype
    return wanted or (torch.bfloat16 if dtype in EIGHT_BIT else dtype)


def write_network(
    folder: Path,
    stem: str,
    tensors: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
    changes: Mapping[str, Sequence[Change]],
    progress: Progress,
    *,
    source: Path,
    largest: int = LARGEST_FILE,
) -> None:
    """Write ``<stem>.safetensors``, or parts of at most ``largest`` bytes with their index; a part that is there stays.

    Args:
        folder: made if absent.
        tensors: read one at a time.
        dtypes: of the stored tensors, by name.
        changes: what is added to a tensor, by name, in float32 and before the one rounding.
        source: named in errors.

    Raises:
        ImportRefused: a tensor holds values that are not finite, as published, merged or in the stored dtype.
        OSError: the disk is full, or otherwise refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = _parts(tensors, dtypes, largest)
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(parts, start=1):
        file = f"{stem}.safetensors" if len(parts) == 1 else f"{stem}-{number:05}-of-{len(parts):05}.safetensors"
        sizes = {name: _size(tensors, dtypes, name) for name in names}
        total += sum(sizes.values())
        weight_map |= dict.fromkeys(names, file)
        if (folder / file).is_file():
            progress(folder.name, sum(sizes.values()))
            continue
        state: dict[str, Tensor] = {}
        for name in names:
            state[name] = _merged(tensors[name], changes.get(name, ()), dtypes[name], name, source)
            progress(folder.name, sizes[name])
        try:
            with finished_file(folder / file) as partial:
                save_file(state, partial, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, for one
            raise OSError(f"{folder / file} could not be written: {error}") from error
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _merged(tensor: Tensor, changes: Sequence[Change], dtype: torch.dtype, name: str, source: Path) -> Tensor:
    finite(tensor, name, source)
    if not changes:
        # A copy of its own: a converted tensor may be a view of another.
        stored = tensor.to(dtype).clone(memory_format=torch.contiguous_format)
    else:
        wide = tensor.to(torch.float32)
        for change in changes:
            wide = wide + change.delta(tuple(tensor.shape))
        stored = wide.to(dtype).contiguous()
    if stored.is_floating_point() and not bool(torch.isfinite(stored).all()):
        raise _too_large(tensor, changes, dtype, name, source)
    return stored


def _too_large(tensor: Tensor, changes: Sequence[Change], dtype: torch.dtype, name: str, source: Path) -> ImportRefused:
    """The refusal of values that ``dtype`` does not hold, with the file that brings them: the tensor's, or a LoRA's."""
    wide = tensor.to(torch.float32)
    file, way = source, "" if dtype not in _WIDER else f"give {_WIDER[dtype]}"
    for change in changes:
        if not bool(torch.isfinite(wide.to(dtype)).all()):
            break
        wide = wide + change.delta(tuple(tensor.shape))
        file = change.lora.path
    if file != source:
        way = f"{way}{', or ' if way else 'give '}a smaller strength"
    short = str(dtype).removeprefix("torch.")
    largest = f"up to {float(wide.abs().max()):g}, and {short} ends at {torch.finfo(dtype).max:g}"
    sum_of = "" if file == source else " with it added"
    told = f"{file}: tensor {name!r}{sum_of} holds values that are not finite in {short} ({largest})"
    return ImportRefused(f"{told}; {way}" if way else told)


def _size(tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], name: str) -> int:
    shapes: Mapping[str, tuple[int, ...]] = tensors.shapes  # type: ignore[attr-defined]
    return math.prod(shapes[name]) * dtypes[name].itemsize


def _parts(tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], largest: int) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    filled = 0
    for name in tensors:
        size = _size(tensors, dtypes, name)
        if parts[-1] and filled + size > largest:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size
    return parts
