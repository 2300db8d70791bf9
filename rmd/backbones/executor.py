"""What runs a backbone's components: the modules themselves here, compiled engines elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from rmd.size import Size


class Executor(Protocol):
    """Runs one component of a backbone at one size: eagerly, or as a compiled engine."""

    def run(self, component: str, size: Size | None, inputs: Mapping[str, Tensor]) -> Tensor:
        """The component's output; ``size`` is None for components whose shapes do not depend on it (text encoders)."""
        ...


class EagerExecutor:
    """The reference executor: calls the component modules as they are, without gradients."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = dict(modules)

    def run(self, component: str, size: Size | None, inputs: Mapping[str, Tensor]) -> Tensor:
        """Calls ``modules[component](**inputs)``.

        Raises:
            KeyError: there is no such component.
        """
        if component not in self.modules:
            raise KeyError(f"no component {component!r}; this backbone has {', '.join(sorted(self.modules))}")
        with torch.inference_mode():
            output: Tensor = self.modules[component](**inputs)
        return output
