"""Stages that engines may share out: low sizes, the final size, decoding. An engine has all of them, or some.

Text is no stage: whoever denoises encodes it, since it is cheap and its result is larger than a picture's latents.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from typing import Literal, get_args

from rmd.cascade import Cascade
from server.core.card import ModelCard
from server.core.stations import StationKey

Stage = Literal["low", "high", "decode"]
Stages = frozenset[Stage]

ALL: Stages = frozenset(get_args(Stage))
SETS: tuple[Stages, ...] = tuple(frozenset(some) for n in (1, 2, 3) for some in combinations(get_args(Stage), n))
"""Every set of stages there is."""


def parse_stages(text: str) -> Stages:
    """Read one engine's stages, such as "high+decode"; "all" means every one.

    Raises:
        ValueError: a word is none of them.
    """
    words = [word.strip() for word in text.split("+")]
    unknown = sorted(set(words) - {"all", *ALL})
    if unknown:
        raise ValueError(f"'{unknown[0]}' is no stage; they are all, {', '.join(get_args(Stage))}, joined by +")
    return ALL if "all" in words else frozenset(stage for stage in ALL if stage in words)


def name_of(stages: Iterable[Stage]) -> str:
    """Return what :func:`parse_stages` reads."""
    some = set(stages)
    return "all" if some == ALL else "+".join(stage for stage in get_args(Stage) if stage in some)


def check_covered(engines: Iterable[Stages]) -> None:
    """Raise where no engine has a stage.

    Raises:
        ValueError: see above; the message names it.
    """
    lacking = ALL.difference(*engines)
    if lacking:
        raise ValueError(f"no engine has {name_of(lacking)}: together they must have low, high and decode")


def stage_at(cascade: Cascade, step: int) -> Stage:
    """Return the stage of a picture before this step; behind the last one it is to be decoded."""
    if step >= cascade.num_steps:
        return "decode"
    return "high" if cascade.steps[step].size == cascade.full_size else "low"


def station_at(cascade: Cascade, lane: str, model: str, step: int) -> StationKey:
    """Return where a picture whose text is known stands before this step."""
    if step >= cascade.num_steps:
        return StationKey("decode", size=cascade.full_size, model=model)
    return StationKey("denoise", lane, cascade.steps[step].size, model)


def costs_in(costs: tuple[float, ...], cascade: Cascade, stages: Stages) -> tuple[float, ...]:
    """Return the part of these stages in what is left from each step on, see :func:`server.core.card.step_costs`.

    A partial picture's decoding counts with the step that it shows.
    """
    if stages == ALL:
        return costs
    left, parts = 0.0, list[float]()
    for step in reversed(range(len(costs))):
        own = costs[step] - (costs[step + 1] if step + 1 < len(costs) else 0.0)
        left += own if stage_at(cascade, step) in stages else 0.0
        parts.append(left)
    return tuple(reversed(parts))


def stations_in(card: ModelCard, stages: Stages) -> tuple[StationKey, ...]:
    """Return a model's stations on an engine with these stages, those of partial pictures last."""
    met = {
        (schedule.lane, step.size, stage_at(schedule.cascade, index))
        for schedule in card.schedules.values()
        for index, step in enumerate(schedule.cascade.steps)
    }
    return tuple(
        key
        for key in (*card.stations(), *card.preview_stations())
        if (key.kind == "encode" and stages & {"low", "high"})
        or (key.kind == "decode" and "decode" in stages)
        or (key.kind == "denoise" and any((key.lane, key.size, stage) in met for stage in stages - {"decode"}))
    )
