"""What one engine is, and its key: two engines share a key exactly when one can stand in for the other."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import linecache
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from engines.target import Target

KEY_LENGTH = 32
# Settings that say where a network came from, or how it was cast, and not what it computes.
_NOT_THE_GRAPH = frozenset({"training", "name_or_path", "architectures", "dtype", "torch_dtype"})


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape (batch first) and dtype (such as "bfloat16") of an input or output."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> TensorSpec:
        """The spec of a tensor."""
        return cls(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TensorSpec:
        """Read an entry of a manifest."""
        return cls(str(data["name"]), tuple(int(side) for side in data["shape"]), str(data["dtype"]))

    def to_dict(self) -> dict[str, Any]:
        """As stored in a manifest."""
        return {"name": self.name, "shape": list(self.shape), "dtype": self.dtype}

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


@dataclass(frozen=True)
class EngineSpec:
    """Everything that an engine depends on, known before it is built.

    Attributes:
        component: such as "denoiser", "decoder", "text_encoder".
        size: in pixels as text, or None for components without one.
        batches: rows that it can run, ascending. One for a static engine; several are profiles of one engine, which
            share its weights.
        dtype: of the weights.
        backend: which compiler.
        weights_mode: "shared" (one copy for all engines, outside the engine), "packed" (the same, in the layout the
            kernels read), "embedded" (inside the engine), "refittable" (inside, replaceable), "module" (eager).
        inputs: in the order of the network's arguments, at the widest batch.
        graph: digest of the module tree, configuration, parameter shapes and the sources of its classes.
        target: the machine.
        versions: of the libraries that the machine code depends on.
        settings: every setting of the compiler that touches the engine.
        weights: digest of the weights where they are embedded, else None.
    """

    component: str
    size: str | None
    batches: tuple[int, ...]
    dtype: str
    backend: str
    weights_mode: str
    inputs: tuple[TensorSpec, ...]
    graph: str
    target: Target
    versions: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The parts of the key, as stored in a manifest."""
        return {
            "component": self.component,
            "size": self.size,
            "batches": list(self.batches),
            "dtype": self.dtype,
            "backend": self.backend,
            "weights_mode": self.weights_mode,
            "inputs": [spec.to_dict() for spec in self.inputs],
            "graph": self.graph,
            "target": self.target.to_dict(),
            "versions": dict(sorted(self.versions.items())),
            "settings": dict(sorted(self.settings.items())),
            "weights": self.weights,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EngineSpec:
        """Read what :meth:`to_dict` wrote."""
        return cls(
            component=str(data["component"]),
            size=data["size"],
            batches=tuple(int(batch) for batch in data["batches"]),
            dtype=str(data["dtype"]),
            backend=str(data["backend"]),
            weights_mode=str(data["weights_mode"]),
            inputs=tuple(TensorSpec.from_dict(entry) for entry in data["inputs"]),
            graph=str(data["graph"]),
            target=Target.from_dict(data["target"]),
            versions=dict(data["versions"]),
            settings=dict(data["settings"]),
            weights=data["weights"],
        )

    @property
    def key(self) -> str:
        """sha256 over all parts, in hexadecimal, shortened."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]

    @property
    def batch(self) -> int:
        """The widest batch."""
        return self.batches[-1]

    @property
    def title(self) -> str:
        """For people: "denoiser 128x128 batch 4", or "... batch 1, 2, 4" of an engine with several profiles."""
        batches = ", ".join(map(str, self.batches))
        return " ".join(part for part in (self.component, self.size, f"batch {batches}") if part)

    def differences(self, wanted: EngineSpec) -> list[str]:
        """What this engine was built for that ``wanted`` is not: one short phrase each, machine first."""
        found = self.target.differences(wanted.target)
        for theirs, ours in ((self.versions, wanted.versions), (self.settings, wanted.settings)):
            found += [
                f"{name} {theirs.get(name, 'absent')}, here {ours.get(name, 'absent')}"
                for name in sorted({*theirs, *ours})
                if theirs.get(name) != ours.get(name)
            ]
        if self.dtype != wanted.dtype:
            found.append(f"dtype {self.dtype}, here {wanted.dtype}")
        if self.graph != wanted.graph:
            found.append("another network")
        return found


CONVERSION = 2
"""Part of every key. Raise it when a compiler's own code (packing, profiles, export) changes what comes out."""


def graph_digest(module: nn.Module) -> str:
    """Digest of what a module computes, without its weights' values: tree, settings, shapes, configuration, sources.

    The same for a module on the meta device. Shapes of the inputs are no part of it.
    """
    digest = hashlib.sha256(f"conversion {CONVERSION}".encode())
    sources: set[type] = set()
    for name, child in module.named_modules():
        kind = type(child)
        sources.add(kind)
        digest.update(f"{name}|{kind.__module__}.{kind.__qualname__}|{child.extra_repr()}\n".encode())
        for attribute, value in sorted(vars(child).items()):
            # Plain settings, such as a scaling factor or an epsilon, change the graph as much as a layer does.
            plain = isinstance(value, bool | int | float | str | tuple)
            if plain and not attribute.startswith("_") and attribute not in _NOT_THE_GRAPH:
                digest.update(f" {attribute}={value!r}\n".encode())
        # diffusers computes attention in a plain object.
        processor = getattr(child, "processor", None)
        if processor is not None and not isinstance(processor, nn.Module):
            sources.add(type(processor))
            digest.update(f" processor={type(processor).__module__}.{type(processor).__qualname__}\n".encode())
        config = getattr(child, "config", None)
        if config is not None:
            digest.update(_config_text(config).encode())
    for name, tensor in module.named_parameters(remove_duplicate=False):
        # Kernels are chosen for strides, and compiled for them.
        lies = "" if tensor.is_contiguous() else f" strides {tensor.stride()}"
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}{lies}\n".encode())
    for name, buffer in module.named_buffers(remove_duplicate=False):
        # Loaders cast buffers, constructors on the meta device do not; the dtype is a part of the spec anyway.
        digest.update(f"{name}{tuple(buffer.shape)}\n".encode())
    for kind in sorted(sources, key=lambda kind: f"{kind.__module__}.{kind.__qualname__}"):
        digest.update(_source(kind).encode())  # type: ignore[arg-type]
    return digest.hexdigest()


