"""What each published LoRA adds to each parameter: planned from the headers, computed in float32 one at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from rmd.published.files import ImportRefused
from rmd.published.lora import Lora
from rmd.published.naming import Names, Place

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
"""Component -> parameter -> shape."""


@dataclass(frozen=True)
class Change:
    """One LoRA's addition to one parameter.

    Attributes:
        parts: the keys whose tensors it is made of: two factors, or one difference.
        scale: its factor.
    """

    lora: Lora
    place: Place
    parts: tuple[str, ...]
    scale: float

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        """The addition, float32, in the parameter's shape."""
        if len(self.parts) == 1:
            return self.scale * self.place.rows(self.lora.tensor(self.parts[0])).reshape(shape)
        down, up = (self.lora.tensor(key) for key in self.parts)
        product = self.place.rows(up).flatten(1) @ down.flatten(1)
        return (self.scale * product).reshape(shape)


@dataclass(frozen=True)
class Unmatched:
    """Keys of a LoRA that find no place, and why."""

    lora: Lora
    keys: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Plan:
    """Component -> parameter -> its changes, in the order of the LoRAs; and what found no place."""

    changes: Mapping[str, Mapping[str, Sequence[Change]]]
    unmatched: Sequence[Unmatched]

    def modules(self, lora: Lora) -> int:
        """How many parameters a LoRA changes."""
        return sum(
            any(change.lora is lora for change in changes)
            for parameters in self.changes.values()
            for changes in parameters.values()
        )


def plan_merge(loras: Sequence[Lora], names: Names, shapes: Shapes) -> Plan:
    """Give every key of every LoRA its place, or a reason why it has none. Reads headers and alphas only.

    Raises:
        ImportRefused: one file names the same weights twice, in two namings.
    """
    changes: dict[str, dict[str, list[Change]]] = {}
    unmatched: list[Unmatched] = []
    for lora in loras:
        if lora.unread:
            unmatched.append(Unmatched(lora, lora.unread, "part of no LoRA module"))
        named: dict[tuple[object, ...], str] = {}
        for module, parts in lora.modules.items():
            found, reasons = _module_changes(lora, module, names, shapes)
            for change, parameter in found:
                what = change.place.component, parameter, change.place.third, len(change.parts)
                if (other := named.setdefault(what, module)) != module:
                    raise ImportRefused(f"{lora.path}: {other!r} and {module!r} name the same weights; keep one")
                changes.setdefault(change.place.component, {}).setdefault(parameter, []).append(change)
            used = {key for change, _ in found for key in change.parts}
            if used and "alpha" in parts:
                used.add(parts["alpha"])
            left: dict[str, list[str]] = {}
            for part, key in parts.items():
                if key not in used:
                    left.setdefault(reasons.get(part, reasons.get("", "no such module")), []).append(key)
            unmatched += [Unmatched(lora, tuple(keys), reason) for reason, keys in left.items()]
    return Plan(changes, unmatched)


def _module_changes(
    lora: Lora, module: str, names: Names, shapes: Shapes
) -> tuple[list[tuple[Change, str]], dict[str, str]]:
    """A module's changes with the parameters that they are for; the reasons against parts that have none."""
    parts = lora.modules[module]
    found: list[tuple[Change, str]] = []
    reasons: dict[str, str] = {}

    def place_all(part: str, keys: tuple[str, ...], suffix: str, scale: float, name: str) -> None:
        fitting = []
        places = names.find(name)
        for place in places:
            parameter = place.module + suffix
            shape = shapes[place.component].get(parameter)
            reason = f"no such parameter in {place.component}" if shape is None else _misfit(lora, keys, place, shape)
            if reason:
                reasons[part] = reason
                return
            fitting.append((Change(lora, place, keys, scale), parameter))
        found.extend(fitting)

    if "down" in parts and "up" in parts:
        factors = (parts["down"], parts["up"])
        place_all("down", factors, ".weight", lora.scale(module), module)
        if "down" in reasons:
            reasons["up"] = reasons["alpha"] = reasons["down"]
        if "up_bias" in parts:
            place_all("up_bias", (parts["up_bias"],), ".bias", lora.scale(module), module)
    elif "down" in parts or "up" in parts:
        reasons["down"] = reasons["up"] = "one of two factors is missing"
    if "weight" in parts:
        place_all("weight", (parts["weight"],), ".weight", lora.strength, module)
    if "bias" in parts:
        place_all("bias", (parts["bias"],), ".bias", lora.strength, module)
    if "modulation" in parts:
        place_all("modulation", (parts["modulation"],), "", lora.strength, f"{module}.modulation")
    return found, reasons


def _misfit(lora: Lora, keys: tuple[str, ...], place: Place, shape: tuple[int, ...]) -> str:
    """Why the tensors do not make a change of this shape; empty when they do."""
    fused = 1 if place.third is None else 3
    sizes = [lora.files.entries[key].shape for key in keys]
    shown = " and ".join(str(list(size)) for size in sizes)
    reason = f"{shown} do not fit the weight {list(shape)} of {place.component}.{place.module}"
    if len(sizes) == 1:
        whole = (fused * shape[0], *shape[1:]) if shape else shape
        return "" if _without_ones(sizes[0]) == _without_ones(whole) else reason
    down, up = sizes
    if len(down) < 2 or len(up) < 2 or math.prod(up[2:]) != 1:
        return reason
    fits = up[1] == down[0] and up[0] == fused * shape[0] and math.prod(down[1:]) == math.prod(shape[1:])
    return "" if fits else reason


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the last dimensions of one: a convolution of one place is published as a matrix too, and the reverse."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape
