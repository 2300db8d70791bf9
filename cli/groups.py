"""A group of commands that runs its first one unless another is named."""

from __future__ import annotations

import typer
from typer.core import TyperGroup


class DefaultCommand(TyperGroup):
    """`rmd evaluate --checkpoint X` is `rmd evaluate embedded --checkpoint X`; `rmd evaluate pictures` is itself."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """The arguments, led by the first command's name where they begin with none."""
        if not args or (args[0] not in self.commands and args[0] != "--help"):
            args = [next(iter(self.commands)), *args]
        return super().parse_args(ctx, args)
