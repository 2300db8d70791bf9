"""Every test runs on the CPU, on one thread, offline."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# The host code around the kernels, in which the C++ compiler spends most of a tiny engine's build. The kernels
# themselves are compiled as they are shipped, and so are whole engines in tests_slow.
os.environ.setdefault("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")

import pytest
import torch
from hypothesis import settings


@pytest.fixture(autouse=True)
def _one_thread_and_fixed_seed() -> None:
    """Small tensors gain nothing from threads, and the machine may have few; global randomness starts alike."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


settings.register_profile("any-machine", deadline=None, print_blob=True)
settings.load_profile("any-machine")

_LONG = ("engines", "training")  # folders whose files compile and train


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes go first, whatever they hold: the last ones of a run should keep no worker waiting."""
    items.sort(key=lambda item: item.path.parent.name not in _LONG)
