"""`rmd bench`: speed-ups of cascades over their teacher, of engines over eager, and serving policies side by side."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.numbers import buckets_option, use_threads, whole_numbers
from cli.options import DecoderOption

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.callback()
def _root() -> None:
    """Measure speed-ups, engines and serving policies, side by side in one run."""


@app.command()
def speedup(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    backbone: Annotated[
        str | None, typer.Option(help="Random weights of sdxl, pixart, sd3, wan-1.3b, wan-14b or embedded.")
    ] = None,
    checkpoint: Annotated[Path, typer.Option(help="Measured unless --backbone or --random-weights is given.")] = Path(
        "models/embedded"
    ),
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="The embedded model's networks without its weights.")
    ] = False,
    engines: Annotated[
        Path | None, typer.Option(help="Built engines of the checkpoint, measured as well; engines-cache if complete.")
    ] = None,
    backend: Annotated[str, typer.Option(help="Of those engines.")] = "auto",
    buckets: Annotated[str | None, typer.Option(help="Of those engines, as they were built.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the networks; auto: the device's own.")] = "auto",
    scale: Annotated[str, typer.Option(help="full, or tiny: a rehearsal of the same path.")] = "full",
    batches: Annotated[str, typer.Option(help="Pictures at a time, comma-separated.")] = "1,8",
    variants: Annotated[
        str | None, typer.Option(help="eager, compiled, inductor, tensorrt, each also +graphs; comma-separated.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds at most.")] = 7,
    whole_limit: Annotated[float, typer.Option(help="Schedules of fewer seconds are run whole.")] = 20.0,
    minutes: Annotated[float, typer.Option(help="Begin nothing new after this long.")] = 30.0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    decoder: DecoderOption = None,
    stock: Annotated[bool, typer.Option(help="Also the teacher in a plain diffusers loop.")] = True,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("benchmarks/speedup"),
) -> None:
    """Teacher against cascades: steps, schedules, text and decoding, by batch, eager and compiled."""
    from rich.console import Console

    from bench.report import speedup_markdown
    from bench.speedup.run import SpeedupSettings, run_speedup

    console = Console()
    use_threads(threads)
    measured = None if backbone or random_weights else checkpoint
    if engines is None and measured is not None:
        engines = _engines_at_hand(measured, backend, device, dtype, buckets_option(buckets), decoder)
    settings = SpeedupSettings(
        backbone=backbone or "embedded",
        checkpoint=measured,
        engines=engines,
        backend=backend,
        buckets=buckets_option(buckets),
        device=device,
        dtype=dtype,
        scale=scale,
        batches=whole_numbers("--batches", batches),
        variants=tuple(variants.split(",")) if variants else None,
        repeats=repeats,
        whole_limit=whole_limit,
        minutes=minutes,
        threads=threads,
        decoder=decoder,
        stock=stock,
        out=out,
    )
    with console.status("measuring") as status:
        content = run_speedup(settings, lambda what: status.update(what))
    console.print(speedup_markdown(content), markup=False, soft_wrap=True)


@app.command("engines")
def engines_command(
    checkpoint: Annotated[Path, typer.Option(help="Folder.")] = Path("models/embedded"),
    engines: Annotated[Path, typer.Option(help="Folder of its built engines.")] = Path("engines-cache"),
    backends: Annotated[str, typer.Option(help="Opened side by side, comma-separated.")] = "auto",
    buckets: Annotated[str | None, typer.Option(help="As the engines were built.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="As the engines were built; auto: the device's own.")] = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds at most.")] = 15,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads, as the engines were built.")] = None,
    batches: Annotated[str, typer.Option(help="Of the whole schedules.")] = "1,8",
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("benchmarks/engines"),
) -> None:
    """Every engine beside eager and the diffusers loop: latency, throughput, memory."""
    from rich.console import Console

    from bench.engines.batching import EngineBenchSettings, run_engines
    from bench.report import engines_markdown

    console = Console()
    use_threads(threads)
    settings = EngineBenchSettings(
        checkpoint=checkpoint,
        engines=engines,
        backends=tuple(part.strip() for part in backends.split(",")),
        buckets=buckets_option(buckets),
        device=device,
        dtype=dtype,
        repeats=repeats,
        loop_batches=whole_numbers("--batches", batches),
        out=out,
    )
    with console.status("measuring") as status:
        content = run_engines(settings, lambda what: status.update(what))
    console.print(engines_markdown(content), markup=False, soft_wrap=True)


@app.command()
def serve(
    checkpoint: Annotated[Path, typer.Option(help="Folder.")] = Path("models/embedded"),
    engines: Annotated[Path, typer.Option(help="Folder of its built engines.")] = Path("engines-cache"),
    backend: Annotated[str, typer.Option(help="Of those engines; eager for none.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda:0.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads, as the engines were built.")] = None,
    policy: Annotated[str, typer.Option(help="The rule that is compared with the others.")] = "stagewise",
    baselines: Annotated[str, typer.Option(help="The others, comma-separated.")] = (
        "fifo,dynamic:4:0,dynamic:8:0,dynamic:8:0.02,continuous:4,continuous:8"
    ),
    mixes: Annotated[str, typer.Option(help="2+2, mix, teachers, four, streamed; comma-separated.")] = "2+2,mix",
    loads: Annotated[str, typer.Option(help="Shares of the best baseline's saturation.")] = "0.5,0.7,0.9",
    arrivals: Annotated[str, typer.Option(help="poisson, gamma, bursts or ramp.")] = "poisson",
    seeds: Annotated[str, typer.Option(help="A trace each.")] = "0,1,2",
    requests: Annotated[int, typer.Option(min=20, help="Of each trace.")] = 300,
    saturated: Annotated[int, typer.Option(min=20, help="Requests of each closed run.")] = 256,
    against: Annotated[str | None, typer.Option(help="litserve: whole servers instead of policies.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Of those.")] = 6,
    sizes: Annotated[str, typer.Option(help="Of the other server's batches, comma-separated.")] = "8,4",
    workers: Annotated[int, typer.Option(min=1, help="The other server's, each with its part of the threads.")] = 1,
    packages: Annotated[Path | None, typer.Option(help="Folder that litserve is installed in.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("benchmarks/serving"),
) -> None:
    """Serving policies side by side over the same engines, in one engine process; or this server beside another."""
    from rich.console import Console

    from bench.serving.live import LiveSettings, run_live
    from bench.serving.report import live_markdown, write_report
    from server.front.engine import EngineProcess
    from server.start.settings import ServerSettings

    console = Console()
    if against is not None:
        if against != "litserve":
            raise ValueError(f"--against {against!r}: only litserve is known")
        from bench.serving.report import rivals_markdown
        from bench.serving.rivals import RivalSettings, run_rivals

        beside = RivalSettings(
            checkpoint=checkpoint,
            engines=engines,
            backend=backend,
            threads=threads,
            mix=mixes.split(",")[0],
            sizes=whole_numbers("--sizes", sizes),
            workers=workers,
            rounds=rounds,
            count=requests,
            saturated=saturated,
            packages=packages,
        )

        def keep(content: dict[str, Any]) -> None:
            write_report(content, rivals_markdown(content), out, "rivals")

        with console.status("starting") as status:
            content = run_rivals(beside, lambda what: status.update(what), keep)
        console.print(rivals_markdown(content), markup=False, soft_wrap=True)
        return
    settings = LiveSettings(
        policy=policy,
        baselines=tuple(baselines.split(",")),
        mixes=tuple(mixes.split(",")),
        loads=tuple(float(load) for load in loads.split(",")),
        arrivals=arrivals,
        seeds=whole_numbers("--seeds", seeds, least=0),
        count=requests,
        saturated=saturated,
    )
    server = ServerSettings(
        checkpoint=checkpoint,
        engines=engines,
        backend=backend,
        threads=threads,
        measure_teacher=False,
        serve_teacher="teachers" in settings.mixes,
        prompt_megabytes=0.0,  # every policy meets the same prompts: the first is not to encode them for the others
        policy=policy,
        log_level="warning",
    )
    with console.status("starting the engine") as status:
        engine = EngineProcess.start(server, device)
        try:
            content = run_live(settings, engine, lambda what: status.update(what))
        finally:
            engine.stop()
            engine.close()
    write_report(content, live_markdown(content), out, "live")
    console.print(live_markdown(content), markup=False, soft_wrap=True)


@app.command()
def simulate(
    machines: Annotated[str, typer.Option(help="h200, amx, avx2; comma-separated.")] = "h200,amx,avx2",
    mixes: Annotated[str, typer.Option(help="2+2, mix, teachers, four, streamed; comma-separated.")] = "2+2,mix",
    policy: Annotated[str, typer.Option(help="The rule that is compared with all the others.")] = "stagewise",
    loads: Annotated[str, typer.Option(help="Shares of the best baseline's saturation.")] = "0.3,0.5,0.7,0.85,0.95",
    arrivals: Annotated[str, typer.Option(help="poisson, gamma, bursts or ramp.")] = "poisson",
    seeds: Annotated[str, typer.Option(help="A trace each.")] = "5,6,7,8,9",
    requests: Annotated[int, typer.Option(min=20, help="Of each trace.")] = 2000,
    devices: Annotated[int, typer.Option(min=1, help="Engines behind one front.")] = 1,
    tracks: Annotated[int, typer.Option(min=1, help="Batches at a time on an engine while many wait.")] = 1,
    noise: Annotated[float, typer.Option(help="Standard deviation of the logarithm of a batch's seconds.")] = 0.0,
    batch_ms: Annotated[float, typer.Option(help="The device's idle time between two batches.")] = 0.0,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; all cores if not given.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("benchmarks/serving"),
) -> None:
    """Serving policies on a virtual clock, with a machine's table of costs."""
    from rich.console import Console

    from bench.serving.report import study_markdown, write_study
    from bench.serving.simulate import World
    from bench.serving.study import StudySettings, run_study

    console = Console()
    settings = StudySettings(
        machines=tuple(machines.split(",")),
        mixes=tuple(mixes.split(",")),
        policy=policy,
        loads=tuple(float(load) for load in loads.split(",")),
        arrivals=arrivals,
        seeds=whole_numbers("--seeds", seeds, least=0),
        count=requests,
        world=World(devices=devices, tracks=tracks, noise=noise, batch_seconds=batch_ms / 1e3),
        workers=workers or os.cpu_count() or 1,
    )
    with console.status("simulating") as status:
        content = run_study(settings, lambda what: status.update(what))
    write_study(content, out)
    console.print(study_markdown(content), markup=False, soft_wrap=True)


