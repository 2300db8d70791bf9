"""What a plan needs of torch-tensorrt beyond its own arguments: profiles by batch, and the names of its weights."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from engines.errors import EngineError
from engines.spec import EngineSpec


def export_batches(module: nn.Module, inputs: Mapping[str, Tensor], spec: EngineSpec) -> Any:
    """The network as a graph; of several batches, one whose batch is a symbol.

    Raises:
        EngineError: the network fixes its batch.
    """
    shapes = None
    if len(spec.batches) > 1:
        batch = torch.export.Dim("batch", min=spec.batches[0], max=spec.batches[-1])
        shapes = {name: {0: batch} for name in inputs}
    try:
        with torch.no_grad():
            program = torch.export.export(
                module,
                (),
                kwargs=dict(inputs),
                strict=False,
                dynamic_shapes=shapes,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
    except torch._dynamo.exc.UserError as error:
        raise EngineError(
            f"{spec.title} cannot be exported with a batch that varies; build one bucket at a time (--buckets "
            f"{spec.batch}): {str(error).splitlines()[0]}"
        ) from error
    # Memory without values, which Wan's rotary embedding fills afterwards, has no converter where its batch varies.
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.empty_like.default:
            node.target = torch.ops.aten.zeros_like.default
    return program


def input_ranges(spec: EngineSpec) -> dict[str, Any]:
    """torch-tensorrt's description of inputs whose batch varies over the spec's batches."""
    kind = importlib.import_module("torch_tensorrt").Input
    first, last = spec.batches[0], spec.batches[-1]
    return {
        item.name: kind(
            min_shape=(first, *item.shape[1:]),
            opt_shape=(last, *item.shape[1:]),
            max_shape=(last, *item.shape[1:]),
            dtype=item.torch_dtype,
        )
        for item in spec.inputs
    }


@contextmanager
def profile_per_batch(batches: Sequence[int]) -> Iterator[None]:
    """Plans built meanwhile get one optimisation profile a batch; torch-tensorrt itself makes a single wide one."""
    interpreter = importlib.import_module("torch_tensorrt.dynamo.conversion._TRTInterpreter").TRTInterpreter
    original = interpreter._populate_trt_builder_config

    def populate(self: Any, *args: Any, **kwargs: Any) -> Any:
        network = self.ctx.net
        inputs = [network.get_input(index) for index in range(network.num_inputs)]
        self.optimization_profiles = [self.builder.create_optimization_profile() for _ in batches]
        for batch, profile in zip(batches, self.optimization_profiles, strict=True):
            for item in inputs:
                shape = tuple(batch if side == -1 else side for side in item.shape)
                profile.set_shape(item.name, shape, shape, shape)
        return original(self, *args, **kwargs)

    if len(batches) > 1:
        interpreter._populate_trt_builder_config = populate
    try:
        yield
    finally:
        interpreter._populate_trt_builder_config = original


@contextmanager
def recorded_weights() -> Iterator[dict[str, Tensor]]:
    """The weights of the network that is converted meanwhile, by the names under which the plan can be refitted."""
    context = importlib.import_module("torch_tensorrt.dynamo.conversion._ConversionContext").ConversionContext
    original = context.record_weight
    recorded: dict[str, Tensor] = {}

    def record(self: Any, name: str, weight: Tensor) -> Any:
        if isinstance(weight, Tensor):
            recorded[name] = weight.detach()
        return original(self, name, weight)

    context.record_weight = record
    try:
        yield recorded
    finally:
        context.record_weight = original
