"""Ways of running components: eager, torch.compile, engines built on demand, CUDA graphs of any of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from rmd.backbones.base import Backbone
from rmd.backbones.executor import EagerExecutor
from rmd.size import Size


class TorchCompiled:
    """Components through ``torch.compile``, one static graph a shape."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
        self._compiled = {name: torch.compile(module, dynamic=False) for name, module in modules.items()}

    def run(self, component: str, size: Size | None, inputs: Mapping[str, Tensor]) -> Tensor:
        """See :class:`rmd.backbones.executor.Executor`."""
        with torch.inference_mode():
            # Strides are guarded on: an expanded input would be compiled for again when a graph records its copy.
            output: Tensor = self._compiled[component](**{name: value.contiguous() for name, value in inputs.items()})
        return output


class GraphReplay:
    """Another executor's kernels recorded once a shape and replayed as one CUDA graph."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self._recorded: dict[Any, tuple[Any, dict[str, Tensor], Tensor]] = {}

    def run(self, component: str, size: Size | None, inputs: Mapping[str, Tensor]) -> Tensor:
        """See :class:`rmd.backbones.executor.Executor`."""
        key = (component, size, tuple((name, tuple(value.shape), value.dtype) for name, value in inputs.items()))
        if key not in self._recorded:
            self._recorded[key] = self._record(component, size, inputs)
        graph, static, output = self._recorded[key]
        for name, value in inputs.items():
            static[name].copy_(value)
        graph.replay()
        return output.clone()

    def _record(
        self, component: str, size: Size | None, inputs: Mapping[str, Tensor]
    ) -> tuple[Any, dict[str, Tensor], Tensor]:
        static = {name: value.clone() for name, value in inputs.items()}
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # lazily made handles and autotuning must not fall into the recording
            for _ in range(3):
                self.inner.run(component, size, static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self.inner.run(component, size, static)
        return graph, static, output

    def release(self) -> None:
        """Free the recorded graphs and their memory, and the engines that they replay."""
        self._recorded.clear()
        if hasattr(self.inner, "release"):
            self.inner.release()


class EnginesOnDemand:
    """Components through an engine compiler, each shape built when it is first asked for, in a temporary folder."""

    def __init__(self, modules: Mapping[str, nn.Module], backend: str, device: torch.device, dtype: str) -> None:
        from engines.compilers import get_compiler

        self.compiler = get_compiler(backend)
        self.modules, self.device, self.dtype = dict(modules), device, dtype
        self._folder = TemporaryDirectory(prefix="rmd-bench-")
        self._engines: dict[Any, Any] = {}
        self._banks: list[Any] = []

    def run(self, component: str, size: Size | None, inputs: Mapping[str, Tensor]) -> Tensor:
        """See :class:`rmd.backbones.executor.Executor`."""
        key = (component, str(size), next(iter(inputs.values())).shape[0])
        if key not in self._engines:
            self._engines[key] = self._build(component, size, inputs)
        output: Tensor = self._engines[key].run(inputs)
        return output

    def _build(self, component: str, size: Size | None, inputs: Mapping[str, Tensor]) -> Any:
        from engines.compilers.base import EngineRequest
        from engines.target import this_machine
        from engines.weights.bank import WeightBank

        module = self.modules[component]
        text = None if size is None else str(size)
        request = EngineRequest(component, text, module, inputs, this_machine(self.device), self.dtype, "random")
        spec = self.compiler.plan(request)
        folder = Path(self._folder.name) / spec.key
        folder.mkdir(parents=True, exist_ok=True)
        manifest = self.compiler.build(module, spec, folder)
        self._banks.append(WeightBank(module))
        return self.compiler.load(manifest, folder, self._banks[-1])

    def release(self) -> None:
        """Unload the engines; their files go with this object."""
        for engine in self._engines.values():
            engine.unload()
        for bank in self._banks:
            bank.close()
        self._engines.clear()
        self._banks.clear()


def make_executor(
    variant: str, backbone: Backbone, device: torch.device, dtype: str, shared: dict[str, Any] | None = None
) -> Any:
    """The executor of a variant: "eager", "compiled", "tensorrt", "tensorrt_rtx", each also with "+graphs".

    Args:
        shared: executors by base name, reused: what was compiled once is also what the graphs record.

    Raises:
        ValueError: unknown variant, or one that this machine cannot run; the message says why.
    """
    shared = {} if shared is None else shared
    base, _, extra = variant.partition("+")
    modules = backbone.component_modules()
    if extra not in ("", "graphs"):
        raise ValueError(f"unknown variant {variant!r}")
    if extra and device.type != "cuda":
        raise ValueError("CUDA graphs need a CUDA device")
    if base in shared:
        inner: Any = shared[base]
    elif base == "eager":
        inner = EagerExecutor(modules)
    elif base == "compiled":
        inner = TorchCompiled(modules)
    elif base in ("tensorrt", "tensorrt_rtx", "inductor"):
        inner = EnginesOnDemand(modules, base, device, dtype)
        capabilities = inner.compiler.capabilities(device.type)
        if not capabilities.available:
            raise ValueError(capabilities.reason)
    else:
        raise ValueError(f"unknown variant {variant!r}; there are eager, compiled, inductor, tensorrt, tensorrt_rtx")
    shared[base] = inner
    return GraphReplay(inner) if extra else inner


def variants_for(device: torch.device, asked: Sequence[str] | None = None) -> list[str]:
    """The variants to try on a device; unavailable ones are recorded, not raised.

    The baseline comes first, then TensorRT's: building moves the weights to the CPU and back, and graphs recorded
    before would read the addresses that they had.
    """
    if asked:
        chosen = list(asked)
    elif device.type == "cuda":
        chosen = ["eager", "eager+graphs", "compiled", "compiled+graphs", "tensorrt", "tensorrt+graphs"]
    else:
        chosen = ["eager"]
    return sorted(chosen, key=lambda variant: (variant != "eager", not variant.startswith("tensorrt")))
