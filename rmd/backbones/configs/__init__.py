"""The full-size configurations, one JSON file a backbone: component -> the content of its ``config.json``."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

PUBLISHED = ("sdxl", "pixart", "sd3", "wan-1.3b", "wan-14b")
CONFIGURED = ("embedded", "embedded-video", *PUBLISHED)
"""The public models, and this project's own two."""


def published_config(name: str, text: bool = True) -> dict[str, dict[str, Any]]:
    """The full-size configuration of backbone ``name`` (SDXL base 1.0, PixArt-alpha XL-2 1024-MS, SD3.5-medium,
    Wan2.1-T2V 1.3 B and 14 B, or this project's embedded models).

    Args:
        name: one of :data:`CONFIGURED`.
        text: False leaves the text encoders out, for use without transformers.

    Raises:
        ValueError: there is no published configuration of that name.
    """
    if name not in CONFIGURED:
        raise ValueError(f"no published configuration for {name!r}; there are {', '.join(CONFIGURED)}")
    config: dict[str, dict[str, Any]] = json.loads((files(__package__) / f"{name}.json").read_text(encoding="utf-8"))
    return {part: value for part, value in config.items() if text or not part.startswith("text_encoder")}
