"""CUDA graphs where there is no GPU: operators are noted while a graph is recorded, and done again, into the same
tensors, when it is replayed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class _Noted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class Graph:
    """In place of ``torch.cuda.CUDAGraph``."""

    def __init__(self) -> None:
        self.noted = _Noted()
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        with torch.inference_mode():
            for func, args, kwargs, result in self.noted.calls:
                again = func(*args, **kwargs)
                if isinstance(result, Tensor) and again.data_ptr() != result.data_ptr():
                    result.copy_(again)


class Stream:
    """In place of ``torch.cuda.Stream``."""

    def wait_stream(self, other: Any) -> None:
        pass


class Recorder:
    """What was recorded.

    Attributes:
        recorded: (graph, pool, mode) of every graph.
        pools: how many were asked for.
        failing: the next recordings raise this.
    """

    def __init__(self) -> None:
        self.recorded: list[tuple[Graph, Any, str]] = []
        self.pools = 0
        self.failing: Exception | None = None

    def new_pool(self) -> tuple[int, int]:
        self.pools += 1
        return self.pools, 0

    @contextmanager
    def graph(
        self, graph: Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        if self.failing is not None:
            raise self.failing
        self.recorded.append((graph, pool, capture_error_mode))
        with graph.noted:
            yield


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """torch's CUDA graphs, recorded on the CPU."""
    found = Recorder()

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        yield

    monkeypatch.setattr("engines.run.cuda_graphs._of_device", {})
    for name, value in {
        "Stream": Stream,
        "stream": on,
        "current_stream": Stream,
        "current_device": lambda: 0,
        "CUDAGraph": Graph,
        "graph": found.graph,
        "graph_pool_handle": found.new_pool,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return found