@app.command()
def pools(
    machines: Annotated[str, typer.Option(help="h200, amx, avx2; comma-separated.")] = "h200,amx",
    mixes: Annotated[
        str, typer.Option(help="As of simulate; with :bursts behind one, in bursts; comma-separated.")
    ] = "2+2,mix,mix:bursts",
    policy: Annotated[str, typer.Option(help="Of every device.")] = "stagewise",
    gpus: Annotated[str, typer.Option(help="Devices, simulated; comma-separated.")] = "2,4,8,32",
    many: Annotated[str, typer.Option(help="Devices, by arithmetic alone; comma-separated.")] = "64,256,512",
    loads: Annotated[str, typer.Option(help="Shares of what whole replicas can make.")] = "0.5,0.7,0.85,0.95",
    seeds: Annotated[str, typer.Option(help="A trace each.")] = "5,6,7",
    requests: Annotated[
        int | None, typer.Option(min=20, help="Of each run: 240, or 20 a device where that is more; live 96.")
    ] = None,
    link_gbytes: Annotated[float, typer.Option(min=0.001, help="GB/s between pools (between hosts about 3).")] = 25.0,
    link_ms: Annotated[float, typer.Option(min=0.0, help="Of each message besides (between hosts about 1).")] = 0.2,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; all cores if not given.")] = None,
    live: Annotated[bool, typer.Option("--live", help="Real servers with two engines instead, on this CPU.")] = False,
    checkpoint: Annotated[Path, typer.Option(help="Live: folder.")] = Path("models/embedded"),
    engines: Annotated[Path, typer.Option(help="Live: its engines, built with --threads 1.")] = Path("engines-cache"),
    rounds: Annotated[int, typer.Option(min=1, help="Live.")] = 5,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("benchmarks/serving/pools"),
) -> None:
    """Whole replicas or stages apart, at equal numbers of devices, on a virtual clock."""
    from rich.console import Console

    from bench.serving.pool_live import PoolLiveSettings, pools_live_markdown, run_pools_live
    from bench.serving.pool_report import pool_markdown
    from bench.serving.pool_study import PoolSettings, run_pool_study
    from bench.serving.report import write_report

    console = Console()
    if live:
        with console.status("starting") as status:
            told = PoolLiveSettings(checkpoint, engines, rounds=rounds, saturated=requests or 96)
            content = run_pools_live(told, lambda what: status.update(what))
        write_report(content, pools_live_markdown(content), out, "live")
        console.print(pools_live_markdown(content), markup=False, soft_wrap=True)
        return
    settings = PoolSettings(
        machines=tuple(machines.split(",")),
        mixes=tuple(mixes.split(",")),
        policy=policy,
        gpus=whole_numbers("--gpus", gpus),
        many=whole_numbers("--many", many),
        loads=tuple(float(load) for load in loads.split(",")),
        seeds=whole_numbers("--seeds", seeds, least=0),
        count=requests or 240,
        bytes_per_second=link_gbytes * 1e9,
        seconds=link_ms / 1e3,
        workers=workers or os.cpu_count() or 1,
    )
    with console.status("simulating") as status:
        content = run_pool_study(settings, lambda what: status.update(what))
    write_report(content, pool_markdown(content), out, "pools")
    console.print(pool_markdown(content), markup=False, soft_wrap=True)


