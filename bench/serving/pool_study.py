"""Whole replicas or stages apart at equal numbers of devices: simulated up to some tens, by arithmetic beyond."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean, stdev
from typing import Any

from bench.serving.measures import SLOWEST, Alone, percentile, served_rate
from bench.serving.outcomes import whole_rate
from bench.serving.pools import LAYOUTS, Link, Stage, best_ratio, most, one_off, pool_seconds, simulate_cluster
from bench.serving.tables import Machine, machine
from bench.serving.traces import MIXES, make_trace

_CLIENTS = 24  # a device, on their way at once where saturation is simulated
_BURST = 0.3  # of a steady load's rate: in the two seconds of a burst five times as much arrives


@dataclass(frozen=True)
class PoolSettings:
    """What is simulated.

    Attributes:
        mixes: of `bench.serving.traces.MIXES`; ``:bursts`` behind one for bursts.
        gpus: numbers of devices that are simulated.
        many: numbers of devices of which only the bounds are told.
        loads: shares of the whole replicas' bound; 0.3 of these in bursts.
        count: requests of a run; 20 a device where that is more, and 100 a device at saturation.
        saturated_to: the most devices whose saturation is simulated, and that every seed is run with.
        bytes_per_second, seconds: of the link between pools.
        workers: processes.
    """

    machines: tuple[str, ...] = ("h200", "amx")
    mixes: tuple[str, ...] = ("2+2", "mix", "mix:bursts")
    policy: str = "stagewise"
    gpus: tuple[int, ...] = (2, 4, 8, 32)
    many: tuple[int, ...] = (64, 256, 512)
    loads: tuple[float, ...] = (0.5, 0.7, 0.85, 0.95)
    seeds: tuple[int, ...] = (5, 6, 7)
    count: int = 240
    saturated_to: int = 8
    bytes_per_second: float = 25e9
    seconds: float = 0.2e-3
    workers: int = os.cpu_count() or 1


def run_pool_study(settings: PoolSettings, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Simulate everything; see :func:`bench.serving.pool_report.pool_markdown` for what comes of it.

    Raises:
        ValueError: there is no such machine or mix.
    """
    for mix in settings.mixes:
        if mix.removesuffix(":bursts") not in MIXES:
            raise ValueError(f"mix '{mix[:40]}' is none of {', '.join(MIXES)}, nor one of these with :bursts")
    links, memory = dict[str, Link](), dict[str, dict[Stage, int]]()
    for name in settings.machines:
        links[name], memory[name] = carried(machine(name), settings.bytes_per_second, settings.seconds)
    cells = [(name, mix, gpus) for name in settings.machines for mix in settings.mixes for gpus in settings.gpus]
    say(f"{len(cells)} clusters and mixes")
    with ProcessPoolExecutor(settings.workers) as pool:
        parts = list(pool.map(partial(_cell, settings, links), cells))
    return {
        "format": 1,
        "kind": "simulated",
        "settings": {name: value for name, value in asdict(settings).items() if name != "workers"},
        "slowest": SLOWEST,
        "about": {name: machine(name).about for name in settings.machines},
        "carried": {
            name: {"text": link.text, "latents": {str(size): count for size, count in link.latents.items()}}
            for name, link in links.items()
        },
        "weights": memory,
        "parts": parts,
        "bounds": _bounds(settings),
    }


def carried(known: Machine, bytes_per_second: float, seconds: float) -> tuple[Link, dict[Stage, int]]:
    """Return the link with what travels over it, and the bytes of weights that each stage needs.

    Both from the backbone's shapes on the meta device: latents in float32 at the side of the station that they go to,
    as engines keep them. The two denoising stages share one network's weights where they share a device.
    """
    import torch

    from engines.plan.memory import weight_bytes
    from rmd.backbones.configs import published_config
    from rmd.backbones.registry import get_backbone

    name = known.card.model_id
    backbone = get_backbone(name).from_config(published_config(name), torch.bfloat16, "meta")
    sizes = {step.size for schedule in known.card.schedules.values() for step in schedule.cascade.steps}
    float_bytes = torch.finfo(torch.float32).bits // 8
    latents = {size: float_bytes * torch.Size(backbone.latent_shape(size)).numel() for size in sizes}
    text = sum(tensor.nbytes for tensor in backbone.random_conditioning(1).values())
    weights: dict[Stage, int] = dict.fromkeys(("text", "low", "high", "decode"), 0)
    for component, module in backbone.component_modules().items():
        stages: tuple[Stage, ...] = ("low", "high") if component == "denoiser" else ("decode",)
        for stage in ("text",) if component.startswith("text_encoder") else stages:
            weights[stage] += weight_bytes(module)
    return Link(bytes_per_second, seconds, latents, text), weights


def _cell(settings: PoolSettings, links: Mapping[str, Link], cell: tuple[str, str, int]) -> dict[str, Any]:
    """Every layout of one machine, mix and number of devices."""
    name, wanted, gpus = cell
    mix, _, arrivals = wanted.partition(":")
    known, link = machine(name), links[name]
    whole = most(pool_seconds(known, mix, LAYOUTS["whole"]), [gpus])
    small = gpus <= settings.saturated_to
    seeds = settings.seeds if small else settings.seeds[:1]
    count = max(settings.count, 20 * gpus)
    alone = Alone(known)
    rows: dict[str, Any] = {}
    for title, layout in LAYOUTS.items():
        if len(layout) > gpus:
            continue
        ratio = best_ratio(pool_seconds(known, mix, layout), gpus)
        play = partial(simulate_cluster, known, settings.policy, layout=layout, devices=ratio, link=link)
        row: dict[str, Any] = {"devices": ratio, "bound": most(pool_seconds(known, mix, layout), ratio)}
        if small and not arrivals:
            full = max(settings.count, 100 * gpus)
            traces = [make_trace(mix, 1.0, full, seed) for seed in seeds]
            fill = partial(play, clients=_CLIENTS * gpus)
            row["saturated"] = [whole_rate(fill(trace=each).outcomes) for each in traces]
            row["one_off"] = [
                [other, whole_rate(fill(trace=traces[0], devices=other).outcomes)] for other in one_off(ratio)
            ]
        row["loads"], points = {}, [list[tuple[float, float]]() for _ in seeds]
        for load in settings.loads:
            rate = load * whole * (_BURST if arrivals else 1.0)
            runs = [play(trace=make_trace(mix, rate, count, seed, arrivals or "poisson")) for seed in seeds]
            for own, run in zip(points, runs, strict=True):
                own.append((rate, percentile(alone.slowdowns(run.outcomes), 0.99)))
            row["loads"][f"{load:g}"] = _latencies([[each.latency for each in run.outcomes] for run in runs])
        row["served_well"] = [served_rate(own) for own in points]
        row["slowdowns"] = points
        rows[title] = row
    return {"machine": name, "mix": wanted, "gpus": gpus, "requests": count, "seeds": len(seeds), "layouts": rows}


def _latencies(by_seed: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """Mean over seeds and standard deviation of each percentile, seconds."""
    found = {}
    for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
        values = [percentile(latencies, share) for latencies in by_seed]
        found[name] = [fmean(values), stdev(values) if len(values) > 1 else 0.0]
    return found


def _bounds(settings: PoolSettings) -> list[dict[str, Any]]:
    """What pools can make at most over whole replicas, by arithmetic: best ratio, one device off, of another mix."""
    mixes = tuple(dict.fromkeys(mix.partition(":")[0] for mix in settings.mixes))
    found = []
    for name in settings.machines:
        known = machine(name)
        for mix in mixes:
            for gpus in (*settings.gpus, *settings.many):
                whole = most(pool_seconds(known, mix, LAYOUTS["whole"]), [gpus])
                for title, layout in LAYOUTS.items():
                    if not 1 < len(layout) <= gpus:
                        continue
                    seconds = pool_seconds(known, mix, layout)
                    best = best_ratio(seconds, gpus)
                    others = [best_ratio(pool_seconds(known, other, layout), gpus) for other in mixes if other != mix]
                    off = [most(seconds, each) / whole for each in one_off(best)]
                    found.append(
                        {"machine": name, "mix": mix, "gpus": gpus, "layout": title, "devices": best}
                        | {"best": most(seconds, best) / whole, "one_off": [min(off), max(off)] if off else None}
                        | {"other_mix": [most(seconds, each) / whole for each in others]}
                    )
    return found
