"""The other backbones at full size: teacher and student by :mod:`bench.speedup`, whose own report lies beside."""

from __future__ import annotations

from collections.abc import Iterator

from bench.gpu.case import Context, Row
from bench.speedup.run import SpeedupSettings, run_speedup


def family(context: Context, name: str) -> Iterator[Row]:
    """Batch 1, eager and in graphs; films in steps alone, which take minutes a schedule."""
    film = name.startswith("wan")
    content = run_speedup(
        SpeedupSettings(
            backbone=name,
            device=str(context.device),
            scale=context.scale,
            batches=(1,),
            variants=("eager", "eager+graphs") if context.graphs and not film else ("eager",),
            repeats=3 if film else 5,
            whole_limit=1.0 if film else 4.0,
            minutes=1.0,
            stock=False,
            out=context.out / "families",
        )
    )
    for row in content["schedules"]:
        speed = content["end_to_end_speedup"]["1"][row["schedule"]][row["variant"]].get("over_eager_teacher")
        yield {
            "what": f"{row['schedule']} {row['variant']}",
            "ms": round(1e3 * row["end_to_end_s"], 1),
            "denoising ms": round(1e3 * row["denoise_s"], 1),
            "over the eager teacher": None if speed is None else round(speed, 2),
        }
    for failure in content["failures"]:
        yield {"what": failure["what"], "failed": failure["reason"]}