@app.command()
def crowd(
    checkpoint: Annotated[Path, typer.Option(help="Folder.")] = Path("models/embedded"),
    engines: Annotated[Path, typer.Option(help="Folder of its built engines.")] = Path("engines-cache"),
    times: Annotated[float, typer.Option(min=1.0, help="Requests, over what the server can make.")] = 10.0,
    seconds: Annotated[float, typer.Option(min=1.0, help="Of the crowd.")] = 90.0,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("benchmarks/serving"),
) -> None:
    """Many times the server's capacity: what is still made, how soon the others are refused, and what comes after."""
    from rich.console import Console

    from bench.serving.crowd import CrowdSettings, crowd_markdown, run_crowd
    from bench.serving.report import write_report

    console = Console()
    with console.status("starting") as status:
        content = run_crowd(CrowdSettings(checkpoint, engines, times=times, seconds=seconds), status.update)
    write_report(content, crowd_markdown(content), out, "crowd")
    console.print(crowd_markdown(content), markup=False, soft_wrap=True)


@app.command()
def neighbour(
    checkpoint: Annotated[Path, typer.Option(help="Folder.")] = Path("models/embedded"),
    engines: Annotated[Path, typer.Option(help="Folder of its built engines.")] = Path("engines-cache"),
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("benchmarks/serving"),
) -> None:
    """A picture's seconds beside other work on the same cores, by how OpenMP's threads wait for each other."""
    from rich.console import Console

    from bench.serving.neighbour import NeighbourSettings, neighbour_markdown, run_neighbour
    from bench.serving.report import write_report

    console = Console()
    with console.status("starting") as status:
        content = run_neighbour(NeighbourSettings(checkpoint, engines, rounds=rounds), status.update)
    write_report(content, neighbour_markdown(content), out, "neighbour")
    console.print(neighbour_markdown(content), markup=False, soft_wrap=True)


def _engines_at_hand(
    checkpoint: Path, backend: str, device: str, dtype: str, buckets: tuple[int, ...] | None, decoder: str | None
) -> Path | None:
    """The usual folder, where it holds all the checkpoint's engines; else None, and the command that builds them."""
    from engines.plan.checkpoint import missing_engines, plan_checkpoint
    from engines.store import EngineStore

    store = EngineStore("engines-cache")
    plan = plan_checkpoint(checkpoint, backend, device, dtype, buckets, decoder)
    if plan.options.backend != "eager" and not missing_engines(plan, store):
        return store.root
    typer.echo(f"without engines, which are not built: {plan.command(store.root)}", err=True)
    return None
