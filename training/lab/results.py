"""Reads the results' files into what the tables need."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from training.lab.grid import Grid
from training.lab.job import SETS_FILE
from training.lab.statistics import Difference, paired_difference

LOG_RANK, PICTURE_LOG_RANK = "log rank, text", "log rank, picture"


@dataclass
class Results:
    """All results of a folder.

    Attributes:
        common: the content of ``sets.json``; without sets before anything was measured.
        files: row -> training seed -> the job's result.
    """

    common: Mapping[str, Any]
    files: dict[str, dict[int, dict[str, Any]]]

    @classmethod
    def read(cls, grid: Grid, folder: Path) -> Results:
        """Every result of the grid's rows that is there; there may be none.

        Raises:
            ValueError: a result is of another teacher than the others.
        """
        path = folder / SETS_FILE
        if not path.is_file():
            return cls({"sets": {}, "strip": []}, {})
        common = json.loads(path.read_text(encoding="utf-8"))
        files: dict[str, dict[int, dict[str, Any]]] = {}
        for row in grid.rows:
            for seed in grid.seeds:
                file = folder / f"{row.key}-s{seed}.json"
                if not file.is_file():
                    continue
                content = json.loads(file.read_text(encoding="utf-8"))
                if content["teacher"] != common["teacher"]:
                    raise ValueError(f"{file} is of another teacher than {path}: keep each teacher's results apart")
                files.setdefault(row.key, {})[seed] = content
        return cls(common, files)

    def of_other_settings(self) -> list[str]:
        """Where the students were distilled by versions that know different settings, or in several dtypes: the rows of
        each."""
        groups: dict[tuple[str, frozenset[str]], list[str]] = {}
        for key, seeds in self.files.items():
            for seed, content in seeds.items():
                if "settings" in content:
                    kind = content["dtype"], frozenset(content["settings"])
                    groups.setdefault(kind, []).append(f"{key}-s{seed}")
        return [", ".join(names) for names in groups.values()] if len(groups) > 1 else []

    @property
    def concepts(self) -> Tensor:
        """(N,) the concept of each picture of all sets, in order; the sets have none in common."""
        parts, offset = [], 0
        for entry in self.common["sets"].values():
            part = torch.tensor(entry["concepts"])
            parts.append(part + offset)
            offset += int(part.max()) + 1
        return torch.cat(parts)

    def measured(self, key: str, column: str = "updates", intensity: str = "") -> dict[int, Mapping[str, Any]]:
        """By training seed, what was measured by set at a snapshot, with the row's own `a` or another."""
        found: dict[int, Mapping[str, Any]] = {}
        for seed, content in self.files.get(key, {}).items():
            snapshot = content["snapshots"].get(column, content["snapshots"]["updates"])
            sets = snapshot.get("intensities", {}).get(intensity) if intensity else snapshot["sets"]
            if sets is not None:
                found[seed] = sets
        return found

    def log_ranks(
        self, key: str, column: str = "updates", kind: str = "text", intensity: str = ""
    ) -> dict[int, Tensor]:
        """By training seed, log2(1 + rank) of every picture, averaged over sampling seeds; 0 is best."""
        return {
            seed: torch.cat([torch.log2(1 + _ranks(entry, kind)).mean(0) for entry in sets.values()])
            for seed, sets in self.measured(key, column, intensity).items()
        }

    def recalls(self, key: str, column: str = "updates", kind: str = "text", k: int = 5) -> dict[int, float]:
        """By training seed, recall at ``k`` over all pictures and sampling seeds."""
        return {
            seed: float(torch.cat([(_ranks(entry, kind) < k).double().mean(0) for entry in sets.values()]).mean())
            for seed, sets in self.measured(key, column).items()
        }

    def kids(self, key: str, column: str = "updates", intensity: str = "") -> dict[int, float]:
        """By training seed, KID x 1e3, averaged over sets and sampling seeds."""
        return {
            seed: fmean(fmean(entry["kid"]) for entry in sets.values())
            for seed, sets in self.measured(key, column, intensity).items()
        }

    def difference(self, first: str, second: str, column: str = "updates", kind: str = "text") -> Difference | None:
        """Log rank of one row minus another's; below zero the first is better. None where one is missing."""
        a, b = self.log_ranks(first, column, kind), self.log_ranks(second, column, kind)
        if not (a and b):
            return None
        untrained = not all("settings" in content for key in (first, second) for content in self.files[key].values())
        return paired_difference(a, b, self.concepts, untrained=untrained)

    def sampling_cost(self, key: str) -> float:
        """Forward passes at the teacher's side that a picture costs."""
        return float(next(iter(self.files[key].values()))["sampling_cost"])


def _ranks(entry: Mapping[str, Any], kind: str) -> Tensor:
    return torch.tensor(entry[f"{kind}_ranks"], dtype=torch.float64)
