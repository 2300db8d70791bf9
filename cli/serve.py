"""``rmd serve``: the HTTP server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import DecoderOption

if TYPE_CHECKING:
    from server.start.settings import ServerSettings


def command(
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option(help="A checkpoint's folder, or owner/name@revision; several times for several models."),
    ] = None,
    engines: Annotated[Path | None, typer.Option(help="The folder of built engines.")] = None,
    backend: Annotated[str | None, typer.Option(help="Engine backend: auto, inductor, tensorrt ... or eager.")] = None,
    device: Annotated[str | None, typer.Option(help="Torch device, such as cpu or cuda:0.")] = None,
    devices: Annotated[str | None, typer.Option(help="Several, one engine each: cuda:0,cuda:1.")] = None,
    stages: Annotated[str | None, typer.Option(help="What each of them does: low,high+decode; default: all.")] = None,
    policy: Annotated[
        str | None, typer.Option(help="Scheduler: stagewise, fifo, dynamic:8:0.02 or continuous:8.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    allow_open: Annotated[
        bool | None, typer.Option("--allow-open", help="Listen beyond this machine without API keys.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    model_name: Annotated[str | None, typer.Option(help="The one model's id; default: the folder's name.")] = None,
    teacher: Annotated[bool | None, typer.Option("--teacher/--no-teacher", help="Offer schedule 'teacher'.")] = None,
    build_missing: Annotated[
        bool | None, typer.Option("--build/--no-build", help="Build missing engines beside serving.")
    ] = None,
    queue_items: Annotated[int | None, typer.Option(help="Pictures admitted at once.")] = None,
    deadline_seconds: Annotated[float | None, typer.Option(help="Longest time from admission to reply.")] = None,
    threads: Annotated[int | None, typer.Option(help="Torch threads.")] = None,
    decoder: DecoderOption = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
) -> None:
    """Serve checkpoints over OpenAI's image API, and its video API where a model makes films.

    Every setting can also come from the environment (RMD_PORT=8000 ...) or a YAML file (--config). API keys come
    from RMD_API_KEYS or the file, never from a flag, which every process list would show.
    """
    from pydantic import ValidationError

    from server.front.service import Service
    from server.garbage import settle_heap
    from server.logs import configure_logging
    from server.start.films import open_jobs
    from server.start.progress import ProgressLine
    from server.start.run import make_server
    from server.start.settings import CONFIG_VARIABLE, ServerSettings, unknown_variables
    from server.telemetry.facts import current_ids

    if config is not None:
        os.environ[CONFIG_VARIABLE] = str(config)
    flags: dict[str, Any] = {
        "checkpoint": tuple(checkpoint) if checkpoint else None,
        "engines": engines,
        "backend": backend,
        "device": device,
        "devices": devices,
        "stages": stages,
        "policy": policy,
        "host": host,
        "port": port,
        "allow_open": allow_open,
        "model_name": model_name,
        "serve_teacher": teacher,
        "build_missing": build_missing,
        "queue_items": queue_items,
        "deadline_seconds": deadline_seconds,
        "threads": threads,
        "decoder": decoder,
        "log_level": log_level,
    }
    try:
        settings = _fetched(ServerSettings(**{name: value for name, value in flags.items() if value is not None}))
    except ValidationError as error:
        for wrong in error.errors(include_url=False, include_input=False):
            field = ".".join(map(str, wrong["loc"])) or "settings"
            typer.secho(f"rmd serve: {field}: {wrong['msg']}", fg="red", err=True)
        raise typer.Exit(2) from None
    except (ValueError, FileNotFoundError) as error:
        typer.secho(f"rmd serve: {error}", fg="red", err=True)
        raise typer.Exit(2) from None
    configure_logging(settings.log_level, settings.log_format, current_ids)
    for name in unknown_variables(os.environ):
        typer.secho(
            f"rmd serve: {name} is no setting and changes nothing; docs/serving.md lists them", fg="yellow", err=True
        )
    typer.echo(settings.describe())

    failures: list[str] = []

    def stop_at_failure(reason: str) -> None:
        failures.append(reason)
        server.should_exit = True

    with ProgressLine() as line:
        service = Service(settings, open_jobs, on_failed=stop_at_failure, on_progress=line.update)
        server = make_server(service)
        settle_heap()
        server.run()
    if failures:
        typer.secho(f"rmd serve: {failures[0]}", fg="red", err=True)
        raise typer.Exit(1)


def _fetched(settings: ServerSettings) -> ServerSettings:
    """The settings with every checkpoint that is named as on the hub fetched; a single one keeps its name there."""
    from rmd.published.hub import checkpoint_folder, is_hub_name, split_hub_name

    named = [source for source in settings.checkpoint if is_hub_name(source)]
    if not named:
        return settings
    if len(settings.checkpoint) > 1:
        raise ValueError(
            f"checkpoint {named[0]}: one from the hub is served alone; of several, give folders, whose names are the "
            f"models' (`rmd import` and the hub's client write such)"
        )
    name = split_hub_name(named[0])[0].partition("/")[2]
    changed = {"checkpoint": (checkpoint_folder(named[0]),), "model_name": settings.model_name or name}
    return settings.model_copy(update=changed)
