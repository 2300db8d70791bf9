"""Reads and checks JSON files and the fields of a cascade, with errors that name the file or the field."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmd.size import Size
from rmd.timesteps import RESOLUTION_MAPS

if TYPE_CHECKING:
    from rmd.cascade import Cascade

NOISE_UPSAMPLINGS = ("bilinear", "renormalised", "nearest_block")
X0_UPSAMPLINGS = ("bilinear", "bicubic")

LARGEST_SEED = 2**63 - 1
"""Of a picture; those counted up from it go on at 0."""
LARGEST_FACTOR = 1000.0
"""Of guidance, shift and noise: far beyond what anybody samples with, far below what overflows in a network."""
_FACTOR = f"must be above 0, and at most {LARGEST_FACTOR:g}"
SHIFT_RULE = f"must be above 0, between {1 / LARGEST_FACTOR:g} and {LARGEST_FACTOR:g}"
GUIDANCE_RULE = f"must not be negative, nor above {LARGEST_FACTOR:g}"

_REQUIRED = ("name", "schedule_name", "steps", "full_size")


def field_of(data: Mapping[str, Any], key: str, read: Callable[[Any], Any], where: str = "") -> Any:
    """Read one field.

    Raises:
        ValueError: it is missing or `read` refuses it.
    """
    name = f"{where}{key}"
    if key not in data:
        raise ValueError(f"field '{name}' is missing")
    try:
        return read(data[key])
    except (TypeError, ValueError) as error:
        raise ValueError(f"field '{name}': {error}") from None
    except OverflowError:
        raise ValueError(f"field '{name}': the number is too large") from None


def integer(value: Any) -> int:
    """A whole number (booleans and text are not)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"must be a whole number, not {value!r}")
    return value


def number(value: Any) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) == float("inf"):
        raise ValueError(f"must be a number, not {value!r}")
    return float(value)


def text(value: Any) -> str:
    """A string that is not empty."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"must be text, not {value!r}")
    return value


def _any_text(value: Any) -> str:
    return "" if value == "" else text(value)


def mapping(value: Any) -> dict[str, Any]:
    """A JSON object."""
    if not isinstance(value, Mapping):
        raise ValueError(f"must be an object, not {value!r}")
    return dict(value)


def _numbers(value: Any) -> tuple[float, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        raise ValueError(f"must be a list of numbers or null, not {value!r}")
    return tuple(number(item) for item in value)


def _number_or_none(value: Any) -> float | None:
    return None if value is None else number(value)


def _number_or_numbers(value: Any) -> float | tuple[float, ...] | None:
    return _numbers(value) if isinstance(value, list | tuple) else number(value)


def _steps(value: Any, read_step: Callable[[Mapping[str, Any], str], Any]) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise ValueError("field 'steps': must be a list of at least one step")
    for index, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise ValueError(f"field 'steps[{index}]': must be an object, not {item!r}")
    return tuple(read_step(item, f"steps[{index}].") for index, item in enumerate(value))


_READERS: dict[str, Callable[[Any], Any]] = {
    "name": text,
    "schedule_name": text,
    "steps": lambda value: value,
    "full_size": Size.parse,
    "resolution_map": text,
    "noise_upsampling": text,
    "x0_upsampling": text,
    "step_noise_intensity": _number_or_numbers,
    "final_timestep": _number_or_none,
    "training_step_noise_intensity": _number_or_none,
    "thresholds": _numbers,
    "stage_boundaries": _numbers,
    "note": _any_text,
}


def read_cascade_fields(
    data: Mapping[str, Any], names: Sequence[str], read_step: Callable[[Mapping[str, Any], str], Any]
) -> dict[str, Any]:
    """The keyword arguments of `Cascade` from a JSON object; fields with defaults may be left out.

    Raises:
        ValueError: a field is missing, unknown or has a wrong value.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"a cascade must be an object, not {data!r}")
    for key in data:
        if key not in names:
            raise ValueError(f"field '{key}' is unknown; the fields are {', '.join(names)}")
    present = [name for name in names if name in data or name in _REQUIRED]
    values = {name: field_of(data, name, _READERS.get(name, number)) for name in present}
    values["steps"] = _steps(values["steps"], read_step)
    return values


