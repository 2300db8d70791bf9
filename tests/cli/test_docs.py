"""The commands that the documentation shows: each exists, and so does every option that it is given."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from typer.main import get_command

from cli.groups import DefaultCommand
from cli.main import app
from rmd.presets import preset

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *(f"docs/{name}.md" for name in ("your-gpu", "import", "students", "training", "decoders"))]


def commands_of(page: str) -> list[list[str]]:
    """The arguments of every line that starts with `rmd` inside a fenced block, continued lines joined."""
    blocks = re.findall(r"^```(?:bash|sh)?\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("rmd ")]


def command_of(arguments: list[str]) -> tuple[click.Command, list[str]]:
    """The command that a line calls, down its groups, and what it is given."""
    command: click.Command = get_command(app)
    context = click.Context(command)
    while hasattr(command, "resolve_command"):
        if isinstance(command, DefaultCommand) and arguments[0] not in command.commands:
            arguments = [next(iter(command.commands)), *arguments]
        _, found, arguments = command.resolve_command(context, arguments)
        assert found is not None
        command, context = found, click.Context(found)
    return command, arguments


@pytest.mark.parametrize("page", PAGES)
def test_every_command_and_option_exists(page: str) -> None:
    shown = commands_of(page)
    assert shown
    for arguments in shown:
        command, given = command_of(arguments)
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        for argument in given:
            if argument.startswith("--"):
                assert argument.partition("=")[0] in known, f"{page}: rmd {' '.join(arguments)}"
        if "--preset" in given and command.name != "distill":
            preset(given[given.index("--preset") + 1])


def test_the_check_sees_an_option_that_is_none() -> None:
    command, given = command_of(["cascade", "show", "--colour", "red"])
    assert given == ["--colour", "red"] and "--colour" not in {name for item in command.params for name in item.opts}


@pytest.mark.parametrize("page", ["README.md", "docs/your-gpu.md"])
def test_links_between_the_pages_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        name, _, heading = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        assert file.exists(), target
        if heading and file.suffix == ".md":
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.M)
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in anchors, f"{target}: {anchors}"
