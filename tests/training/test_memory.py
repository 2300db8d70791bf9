"""What training frees stays with the process: a buffer taken again faults no page in again."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from training.runtime.memory import keep_freed_memory

_FAULTS = """
import resource, sys
import numpy as np
from training.runtime.memory import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory("cpu")
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(16_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(way: str) -> int:
    """Page faults of the fourth 128 MB in turn."""
    clean = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", "LD_PRELOAD")}
    run = subprocess.run([sys.executable, "-c", _FAULTS, way], env=clean, capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_freed_memory_is_kept() -> None:
    # Of itself glibc maps 128 MB anew each time: 64 faults where huge pages are to be had, else 32,000.
    assert faults("kept") < 32 <= faults("usual")


def test_an_environment_that_chose_is_left_alone() -> None:
    assert not keep_freed_memory("cpu", {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"})
    assert not keep_freed_memory("cpu", {"LD_PRELOAD": "libtcmalloc.so"})
    assert not keep_freed_memory("cuda", {})
