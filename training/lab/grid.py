"""The grid as data: schedules, rows, tables and what was expected of them, read from YAML.

A row names settings of :class:`~training.distill.settings.DistillSettings`. One that this version does not know makes
the row "not yet available"; the others run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rmd.cascade import Cascade, Step
from rmd.noise_schedule import RectifiedFlow
from rmd.size import Size
from rmd.timesteps import map_timestep, uniform_teacher_timesteps
from training.distill.settings import DistillSettings
from training.embedded.data.split import Split

DEFAULT_GRID = Path(__file__).parent / "grid.yaml"
CONFIGS = Path(__file__).parent.parent / "configs"


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Schedule(_Data):
    """One cascade.

    Attributes:
        sides: one a stage where there are ``thresholds``, else one a step, or one for all of them.
        steps: how many, evenly spaced on the teacher's axis, where no ``times`` are given.
        times: the steps' own teacher timesteps.
        thresholds: logSNR thresholds between the stages.
        teacher_side: `R` of Eq. 2 for a student that ends below the teacher's side; its times are mapped from there.
        options: further fields of :class:`~rmd.cascade.Cascade`.
    """

    sides: tuple[int, ...]
    steps: int = Field(4, ge=1)
    times: tuple[int, ...] = ()
    thresholds: tuple[float, ...] = ()
    teacher_side: int | None = None
    options: dict[str, Any] = {}

    def cascade(self, name: str) -> Cascade:
        """The cascade.

        Raises:
            ValueError: the numbers do not fit together.
        """
        sizes = [Size.square(side) for side in self.sizes_of_steps()]
        times = self.times or uniform_teacher_timesteps(self.steps)
        if self.thresholds:
            stages = tuple(Size.square(side) for side in self.sides)
            return Cascade.from_thresholds(name, RectifiedFlow(), stages, times, self.thresholds, **self.options)
        if self.teacher_side is None:
            return Cascade.from_steps(name, times, sizes, **self.options)
        if len(self.sides) > 1:
            raise ValueError(f"schedule {name!r}: teacher_side is for one side, and there are {len(self.sides)}")
        scale = self.teacher_side / self.sides[0]
        mapping = self.options.get("resolution_map", "shift")
        steps = tuple(Step(0, map_timestep(t, scale, mapping), t, sizes[0]) for t in times)
        return Cascade(name, f"0+{self.steps}", steps, sizes[0], **self.options)

    def sizes_of_steps(self) -> tuple[int, ...]:
        """One side a step; of a schedule with thresholds they come out of those."""
        return self.sides * self.steps if len(self.sides) == 1 else self.sides


class Row(_Data):
    """One line of a table.

    Attributes:
        weights: "teacher": nothing is trained, its own weights run the schedule; "start": those of the common start do.
        schedule: a key of :attr:`Grid.schedules`.
        config: a recipe's file in ``training/configs``, beneath :attr:`Grid.base`; its schedule is left to the row.
        settings: what it changes in :attr:`Grid.base`, the method included.
        start: what it changes in :attr:`Grid.start`; None: no common start, all updates from the teacher's weights.
        sample: fields of the cascade replaced at inference.
        intensities: further values of Eq. 10's `a` at inference to measure the finished student with.
        once: with the first training seed alone.
    """

    key: str
    title: str
    weights: Literal["student", "teacher", "start"] = "student"
    schedule: str = "2+2"
    config: str | None = None
    settings: dict[str, Any] = {}
    start: dict[str, Any] | None = {}
    sample: dict[str, Any] = {}
    intensities: tuple[float, ...] = ()
    once: bool = False


def _recipe(name: str) -> dict[str, Any]:
    """The settings of a recipe's file but for its schedule.

    Raises:
        ValueError: there is no such file.
    """
    path = CONFIGS / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"there is no training/configs/{name}.yaml")
    settings: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    schedule = ("schedule", "timesteps", "preset", "resolution_map")
    return {key: value for key, value in settings.items() if key not in schedule}


class Table(_Data):
    """A table of the report: its rows in order, each set against one of them."""

    title: str
    against: str
    rows: tuple[str, ...]
    paper: str = Field("", description="what the paper prints, in words")


class Expectation(_Data):
    """Written down before anything was run.

    Attributes:
        rows: the row expected to be better first; in either order where nothing is expected to show.
        claim: "better" or "alike".
    """

    rows: tuple[str, str]
    claim: Literal["better", "alike"] = "better"
    why: str


class Evaluation(_Data):
    """How a student is measured."""

    sets: tuple[Split, ...] = ("unseen_pair", "unseen_concept")
    limit: int = Field(256, ge=4)
    seeds: tuple[int, ...] = (0, 1)
    batch: int = Field(64, ge=1)
    features: Literal["float32", "bfloat16"] = "bfloat16"
    strip: int = Field(8, ge=0, description="prompts whose pictures are kept for the sheet")


@dataclass(frozen=True)
class Job:
    """One row with one training seed."""

    row: Row
    seed: int

    @property
    def name(self) -> str:
        """Of its folder and of its result."""
        return f"{self.row.key}-s{self.seed}"


class Grid(_Data):
    """The whole grid.

    Attributes:
        teacher: fields of the teacher's training (:func:`training.lab.teacher.train_lab_teacher`).
        teacher_steps: of the teacher's samples, for the methods that need some.
        updates: generator updates of the column "equal updates".
        reference: the row that the column "equal compute" is cut at, and whose training seeds are run first.
        seeds: training seeds; the teacher's rows, and those that say so, have the first alone.
        base: settings of every distillation.
        start: settings of the common start, over ``base``.
    """

    teacher: dict[str, Any] = {}
    teacher_steps: int = Field(20, ge=1)
    updates: int = Field(ge=1)
    reference: str
    seeds: tuple[int, ...] = (0, 1, 2)
    evaluation: Evaluation = Evaluation()
    base: dict[str, Any] = {}
    start: dict[str, Any] = {}
    schedules: dict[str, Schedule]
    rows: tuple[Row, ...]
    tables: tuple[Table, ...] = ()
    expectations: tuple[Expectation, ...] = ()

    @model_validator(mode="after")
    def _names_exist(self) -> Grid:
        keys = [row.key for row in self.rows]
        if len(set(keys)) < len(keys):
            raise ValueError("two rows have the same key")
        named = {self.reference, *(key for pair in self.expectations for key in pair.rows)}
        named |= {key for table in self.tables for key in (table.against, *table.rows)}
        if unknown := sorted(named - set(keys)):
            raise ValueError(f"there is no row {unknown[0]!r}")
        for row in self.rows:
            if row.schedule not in self.schedules:
                raise ValueError(f"row {row.key!r}: there is no schedule {row.schedule!r}")
        return self

    @classmethod
    def read(cls, path: Path = DEFAULT_GRID) -> Grid:
        """A grid from its file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is no grid; the message names the field.
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; --grid takes a YAML file such as {DEFAULT_GRID.name}")
        try:
            return cls(**(yaml.safe_load(path.read_text(encoding="utf-8")) or {}))
        except (yaml.YAMLError, TypeError) as error:
            raise ValueError(f"{path} is no grid: {error}") from None
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{path}, {'.'.join(map(str, first['loc'])) or 'grid'}: {first['msg']}") from None

    def row(self, key: str) -> Row:
        """The row of that key."""
        return next(row for row in self.rows if row.key == key)

    def cascade(self, row: Row) -> Cascade:
        """The row's cascade as it is trained; its name is the schedule's."""
        return self.schedules[row.schedule].cascade(row.schedule)

    def settings(self, row: Row, seed: int) -> DistillSettings:
        """The settings of a row's distillation.

        Raises:
            ValueError: this version does not know one of them.
        """
        recipe = {} if row.config is None else _recipe(row.config)
        return DistillSettings.read(None, {**recipe, **self.base, **row.settings, **self._fixed(row, seed)})

    def start_settings(self, row: Row, seed: int) -> DistillSettings:
        """The settings of the common start that a row goes on from.

        Raises:
            ValueError: the row has none, or this version does not know one of them.
        """
        if row.start is None:
            raise ValueError(f"row {row.key!r} has no common start")
        return DistillSettings.read(None, {**self.base, **self.start, **row.start, **self._fixed(row, seed)})

    def _fixed(self, row: Row, seed: int) -> Mapping[str, Any]:
        return {"schedule": row.schedule, "seed": seed, "sheet_every": 0}

    def unavailable(self, row: Row) -> str:
        """Why a row cannot run with this version; empty where it can."""
        if row.weights == "teacher":
            return ""
        try:
            self.settings(row, 0)
            if row.start is not None:
                self.start_settings(row, 0)
        except ValueError as error:
            return str(error)
        return ""

    def jobs(self) -> list[Job]:
        """What can run, in order: the reference with every seed, then all rows with the first seed, the second, ..."""
        able = [row for row in self.rows if not self.unavailable(row)]
        ordered = [Job(row, seed) for row in able if row.key == self.reference for seed in self.seeds]
        for seed in self.seeds:
            for row in able:
                once = row.once or row.weights == "teacher"
                if row.key != self.reference and not (once and seed != self.seeds[0]):
                    ordered.append(Job(row, seed))
        return ordered
