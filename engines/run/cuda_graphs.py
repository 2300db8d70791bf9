"""Replays an engine as one CUDA graph: at small batches launching its kernels one by one costs more than they do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from engines.compilers.engine import Engine, EngineMemory
from engines.spec import WeightsMode


class GraphMemory:
    """What all graphs of a device share: the memory of their intermediate tensors, and the stream they are recorded on.

    Each graph would otherwise keep a pool of its own, and the pools of all components, sizes and batches add up. They
    may share one because a graph's output is copied out before another is replayed, and one thread replays them all.
    """

    def __init__(self) -> None:
        self._users = 0
        self._pool: Any = None
        self._stream: Any = None

    @property
    def stream(self) -> Any:
        """To warm up and record on: what is set up lazily belongs to a stream."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        return self._stream

    def take(self) -> Any:
        """The pool for one more graph; to be followed by :meth:`give_back`."""
        if self._users == 0:  # with its last graph the old pool has gone
            self._pool = torch.cuda.graph_pool_handle()
        self._users += 1
        return self._pool

    def give_back(self) -> None:
        """A graph, and its output, are gone."""
        self._users -= 1


_of_device: dict[int, GraphMemory] = {}


def graph_memory() -> GraphMemory:
    """What the graphs of torch's current device share."""
    return _of_device.setdefault(torch.cuda.current_device(), GraphMemory())


class GraphedEngine(Engine):
    """An engine with static input and output buffers, recorded once per (stage, bucket) and replayed.

    The weights are read at the addresses they had when recorded; refits happen in place, so a recording stays valid.
    Where weights have moved all the same (:meth:`Engine.addresses`) it is recorded again.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine.manifest, engine.batch)
        self._engine = engine
        self._memory: GraphMemory | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._output: Tensor | None = None
        self._addresses: tuple[int, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where inputs must lie."""
        return self._engine.device

    def _run(self, inputs: Sequence[Tensor]) -> Tensor:
        if self._graph is not None and self._addresses != self._engine.addresses():
            self._forget()
        if self._graph is None:
            self._record(inputs)
        assert self._graph is not None and self._output is not None
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._output.clone()  # the next replay overwrites it

    def _record(self, inputs: Sequence[Tensor]) -> None:
        memory = graph_memory()
        self._inputs = [tensor.clone(memory_format=torch.contiguous_format) for tensor in inputs]
        self._addresses = self._engine.addresses()
        memory.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(memory.stream):
            for _ in range(3):  # lazy initialisation must not end up in the recording
                self._engine._run(self._inputs)
        torch.cuda.current_stream().wait_stream(memory.stream)
        graph = torch.cuda.CUDAGraph()
        pool, self._memory = memory.take(), memory
        try:
            # Not "global": another thread that allocates meanwhile (a decoder of films, a preview) must not end it.
            with torch.cuda.graph(graph, pool=pool, stream=memory.stream, capture_error_mode="thread_local"):
                self._output = self._engine._run(self._inputs)
        except BaseException:
            del graph
            self._forget()
            raise
        self._graph = graph

    def _forget(self) -> None:
        self._graph, self._output, self._inputs = None, None, []
        if self._memory is not None:
            self._memory.give_back()
        self._memory = None

    def check_refit(self, state: Mapping[str, Tensor]) -> None:
        """See :meth:`Engine.check_refit`."""
        self._engine.check_refit(state)

    def refit(self, state: Mapping[str, Tensor]) -> None:
        """See :meth:`Engine.refit`."""
        self._engine.refit(state)
        self.on_refit()

    def on_refit(self) -> None:
        """See :meth:`Engine.on_refit`."""
        if self.manifest.weights_mode is WeightsMode.REFITTABLE:
            self._forget()  # the library may have moved the weights: record again at the next run

    def addresses(self) -> tuple[int, ...]:
        """See :meth:`Engine.addresses`."""
        return self._engine.addresses()

    def memory(self) -> EngineMemory:
        """The engine's, and the static buffers."""
        inner = self._engine.memory()
        own = sum(tensor.nbytes for tensor in self._inputs) + (0 if self._output is None else self._output.nbytes)
        return EngineMemory(inner.private + own, inner.shared)

    def unload(self) -> None:
        """See :meth:`Engine.unload`."""
        self._forget()
        self._engine.unload()


def as_it_runs(engine: Engine, cuda_graphs: bool = True) -> Engine:
    """The engine as it serves: replayed as a CUDA graph on a GPU, whether it is compiled code or the network itself."""
    if not cuda_graphs or engine.manifest.spec.target.device != "cuda":
        return engine
    return GraphedEngine(engine)
