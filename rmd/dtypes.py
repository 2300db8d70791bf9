"""In which dtype a device is fast, and dtypes by name."""

from __future__ import annotations

import torch

from rmd.backbones.base import BackboneError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def native_dtype(device: torch.device | str) -> torch.dtype:
    """The dtype in which the device is fast: bfloat16, or float32 on a CPU that only emulates it.

    That is most desktops and laptops: on two cores with AVX2 and no more, a matrix product in bfloat16 took 120 times
    as long as in float32.
    """
    if torch.device(device).type == "cuda":
        return torch.bfloat16  # from Ampere on; older GPUs want float16, which is to be asked for
    multiplies = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # oneDNN's own answer
    return torch.bfloat16 if multiplies is not None and multiplies() else torch.float32


def parse_dtype(name: str, device: torch.device | str) -> torch.dtype:
    """The dtype called so; "auto" is the device's own (:func:`native_dtype`).

    Raises:
        BackboneError: an unknown name.
    """
    if name == "auto":
        return native_dtype(device)
    if name not in DTYPES:
        raise BackboneError(f"dtype {name!r}: use auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Its name, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
