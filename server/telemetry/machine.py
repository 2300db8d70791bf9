"""Gauges of what the server stands on: its version, its disks, and NVIDIA GPUs where NVML is. Read at each scrape."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

COMMIT_VARIABLE = "RMD_COMMIT"


@cache
def build_facts() -> dict[str, str]:
    """Return the versions of this server and of torch, and its commit: of ``RMD_COMMIT``, or of its checkout."""
    return {
        "version": version("rmd"),
        "commit": os.environ.get(COMMIT_VARIABLE) or _checked_out() or "unknown",
        "torch": _version_of("torch"),
        "python": platform.python_version(),
    }


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _checked_out() -> str:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        asked = ["git", "-C", str(root), "rev-parse", "HEAD"]
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


class MachineCollector(Collector):
    """See the module.

    Args:
        stores: folders whose disks are looked at, by what they are for.
        backends: gives what each model is served by, by model id.
    """

    def __init__(self, stores: Mapping[str, Path], backends: Callable[[], Mapping[str, str]]) -> None:
        self._stores, self._backends = stores, backends
        self._build = build_facts()
        self._nvml = open_nvml()

    def describe(self) -> Iterable[Metric]:
        """None beforehand."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Look now."""
        yield InfoMetricFamily("rmd_build", "What this server is.", value=self._build)
        text = "1 for each model, and what it is served by."
        models = GaugeMetricFamily("rmd_model_info", text, labels=["model", "backend"])
        for model, backend in self._backends().items():
            models.add_metric([model, backend], 1)
        yield models
        yield from self._disks()
        if self._nvml is not None:
            yield from gpu_gauges(self._nvml)

    def _disks(self) -> Iterator[Metric]:
        free = GaugeMetricFamily("rmd_disk_free_bytes", "Free on the disk of a store.", labels=["store"])
        size = GaugeMetricFamily("rmd_disk_size_bytes", "Size of the disk of a store.", labels=["store"])
        for name, folder in self._stores.items():
            there = next((each for each in (folder, *folder.resolve().parents) if each.is_dir()), None)
            if there is not None:
                usage = shutil.disk_usage(there)
                free.add_metric([name], usage.free)
                size.add_metric([name], usage.total)
        yield free
        yield size


def open_nvml() -> Any | None:
    """Return the module ``pynvml``, begun; None where it is not installed, or there is no NVIDIA driver."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def gpu_gauges(nvml: Any) -> Iterator[Metric]:
    """Ask every GPU of the machine. What one does not tell (some no power; none anything, once lost) is left out.

    Args:
        nvml: the module ``pynvml``.
    """
    asked: tuple[tuple[str, str, Callable[[Any], float]], ...] = (
        (
            "rmd_device_memory_used_bytes",
            "Memory used on a GPU.",
            lambda gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used,
        ),
        ("rmd_device_memory_size_bytes", "Memory of a GPU.", lambda gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).total),
        ("rmd_device_power_watts", "Power that a GPU draws.", lambda gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000),
        (
            "rmd_device_utilization_ratio",
            "Share of the last moments in which a GPU ran a kernel.",
            lambda gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,
        ),
    )
    gpus = {}
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            gpus[nvml.nvmlDeviceGetUUID(handle)] = handle
        except nvml.NVMLError:
            continue
    for name, text, ask in asked:
        family = GaugeMetricFamily(name, text, labels=["gpu"])
        for uuid, handle in gpus.items():
            try:
                family.add_metric([uuid], ask(handle))
            except nvml.NVMLError:
                continue
        yield family
