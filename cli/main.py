"""`rmd`: one entry point, one module a command.

A command's module is imported only when that command is asked for, so `rmd --help` costs no torch import.
"""

from __future__ import annotations

import importlib
import os
from typing import Annotated

import typer
from typer.core import TyperGroup
from typer.main import get_command

COMMANDS: dict[str, tuple[str, str]] = {
    "cascade": ("cli.cascade", "Show a cascade's steps."),
    "presets": ("cli.presets", "List the presets: backbones' cascades and public students, with their sources."),
    "backbones": ("cli.backbones", "List the backbones."),
    "data": ("cli.data", "Fetch the embedded model's training pictures."),
    "train-teacher": ("cli.train_teacher", "Train the embedded autoencoder and teacher."),
    "train-film-teacher": ("cli.train_film_teacher", "Train the embedded film teacher."),
    "import": ("cli.import_weights", "Merge published weights into a checkpoint."),
    "distill": ("cli.distill", "Distil a teacher into a few-step cascade."),
    "export": ("cli.export", "Write what a distillation learnt as a LoRA."),
    "lab": ("cli.lab", "Repeat the paper's comparisons on a small pair of sizes."),
    "distill-decoder": ("cli.distill_decoder", "Distil a small decoder from a checkpoint's own."),
    "evaluate": ("cli.evaluate", "Measure a checkpoint: held-out sets, pictures, films."),
    "study": ("cli.study", "Compare two models blindly, and test the answers."),
    "generate": ("cli.generate", "Draw one prompt, or a file of them."),
    "build": ("cli.build", "Compile a checkpoint into engines."),
    "engines": ("cli.engines", "List, verify, measure and prune built engines."),
    "serve": ("cli.serve", "Serve a checkpoint over OpenAI-compatible HTTP."),
    "bench": ("cli.bench", "Measure speed-ups and engines, in one run."),
}


class LazyCommands(TyperGroup):
    """Lists `COMMANDS` from the table above and imports one only to run it or to show its help."""

    def list_commands(self, ctx: object) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: object, cmd_name: str):  # type: ignore[no-untyped-def]
        """A stand-in with name and summary, which is all that the overview needs."""
        if cmd_name not in COMMANDS:
            return None
        stub = typer.Typer(add_completion=False)
        stub.command(help=COMMANDS[cmd_name][1])(lambda: None)
        command = get_command(stub)
        command.name = cmd_name
        return command

    def resolve_command(self, ctx, args):  # type: ignore[no-untyped-def]
        """The command that is to run, imported."""
        name = args[0]
        if name not in COMMANDS:
            return super().resolve_command(ctx, args)
        module_name, summary = COMMANDS[name]
        module = importlib.import_module(module_name)
        app = getattr(module, "app", None)
        if app is None:
            app = typer.Typer(add_completion=False, rich_markup_mode=None)
            app.command()(module.command)
        command = get_command(app)
        command.name, command.short_help = name, summary
        return name, command, args[1:]


app = typer.Typer(cls=LazyCommands, no_args_is_help=True, add_completion=False, rich_markup_mode=None)


def _say_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("rmd"))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """RMD: distil a diffusion model into a few-step multi-resolution cascade, compile it, serve it."""


def main() -> None:
    """Run the command line. Errors that a user can mend are one line on stderr and exit code 2."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        app()
    except (ValueError, OSError) as error:
        if os.environ.get("RMD_TRACEBACK"):
            raise
        typer.echo(f"rmd: {error}", err=True)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
