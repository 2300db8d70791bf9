"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

DecoderOption = Annotated[
    str | None,
    typer.Option(
        "--decoder",
        help="A small decoder's folder, or full: the checkpoint's own autoencoder. Default: what the checkpoint names.",
    ),
]
