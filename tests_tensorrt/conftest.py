"""Real TensorRT-RTX plans on a machine without a GPU.

TensorRT-RTX finishes a plan just in time on the host that loads it: its builder needs no GPU. torch-tensorrt's Python
code, however, asks `torch.cuda` about the device when it is imported and when it sets up a build. Those questions are
answered here, for an A100, and nothing else is replaced. The product itself never does this.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

CAPABILITY = (8, 0)


def answer_cuda_queries() -> None:
    """Give torch's CUDA queries the answers of one A100; `is_available` stays false, and work on a device fails."""
    properties = SimpleNamespace(
        name="NVIDIA A100", major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=40 << 30, multi_processor_count=108
    )
    answers: dict[str, Any] = {
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_capability": lambda device=None: CAPABILITY,
        "get_device_name": lambda device=None: properties.name,
        "get_device_properties": lambda device=None: properties,
        "mem_get_info": lambda device=None: (38 << 30, 40 << 30),
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "init": lambda: None,
        "_lazy_init": lambda: None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    # The wheel with the bindings alone lacks the thin package that gives them their name.
    sys.modules.setdefault("tensorrt_rtx", importlib.import_module("tensorrt_rtx_bindings"))


def import_without_cuda_libraries() -> None:
    """Import torch-tensorrt as if it had been installed without its C++ runtime, which links against CUDA's torch."""
    is_file = os.path.isfile
    os.path.isfile = lambda path: "torchtrt" not in str(path) and is_file(path)
    torch.version.cuda = "13.0"
    for name in ("_CudaDeviceProperties",):  # named in annotations only
        if not hasattr(torch._C, name):
            setattr(torch._C, name, type(name, (), {}))
    try:
        importlib.import_module("torch_tensorrt")
    finally:
        os.path.isfile = is_file


def keep_tracing_on_the_cpu() -> None:
    """One decomposition makes its tensor on "the GPU" while tracing; network and inputs are on the CPU here."""
    device = importlib.import_module("torch_tensorrt._Device").Device
    original = device.to
    device.to = lambda self, kind: torch.device("cpu") if kind is torch.device else original(self, kind)


PROFILES: list[int] = []
"""How many optimisation profiles each plan was built with."""


def build_for(capability: tuple[int, int]) -> None:
    """Name the GPU to build for; by default the builder takes the one that is installed."""
    tensorrt = importlib.import_module("tensorrt")
    interpreter = importlib.import_module("torch_tensorrt.dynamo.conversion._TRTInterpreter").TRTInterpreter
    original = interpreter._populate_trt_builder_config

    def populate(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = original(self, *args, **kwargs)
        PROFILES.append(config.num_optimization_profiles)
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(tensorrt.ComputeCapability, "SM{}{}".format(*capability)), 0)
        return config

    interpreter._populate_trt_builder_config = populate


class BuiltPlan:
    """A plan that was built. Only a machine with a GPU can load it; torch-tensorrt asks for its bytes and no more."""

    def __init__(self, logger: Any) -> None:
        self.plan: Any = None

    def deserialize_cuda_engine(self, plan: Any) -> BuiltPlan:
        self.plan = plan
        return self

    def serialize(self) -> Any:
        return self.plan


# In this order: the library asks while it is imported.
answer_cuda_queries()
import_without_cuda_libraries()
importlib.import_module("tensorrt").Runtime = BuiltPlan
keep_tracing_on_the_cpu()
build_for(CAPABILITY)


@pytest.fixture
def profiles() -> list[int]:
    """How many optimisation profiles each plan of this test was built with; 0 for static ones."""
    PROFILES.clear()
    return PROFILES


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