@lru_cache(maxsize=4096)
def _source(kind: type) -> str:
    """As ``inspect.getsource``, which parses the whole file once more for every class of it."""
    if kind.__module__.startswith("torch."):
        return ""  # torch's version is in the key
    try:
        file = inspect.getsourcefile(kind)
        first = _classes(file).get(kind.__qualname__) if file else None
        if file is None or first is None:
            return inspect.getsource(kind)
        return "".join(inspect.getblock(linecache.getlines(file)[first:]))
    except (OSError, TypeError):
        return ""


@lru_cache(maxsize=256)
def _classes(file: str) -> dict[str, int]:
    """The line, from 0, where each class of a file begins, its decorators included; by qualified name.

    Not those inside functions, and none that is defined twice.
    """
    lines: dict[str, int] = {}
    twice: set[str] = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for statement in body:
            if isinstance(statement, ast.ClassDef):
                name = prefix + statement.name
                if name in lines:
                    twice.add(name)
                lines[name] = min([statement.lineno, *(part.lineno for part in statement.decorator_list)]) - 1
                visit(statement.body, f"{name}.")
            elif isinstance(statement, ast.If | ast.Try | ast.With):
                for block in ("body", "orelse", "finalbody"):
                    visit(getattr(statement, block, []), prefix)

    visit(ast.parse("".join(linecache.getlines(file))).body, "")
    return {name: line for name, line in lines.items() if name not in twice}


def _config_text(config: Any) -> str:
    data = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(data, Mapping):
        return ""
    kept = {
        name: value
        for name, value in data.items()
        if not name.startswith("_") and "version" not in name and name not in _NOT_THE_GRAPH
    }
    return json.dumps(kept, sort_keys=True, default=str)
