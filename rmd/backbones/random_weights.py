"""Networks of a given configuration with random weights, made in place on their device.

Latency depends on the architecture, not on the values: a full-size network with random weights is what the speed-up
bench measures. Parameters are made on the meta device first, so that no float32 copy of 14 billion of them ever
exists; buffers (position tables, rotary frequencies) are computed for real.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import nn

STANDARD_DEVIATION = 0.02


def resolve(target: str) -> Any:
    """The class behind ``module:Class``."""
    module, name = target.split(":")
    return getattr(import_module(module), name)


def build_random(
    target: str, config: Mapping[str, Any], dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Any:
    """A network of class ``target`` (``module:Class``) with random weights in ``dtype`` on ``device``.

    Matrices are small normal noise, biases zero, the scales of norms one. On the meta device nothing is filled.
    Parameters that the class keeps in float32 (Wan's time embedding and norms, T5's last products in float16) are kept
    so, as its loader does.
    """
    cls = resolve(target)
    with _parameters_on_meta(), torch.device(device):
        model: nn.Module = _construct(cls, config)
    keep = _kept_in_float32(target, cls, dtype)
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # the original stays alive, so that its id stays its own
    for prefix, module in model.named_modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in made:
                path = f"{prefix}.{name}".split(".")
                wide = any(part in keep for part in path)
                value = torch.empty(parameter.shape, dtype=torch.float32 if wide else dtype, device=device)
                _fill(value, name, generator)
                made[id(parameter)] = parameter, nn.Parameter(value, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)][1]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:  # some constructors pin their tables to the CPU
                module._buffers[name] = buffer.to(device)
    return model.eval()


def _kept_in_float32(target: str, cls: Any, dtype: torch.dtype) -> set[str]:
    """Names of modules whose parameters a loader leaves in float32 when asked for ``dtype``."""
    always = set(getattr(cls, "_keep_in_fp32_modules_strict", None) or ())
    kept = set(getattr(cls, "_keep_in_fp32_modules", None) or ())
    if target.startswith("diffusers:"):
        return kept
    if target.startswith("transformers:"):  # the first list only against float16's small range
        return {torch.float16: kept | always, torch.bfloat16: always}.get(dtype, set())
    return set()


def _construct(cls: Any, config: Mapping[str, Any]) -> Any:
    if hasattr(cls, "config_class"):  # transformers: a configuration object first
        return cls(cls.config_class(**{k: v for k, v in config.items() if k != "architectures"}))
    return cls.from_config({k: v for k, v in config.items() if not k.startswith("_")})


def _fill(value: torch.Tensor, name: str, generator: torch.Generator | None) -> None:
    if value.device.type == "meta":
        return
    with torch.no_grad():
        if value.ndim >= 2:
            value.normal_(0.0, STANDARD_DEVIATION, generator=generator)
        elif "bias" in name or name == "beta":
            value.zero_()
        else:
            value.fill_(1.0)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """While active, every parameter that a module registers is moved to the meta device; buffers are left alone."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(module, name, param)
        registered = module._parameters.get(name)
        if registered is not None and registered.device.type != "meta":
            module._parameters[name] = nn.Parameter(
                torch.empty_like(registered, device="meta"), requires_grad=registered.requires_grad
            )

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