def check_cascade(cascade: Cascade) -> None:
    """Check that a cascade's fields are possible and fit together.

    Raises:
        ValueError: one is not; the message names the cascade and the field.
    """

    def require(condition: bool, field: str, rule: str) -> None:
        if not condition:
            raise ValueError(f"cascade {cascade.name!r}, field '{field}': {rule}")

    steps = cascade.steps
    require(len(steps) > 0, "steps", "must hold at least one step")
    for index, step in enumerate(steps):
        at = f"steps[{index}]"
        require(0 <= step.timestep <= 1000, f"{at}.timestep", f"must be from 0 to 1000, not {step.timestep}")
        require(
            0 < step.teacher_timestep <= 1000,
            f"{at}.teacher_timestep",
            f"must be from 1 to 1000, not {step.teacher_timestep}",
        )
        if index == 0:
            require(step.stage == 0, f"{at}.stage", "the first step's stage must be 0")
            continue
        before = steps[index - 1]
        require(
            step.teacher_timestep < before.teacher_timestep,
            f"{at}.teacher_timestep",
            f"must be below the step before it ({before.teacher_timestep}), not {step.teacher_timestep}",
        )
        expected = before.stage + (step.size != before.size)
        require(step.stage == expected, f"{at}.stage", f"must be {expected}: a stage is a run of steps at one size")
        require(
            step.stage != before.stage or step.timestep < before.timestep,
            f"{at}.timestep",
            f"must be below the step before it ({before.timestep}) in the same stage",
        )
    require(steps[-1].size == cascade.full_size, "full_size", f"must be the last step's size, {steps[-1].size}")
    require(cascade.resolution_map in RESOLUTION_MAPS, "resolution_map", f"must be one of {RESOLUTION_MAPS}")
    require(cascade.noise_upsampling in NOISE_UPSAMPLINGS, "noise_upsampling", f"must be one of {NOISE_UPSAMPLINGS}")
    require(cascade.x0_upsampling in X0_UPSAMPLINGS, "x0_upsampling", f"must be one of {X0_UPSAMPLINGS}")
    require(0 < cascade.initial_noise_scale <= LARGEST_FACTOR, "initial_noise_scale", _FACTOR)
    final = cascade.final_timestep
    require(
        final is None or 0 <= final < steps[-1].timestep,
        "final_timestep",
        f"must be null, or from 0 to below the last step's timestep, {steps[-1].timestep}",
    )
    require(1 / LARGEST_FACTOR <= cascade.flow_shift <= LARGEST_FACTOR, "flow_shift", SHIFT_RULE)
    require(0 <= cascade.guidance_scale <= LARGEST_FACTOR, "guidance_scale", GUIDANCE_RULE)
    for name in (
        "transition_noise_intensity",
        "score_noise_intensity",
        "training_noise_intensity",
    ):
        require(0 <= getattr(cascade, name) <= 1, name, "must be from 0 to 1")
    intensities = cascade.step_noise_intensity
    if isinstance(intensities, tuple):
        require(
            len(intensities) == len(steps) - 1,
            "step_noise_intensity",
            f"must be one number, or one a transition: {len(steps) - 1} of them, not {len(intensities)}",
        )
    each = intensities if isinstance(intensities, tuple) else (intensities,)
    require(all(0 <= a <= 1 for a in each), "step_noise_intensity", "must be from 0 to 1")
    in_training = cascade.training_step_noise_intensity
    require(in_training is None or 0 <= in_training <= 1, "training_step_noise_intensity", "must be from 0 to 1")
    num_stages = steps[-1].stage + 1
    if cascade.thresholds is not None:
        require(len(cascade.thresholds) == num_stages - 1, "thresholds", f"must hold {num_stages - 1} values")
    if cascade.stage_boundaries is not None:
        edges = (1.0, *cascade.stage_boundaries, 0.0)
        require(len(edges) == num_stages + 1, "stage_boundaries", f"must hold {num_stages - 1} values")
        require(
            all(a > b for a, b in pairwise(edges)),
            "stage_boundaries",
            "must decrease strictly between 1 and 0",
        )


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: it is not UTF-8 JSON; the message names the file, line and column.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: line {error.lineno}, column {error.colno}: not valid JSON ({error.msg})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply to be read") from None
