"""Replays an engine as one CUDA graph: at small batches launching its kernels one by one costs more than they do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from engines.compilers.base import Engine, EngineMemory


class GraphedEngine(Engine):
    """An engine with static input and output buffers, recorded once per (stage, bucket) and replayed.

    The weights are read at the addresses they had when recorded; refits happen in place, so a recording stays valid.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine.manifest, engine.batch)
        self._engine = engine
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._output: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where inputs must lie."""
        return self._engine.device

    def _run(self, inputs: Sequence[Tensor]) -> Tensor:
        if self._graph is None:
            self._record(inputs)
        assert self._graph is not None and self._output is not None
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._output.clone()  # the next replay overwrites it

    def _record(self, inputs: Sequence[Tensor]) -> None:
        self._inputs = [tensor.clone(memory_format=torch.contiguous_format) for tensor in inputs]
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # lazy initialisation must not end up in the recording
                self._engine._run(self._inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._output = self._engine._run(self._inputs)
        self._graph = graph

    def check_refit(self, state: Mapping[str, Tensor]) -> None:
        """See :meth:`Engine.check_refit`."""
        self._engine.check_refit(state)

    def refit(self, state: Mapping[str, Tensor]) -> None:
        """See :meth:`Engine.refit`."""
        self._engine.refit(state)
        self.on_refit()

    def on_refit(self) -> None:
        """See :meth:`Engine.on_refit`."""
        if self.manifest.weights_mode == "refittable":
            self._graph = None  # the library may have moved the weights: record again at the next run

    def memory(self) -> EngineMemory:
        """The engine's, and the static buffers."""
        inner = self._engine.memory()
        own = sum(tensor.nbytes for tensor in self._inputs) + (0 if self._output is None else self._output.nbytes)
        return EngineMemory(inner.private + own, inner.shared)

    def unload(self) -> None:
        """See :meth:`Engine.unload`."""
        self._graph, self._output, self._inputs = None, None, []
        self._engine.unload()
