"""What one engine is, and its key: two engines share a key exactly when one can stand in for the other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from engines.sources import module_digest, with_helpers
from engines.target import Target

KEY_LENGTH = 32
# Settings that say where a network came from, or how it was cast, and not what it computes.
_NOT_THE_GRAPH = frozenset({"training", "name_or_path", "architectures", "dtype", "torch_dtype"})
# Of the libraries' own settings those that choose another computation: which attention, whether in slices.
_PRIVATE = frozenset({"_attn_implementation", "_chunk_size", "_chunk_dim"})


class WeightsMode(StrEnum):
    """How an engine holds its weights."""

    SHARED = "shared"
    """Outside: one copy for all engines of a component."""
    PACKED = "packed"
    """The same, in the layout that the kernels read."""
    EMBEDDED = "embedded"
    """Inside its own files, for good."""
    REFITTABLE = "refittable"
    """Inside, replaceable."""
    MODULE = "module"
    """The network's own: it is that very network."""

    @property
    def inside(self) -> bool:
        """The weights lie within the engine's own files: it serves one checkpoint."""
        return self in (WeightsMode.EMBEDDED, WeightsMode.REFITTABLE)

    @property
    def reads_bank(self) -> bool:
        """The weights are constants out of a :class:`~engines.weights.bank.WeightBank`."""
        return self in (WeightsMode.SHARED, WeightsMode.PACKED)


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
        weights_mode: how it is to hold its weights.
        inputs: in the order of the network's arguments, at the widest batch.
        graph: see :func:`graph_digest`.
        target: the machine.
        versions: of the libraries that the machine code depends on.
        settings: every setting of the compiler that touches the engine.
        weights: digest of the weights where they are inside, else None.
        code: digest of this project's own code that shapes such an engine (:attr:`Compiler.sources`).
    """

    component: str
    size: str | None
    batches: tuple[int, ...]
    dtype: str
    backend: str
    weights_mode: WeightsMode
    inputs: tuple[TensorSpec, ...]
    graph: str
    target: Target
    versions: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None
    code: str = ""

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
            "code": self.code,
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
            weights_mode=WeightsMode(data["weights_mode"]),
            inputs=tuple(TensorSpec.from_dict(entry) for entry in data["inputs"]),
            graph=str(data["graph"]),
            target=Target.from_dict(data["target"]),
            versions=dict(data["versions"]),
            settings=dict(data["settings"]),
            weights=data["weights"],
            code=str(data["code"]),
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
        if self.code != wanted.code:
            found.append("another version of this program")
        return found


def graph_digest(module: nn.Module) -> str:
    """Digest of what a module computes, without its weights' values: tree, settings, shapes, strides, configuration,
    and the source files of its classes with the functions that those files take from their own package.

    The same for a module on the meta device. Shapes of the inputs are no part of it.
    """
    digest = hashlib.sha256()
    sources: set[str] = set()
    for name, child in module.named_modules():
        kind = type(child)
        sources.add(kind.__module__)
        digest.update(f"{name}|{kind.__module__}.{kind.__qualname__}|{child.extra_repr()}\n".encode())
        for attribute, value in sorted(vars(child).items()):
            # Plain settings, such as a scaling factor or an epsilon, change the graph as much as a layer does.
            public = not attribute.startswith("_") and attribute not in _NOT_THE_GRAPH
            if _is_plain(value) and (public or attribute in _PRIVATE):
                digest.update(f" {attribute}={value!r}\n".encode())
        # diffusers computes attention in a plain object.
        processor = getattr(child, "processor", None)
        if processor is not None and not isinstance(processor, nn.Module):
            sources.add(type(processor).__module__)
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
    for name in sorted({other for source in sources for other in with_helpers(source)}):
        digest.update(f"{name} {module_digest(name)}\n".encode())
    return digest.hexdigest()


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(item is None or _is_plain(item) for item in value)
    return isinstance(value, bool | int | float | str)


def _config_text(config: Any) -> str:
    data = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(data, Mapping):
        return ""
    kept = {
        name: value
        for name, value in data.items()
        if not name.startswith("_") and "version" not in name and name not in _NOT_THE_GRAPH
    }
    private = {name: getattr(config, name, None) for name in _PRIVATE}
    kept |= {name: value for name, value in private.items() if _is_plain(value)}
    return json.dumps(kept, sort_keys=True, default=str)
