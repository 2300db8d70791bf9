"""Machines as the simulator knows them: what a batch costs at each station, from files under ``benchmarks/``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rmd.cascade import Cascade
from rmd.size import Size
from server.core.card import TEACHER_SCHEDULE, ModelCard, Schedule
from server.core.stations import STUDENT, TEACHER, StationKey

Costs = Mapping[StationKey, Mapping[int, float]]
"""Seconds of a batch, by station and width."""

MACHINES = ("h200", "amx", "avx2")
"""SDXL on an H200 in CUDA graphs; the embedded model's engines on two cores with AMX, and on two with AVX2 alone."""

_BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
_SPLITS = {"2+2": 2, "1+3": 1, "0+4": 0}  # steps at half the side, of four


@dataclass(frozen=True)
class Machine:
    """A model on a machine."""

    name: str
    about: str
    card: ModelCard
    costs: Costs


def machine(name: str, benchmarks: Path = _BENCHMARKS) -> Machine:
    """Return one of :data:`MACHINES`.

    Raises:
        ValueError: there is no such machine.
        OSError: its file is missing.
    """
    if name == "h200":
        return _h200(benchmarks / "gpu/speedup-sdxl-cuda.json")
    if name == "amx":
        return _amx(benchmarks / "engines/engines-cpu.json")
    if name == "avx2":
        return _avx2()
    raise ValueError(f"machine '{name[:40]}' is none of {', '.join(MACHINES)}")


def make_card(full: Size, teacher_steps: int, guidance: float, model: str) -> ModelCard:
    """Return the card of a model with the three schedules of the mixes and its teacher."""
    half = Size(full.width // 2, full.height // 2)
    schedules = {
        name: Schedule(name, _cascade(name, [half] * low + [full] * (4 - low), 1.0), STUDENT)
        for name, low in _SPLITS.items()
    }
    teacher = _cascade(TEACHER_SCHEDULE, [full] * teacher_steps, guidance)
    schedules[TEACHER_SCHEDULE] = Schedule(TEACHER_SCHEDULE, teacher, TEACHER)
    return ModelCard(model, 0, "image", 1, schedules, "2+2", {})


def station_costs(
    full: Size,
    encode: Mapping[int, float],
    low: Mapping[int, float],
    high: Mapping[int, float],
    guided: Mapping[int, float],
    decode: Mapping[int, float],
    decode_low: Mapping[int, float],
) -> Costs:
    """Return a table, from seconds of each kind of batch by width."""
    half = Size(full.width // 2, full.height // 2)
    return {
        StationKey("encode"): dict(encode),
        StationKey("denoise", STUDENT, half): dict(low),
        StationKey("denoise", STUDENT, full): dict(high),
        StationKey("denoise", TEACHER, full): dict(guided),
        StationKey("decode", size=full): dict(decode),
        StationKey("decode", size=half): dict(decode_low),
    }


def filled(known: Mapping[int, float], widths: tuple[int, ...]) -> dict[int, float]:
    """Return the seconds at ``widths``: measured, or on the straight line between the measured ones beside them."""
    points = sorted(known.items())
    filled_in = dict[int, float]()
    for width in widths:
        below = max((p for p in points if p[0] <= width), default=points[0])
        above = min((p for p in points if p[0] >= width), default=points[-1])
        part = (width - below[0]) / (above[0] - below[0]) if above[0] != below[0] else 0.0
        filled_in[width] = below[1] + part * (above[1] - below[1])
    return filled_in


def _cascade(name: str, sizes: list[Size], guidance: float) -> Cascade:
    """A cascade whose sizes count and whose times do not."""
    times = [round(1000 * (1 - index / len(sizes))) for index in range(len(sizes))]
    return Cascade.from_steps(name, times, sizes, schedule_name=name, resolution_map="none", guidance_scale=guidance)


def _h200(path: Path) -> Machine:
    """Measured at 1, 4 and 16 pictures. Decoding at half the side, which was not measured, is taken as a quarter."""
    known: dict[str, dict[int, float]] = {}
    for row in json.loads(path.read_text())["timings"]:
        if row["variant"] == "eager+graphs":
            known.setdefault(row["what"], {})[row["batch"]] = row["median_s"]
    widths = (1, 2, 4, 8, 16)
    decode = filled(known["decode"], widths)
    full = Size(1024, 1024)
    costs = station_costs(
        full,
        encode=filled(known["text"], widths),
        low=filled(known["step 512x512"], widths),
        high=filled(known["step 1024x1024"], widths),
        guided={2 * w: seconds for w, seconds in filled(known["step 1024x1024 guided"], (1, 2, 4, 8)).items()},
        decode=decode,
        decode_low={width: seconds / 4 for width, seconds in decode.items()},
    )
    about = "SDXL at 1024 px in CUDA graphs on an H200, measured at 1, 4 and 16, between them on a straight line"
    return Machine("h200", about, make_card(full, 40, 7.5, "sdxl"), costs)


def _amx(path: Path) -> Machine:
    known: dict[tuple[str, str], dict[int, float]] = {}
    for row in json.loads(path.read_text())["engines"]:
        if row["backend"] == "inductor":
            known.setdefault((row["component"], row["size"] or ""), {})[row["batch"]] = row["median_s"]
    full = Size(256, 256)
    costs = station_costs(
        full,
        encode=known["text_encoder", ""],
        low=known["denoiser", "128x128"],
        high=known["denoiser", "256x256"],
        guided=known["denoiser", "256x256"],
        decode=known["decoder", "256x256"],
        decode_low=known["decoder", "128x128"],
    )
    return Machine(
        "amx", "the embedded model's engines on two cores with AMX", make_card(full, 50, 3.0, "embedded"), costs
    )


def _avx2() -> Machine:
    """From a table of medians by hand; between its ends on a straight line."""
    full, widths = Size(256, 256), (1, 2, 4, 8)
    high = filled({1: 0.070, 8: 8 * 0.063}, widths)
    costs = station_costs(
        full,
        encode={4: 0.040},
        low=filled({1: 0.026, 8: 8 * 0.0225}, widths),
        high=high,
        guided=high,
        decode={1: 0.073, 4: 4 * 0.077},
        decode_low={1: 0.073 / 4, 4: 0.077},
    )
    about = "the embedded model's engines on two cores with AVX2 alone, measured at the narrowest and widest batch"
    return Machine("avx2", about, make_card(full, 50, 3.0, "embedded"), costs)
