"""When a device's memory is exhausted: to see it, and to give back what is not used."""

from __future__ import annotations

import gc

import torch

_PHRASES = (
    "out of memory",
    "can't allocate memory",
    "bad_alloc",
    "not enough memory",
    "status_alloc_failed",  # cuBLAS and cuDNN
)
# All that AOTInductor's runtime says of any failure up to torch 2.11; the reason goes to standard error.
_MUTE = "api call failed at"
_seen: dict[int, int] = {}


def free_memory() -> None:
    """Give back what is not used any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a run failed for lack of memory, on any device; to be asked once an error, soon after it.

    Where the error does not say why, the allocator does: it counts how often it had to refuse.
    """
    text = str(error).lower()
    refused = _refusals()
    return (
        isinstance(error, torch.OutOfMemoryError)
        or any(phrase in text for phrase in _PHRASES)
        or (refused and _MUTE in text)
    )


def _refusals() -> bool:
    """Whether an allocator has refused anything since this was asked last."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    counts = {
        index: int(torch.cuda.memory_stats(index).get("num_ooms", 0)) for index in range(torch.cuda.device_count())
    }
    found = any(count > _seen.get(index, 0) for index, count in counts.items())
    _seen.update(counts)
    return found
