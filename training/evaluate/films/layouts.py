"""How two benchmarks of films want a model's films named and laid out, so that their own scripts run on them.

VBench (Vchitect/VBench, ``prompts/README.md`` and ``evaluate.sh``): ``<prompts file>/<prompt>-<index>.mp4``, five films
a prompt, 25 of ``temporal_flickering``, each of another seed. T2V-CompBench (KaiyueSun98/T2V-CompBench, README):
``<category>/0001.mp4`` in the order of the prompts, one film a prompt. Neither bears other files beside the films.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from training.evaluate.shared.sources import Drawing, noise_seed

_SAMPLES, _SAMPLES_OF = 5, {"temporal_flickering": 25}
_LONGEST_NAME = 255  # bytes, of Linux and macOS
# The folder that a VBench dimension is measured on, where it is not its own (dimension_to_folder.json).
VBENCH_FOLDERS = {
    "background_consistency": "scene",
    "aesthetic_quality": "overall_consistency",
    "imaging_quality": "overall_consistency",
    "motion_smoothness": "subject_consistency",
    "dynamic_degree": "subject_consistency",
}
# T2V-CompBench's folder of a prompts file, where it is not the file's name without its number.
_COMPBENCH_FOLDERS = {"spatial_relationship": "spatial_relationships", "numeracy": "generative_numeracy"}


def vbench(name: str, prompts: Sequence[str], out: Path, first_seed: int = 0) -> list[Drawing]:
    """The films of one of VBench's prompt files.

    Args:
        name: the file's, without its suffix.
        first_seed: the sampling seed of index 0; the next ones count up.

    Raises:
        ValueError: a prompt that cannot be a file's name.
    """
    samples = range(_SAMPLES_OF.get(name, _SAMPLES))
    drawings = []
    for prompt in prompts:
        if "/" in prompt or len(f"{prompt}-{samples[-1]}.mp4".encode()) > _LONGEST_NAME:
            raise ValueError(f"{prompt!r} cannot name a file, as VBench's layout has it: leave it out or shorten it")
        drawings += [
            Drawing(prompt, noise_seed(prompt, first_seed + index), out / name / f"{prompt}-{index}.mp4")
            for index in samples
        ]
    return drawings


def compbench(name: str, prompts: Sequence[str], out: Path, first_seed: int = 0) -> list[Drawing]:
    """The films of one of T2V-CompBench's prompt files.

    Args:
        name: the file's, without its suffix, such as ``7_numeracy``.
        first_seed: the sampling seed.
    """
    category = re.sub(r"^\d+_", "", name)
    folder = out / _COMPBENCH_FOLDERS.get(category, category)
    return [
        Drawing(prompt, noise_seed(prompt, first_seed), folder / f"{number:04d}.mp4")
        for number, prompt in enumerate(prompts, start=1)
    ]


LAYOUTS: Mapping[str, Callable[[str, Sequence[str], Path, int], list[Drawing]]] = {
    "vbench": vbench,
    "compbench": compbench,
}


def next_commands(layout: str, out: Path, folders: Sequence[str]) -> list[str]:
    """What measures the films, by the benchmark's own scripts."""
    if layout == "compbench":
        return [f"--video-path {out / folder}" for folder in folders]
    dimensions = [*folders, *VBENCH_FOLDERS]
    return [
        f"vbench evaluate --videos_path {out / VBENCH_FOLDERS.get(dimension, dimension)} --dimension {dimension}"
        for dimension in dimensions
        if VBENCH_FOLDERS.get(dimension, dimension) in folders
    ]
