"""How glibc is to keep the memory that training frees on the CPU."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8  # malloc.h


def keep_freed_memory(device: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Let glibc keep what an update frees for the next, in this process; whether it was told to.

    Of itself it gives every large buffer back at once and has it mapped again, page by page: half of the time of
    encoding pictures went into the kernel (two AVX-512 cores). To be called before much is allocated. Nothing is done
    for a GPU, without glibc, or where the environment names an allocator or its ways.

    Args:
        device: the kind that is trained on.
    """
    named = any(name in {"GLIBC_TUNABLES", "LD_PRELOAD"} or "MALLOC" in name for name in environment)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if device != "cpu" or named or mallopt is None:
        return False
    policy = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_TOP_PAD: 64 << 20, _M_ARENA_MAX: 1}
    answers = [mallopt(name, value) for name, value in policy.items()]  # each is to be told, whatever the last said
    return all(answer == 1 for answer in answers)
