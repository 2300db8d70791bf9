"""The method: noise schedules, cascades, the upsampling transformation, the sampler and the backbones.

Nothing in this package serves, trains or compiles; the packages that do build on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rmd.pipeline import CascadeOutput, CascadePipeline

__all__ = ["CascadeOutput", "CascadePipeline"]


def __getattr__(name: str) -> Any:
    """The pipeline, imported when it is first asked for: most of this package needs no diffusers."""
    if name in __all__:
        from rmd import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
