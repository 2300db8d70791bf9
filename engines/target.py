"""The machine an engine is built for, and whether it fits the machine that wants to run it."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from engines.errors import BackendUnavailable
from rmd.backbones.base import BackboneError, usable_device

# Compilers are told -march=native, so every extension that they may use is part of the target.
_EXTENSIONS = re.compile(r"(avx|amx|fma|f16c|bmi|vnni|gfni|vaes|vpclmul|neon|asimd|sve|sme|bf16|i8mm|fp16).*")
_CPUINFO = Path("/proc/cpuinfo")
_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Target:
    """What an engine's machine code depends on.

    Attributes:
        device: "cpu" or "cuda".
        platform: operating system and architecture.
        instruction_set: CPU extensions, sorted, space-separated; empty for CUDA.
        compute_capability: such as "9.0"; empty for the CPU.
        cuda: CUDA version of torch; empty for the CPU.
        driver: major version of the GPU driver; empty for the CPU.
        gpu: its model: plans and kernels are timed on one, and another of the same capability may refuse them; empty
            for the CPU.
    """

    device: str
    platform: str
    instruction_set: str = ""
    compute_capability: str = ""
    cuda: str = ""
    driver: str = ""
    gpu: str = ""

    def to_dict(self) -> dict[str, str]:
        """As stored in a manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Target:
        """Read what :meth:`to_dict` wrote."""
        return cls(**{name: str(data.get(name, "")) for name in cls.__dataclass_fields__})

    def differences(self, here: Target) -> list[str]:
        """Why an engine of this target cannot run on ``here``: one short phrase each; empty when it can.

        A CPU that has more extensions than the engine uses is fine; one that lacks any is not.
        """
        found = [
            f"{label} {theirs or 'none'}, here {ours or 'none'}"
            for label, theirs, ours in (
                ("device", self.device, here.device),
                ("platform", self.platform, here.platform),
                ("GPU", self.gpu, here.gpu),
                ("GPU compute capability", self.compute_capability, here.compute_capability),
                ("CUDA", self.cuda, here.cuda),
                ("GPU driver major version", self.driver, here.driver),
            )
            if theirs != ours
        ]
        lacking = sorted(set(self.instruction_set.split()) - set(here.instruction_set.split()))
        if lacking:
            found.append(f"CPU instructions {' '.join(lacking)}, which this CPU lacks")
        return found


def parse_device(device: torch.device | str) -> torch.device:
    """The device of engines: the CPU, or the GPU that CUDA counts first.

    Raises:
        BackendUnavailable: an unknown device, one without engines, no CUDA, or another GPU than the first.
    """
    try:
        parsed = usable_device(device)
    except BackboneError as error:
        raise BackendUnavailable(str(error)) from None
    if parsed.type not in ("cpu", "cuda"):
        raise BackendUnavailable(f"no backend builds engines for device {str(device)!r}; use cpu or cuda")
    if parsed.type == "cuda" and parsed.index:
        raise BackendUnavailable(
            f"device {str(device)!r}: engines use the first GPU; "
            f"set CUDA_VISIBLE_DEVICES={parsed.index} and --device cuda"
        )
    return parsed


def this_machine(device: torch.device | str) -> Target:
    """The target of ``device`` on this machine.

    Raises:
        BackendUnavailable: see :func:`parse_device`.
    """
    device = parse_device(device)
    kind = device.type
    name = f"{platform.system().lower()}-{platform.machine()}"
    if kind == "cpu":
        return Target("cpu", name, instruction_set=_instruction_set())
    major, minor = torch.cuda.get_device_capability(device)
    gpu = torch.cuda.get_device_name(device)
    return Target(kind, name, "", f"{major}.{minor}", torch.version.cuda or "", _driver_major(), gpu)


def host_instructions() -> str:
    """The extensions of this machine's CPU, as :class:`Target` has them."""
    return _instruction_set()


def machine_with(device: str) -> Target:
    """As :func:`this_machine`; where there is no such device, a target that fits no engine of it."""
    try:
        return this_machine(device)
    except BackendUnavailable:
        return Target("", "")


@lru_cache(maxsize=1)
def _instruction_set() -> str:
    flags: set[str] = set()
    if _CPUINFO.is_file():
        for line in _CPUINFO.read_text(encoding="utf-8").splitlines():
            label, _, value = line.partition(":")
            if label.strip() in ("flags", "Features"):
                flags = {flag for flag in value.split() if _EXTENSIONS.fullmatch(flag)}
                break
    return " ".join(sorted(flags or {torch.backends.cpu.get_cpu_capability().lower()}))


@lru_cache(maxsize=1)
def _driver_major() -> str:
    if not _DRIVER.is_file():
        return ""
    match = re.search(r"(\d+)\.\d+(?:\.\d+)?", _DRIVER.read_text(encoding="utf-8"))
    return match.group(1) if match else ""


@lru_cache(maxsize=32)
def package_version(name: str) -> str:
    """Version of an installed package, "" when it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
